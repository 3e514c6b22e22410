"""The errors a user can cause, and nothing else: everything here prints as one clear line."""

from __future__ import annotations

from typing import Any


class ElisionError(Exception):
    """Base of every error that a user of Elision can cause (bad file, bad option, unsafe graph).

    When a pass failed, the pass manager sets `failed` (the pass), `reproducer` (plain data, see
    `failures.reproducer`) and `graph` (what that pass was given).
    """

    failed: Any = None
    reproducer: dict[str, Any] | None = None
    graph: Any = None


class Refused(ElisionError):
    """A pass found the graph unsafe for it. The message names op and value; the graph is unchanged."""


class NothingMatched(ElisionError):
    """A pass found nothing in the graph that it applies to. The message says what it looked for."""


class PipelineError(ElisionError):
    """A pipeline text or a pass option that cannot be understood; names the nearest known one."""


class ModelFileError(ElisionError):
    """A model file that is missing, broken, unsafe, or not what its name says."""


class VerificationError(ElisionError):
    """The graph a pass left behind fails the verifier: structure, shapes, dtypes or numerics."""
