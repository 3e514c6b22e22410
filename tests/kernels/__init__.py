"""Tests of the op dialect."""
