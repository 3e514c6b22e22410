"""Helpers for testing a pass of one's own: see docs/own_pass.md."""

from .passes.testing import apply, capture, drift, expect_diff, report, run

__all__ = ["apply", "capture", "drift", "expect_diff", "report", "run"]
