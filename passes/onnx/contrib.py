"""Operators of ONNX Runtime's own domain, com.microsoft, written out in standard ones."""

from __future__ import annotations

from .surgery import Editor


def unpack(ed: Editor) -> None:
    pass
