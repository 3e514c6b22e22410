"""The errors a user can cause, and nothing else: everything here prints as one clear line."""

from __future__ import annotations


class ElisionError(Exception):
    """Base of every error that a user of Elision can cause (bad file, bad option, unsafe graph)."""


class Refused(ElisionError):
    """A pass found the graph unsafe for it. The message names the op and the value; the graph is unchanged."""


class NothingMatched(ElisionError):
    """A pass found nothing in the graph that it applies to. The message says what it looked for."""


class PipelineError(ElisionError):
    """A pipeline text or a pass option that cannot be understood; names the nearest known one."""


class ModelFileError(ElisionError):
    """A model file that is missing, broken, unsafe, or not what its name says."""


class VerificationError(ElisionError):
    """The graph a pass left behind fails the verifier: structure, shapes, dtypes or numerics."""
