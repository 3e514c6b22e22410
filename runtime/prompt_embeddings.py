"""Trained prompt tokens (PPD, Chen et al., EMNLP 2025) from a file into a graph that has ids for them."""

from __future__ import annotations

from pathlib import Path

from ..passes.errors import ModelFileError
from ..passes.extra_embeddings import set_extra_rows
from ..passes.ir.graph import Graph
from .tensors import read_tensors

TENSOR = "prompt_embeddings"


def set_prompt_embeddings(graph: Graph, file: str | Path, ids: str = "") -> int:
    """The rows of tensor `prompt_embeddings` [count, H] in a .safetensors file become the embeddings of the ids that
    the pass `extra-embeddings` with this count has added; returns how many they are. Raises ElisionError for a file
    without them, or of another width."""
    path = Path(file)
    found = read_tensors(path)
    if TENSOR not in found:
        raise ModelFileError(f"{path}: has no tensor {TENSOR!r}, but {', '.join(sorted(found)) or 'none'}")
    set_extra_rows(graph, found[TENSOR], ids)
    return len(found[TENSOR])
