"""Weights of few bits as arrays: their layout, rounding to it, and what other programs store, brought to it."""

from __future__ import annotations

from .layout import Quantized, dequantize, pack, unpack
from .rounding import quantize
from .source import SourceFormats

__all__ = ["Quantized", "SourceFormats", "dequantize", "pack", "quantize", "unpack"]
