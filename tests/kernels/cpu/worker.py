"""`python -m tests.kernels.cpu.worker FILE`: every draw on the variant that ELISION_ISA asks for, into FILE.

Each is run on 1, 2 and 5 threads, and again: the bits must not change."""

from __future__ import annotations

import sys

import torch
from elision.kernels import cpu

from .draws import draws, kernel


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [t.contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def main(path: str) -> None:
    cpu.kernels()
    results = []
    for draw in draws():
        found = None
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            again = kernel(draw.op, draw.operands, draw.attrs)
            if found is not None and not all(map(same_bits, found, again)):
                raise SystemExit(f"{draw.label}: other bits on {threads} threads")
            found = again
        results.append(((draw.label, draw.op, draw.operands, draw.attrs), found))
    torch.save({"variant": cpu.variant(), "results": results}, path)


if __name__ == "__main__":
    main(sys.argv[1])
