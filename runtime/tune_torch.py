"""The cases of torch: an op's own ATen, eager and compiled by Inductor, whichever is faster, against our kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import OPS
from ..passes.errors import ElisionError
from ..passes.lower import kernels_of
from ..passes.lowering import KERNEL, REFERENCE, TORCH_CUDA, dialect_class
from .bench import interleave
from .tune import Case

Operands = tuple[list[Tensor | None], dict[str, Any]]
BATCH, HEADS, WIDTH = 4, 6, 64


def _map(tokens: int, gone: int, device: str) -> list[Tensor]:
    """slot, keep and source of a merge of `gone` out of `tokens`."""
    metric = torch.randn(BATCH, tokens, WIDTH, device=device)
    return list(OPS["match_tokens"].spelled_out(metric, r=gone))


def _match(tokens: int, width: int, device: str) -> Operands:
    return [torch.randn(BATCH, tokens, WIDTH, device=device)], {"r": max(1, tokens // 16), "prefix": 1}


def _match_padded(tokens: int, width: int, device: str) -> Operands:
    operands, attrs = _match(tokens, width, device)
    size = (torch.arange(tokens, device=device) < tokens * 3 // 4).float().expand(BATCH, tokens).contiguous()
    return [*operands, size], attrs


def _mean(tokens: int, width: int, device: str) -> Operands:
    return [torch.randn(BATCH, HEADS, tokens, WIDTH, device=device)], {}


def _merge(tokens: int, width: int, device: str) -> Operands:
    slot, keep, source = _map(tokens, max(1, tokens // 16), device)
    x, size = torch.randn(BATCH, tokens, width, device=device), torch.ones(BATCH, tokens, device=device)
    return [x, size, slot, keep, source], {"axis": 1}


def _restore(tokens: int, width: int, device: str) -> Operands:
    gone = max(1, tokens // 2)
    slot = _map(tokens, gone, device)[0]
    return [torch.randn(BATCH, tokens - gone, width, device=device), slot], {"axis": 1}


def _attention(tokens: int, width: int, device: str) -> Operands:
    q, k, v = (torch.randn(BATCH, HEADS, tokens, WIDTH, device=device) for _ in range(3))
    return [q, k, v], {}


def _sized(tokens: int, width: int, device: str) -> Operands:
    operands, attrs = _attention(tokens, width, device)
    return [*operands, None, torch.ones(BATCH, tokens, device=device)], attrs


EXAMPLES: dict[str, list[Callable[[int, int, str], Operands]]] = {
    "match_tokens": [_match],
    "match_padded_tokens": [_match_padded],
    "mean_heads": [_mean],
    "merge_tokens": [_merge],
    "restore_tokens": [_restore],
    "attention": [_attention, _sized],
}
"""Operands for every op that a kernel may have: of so many tokens and features, on a device."""


def cases(target: str, *, quick: bool) -> list[Case]:
    """Raises ElisionError where the target has no kernels here."""
    kernels, problem = kernels_of(target)
    if problem:
        raise ElisionError(problem)
    sizes = [(256, 384)] if quick else [(64, 384), (256, 384), (1024, 768)]
    device = "cuda" if target == TORCH_CUDA else "cpu"
    return [
        _case(kernels[name], example, tokens, width, device, compiled=not quick)
        for name in kernels
        for example in EXAMPLES.get(name, [])
        for tokens, width in sizes
    ]


def _case(
    kernel: Any,
    example: Callable[[int, int, str], Operands],
    tokens: int,
    width: int,
    device: str,
    *,
    compiled: bool,
) -> Case:
    def make() -> dict[str, Callable[[], object]]:
        operands, attrs = example(tokens, width, device)
        op = OPS[kernel.op]
        references = [lambda: op.spelled_out(*operands, **attrs)]
        if compiled:
            torch._dynamo.reset()  # it stops compiling one function for ever new shapes
            inductor = torch.compile(lambda *given: op.spelled_out(*given, **attrs), dynamic=False)
            references.append(lambda: inductor(*operands))
        found = {f"{i}": _finished(run, device) for i, run in enumerate(references)}
        times = interleave(found, rounds=5, seconds=1.0)
        best = min(found, key=lambda name: sorted(times[name])[len(times[name]) // 2])
        complete = op.complete(attrs)
        return {
            REFERENCE: found[best],
            KERNEL: _finished(lambda: kernel.overload(*operands, **complete), device),
        }

    operands, attrs = example(tokens, width, device)
    shapes = [None if x is None else tuple(x.shape) for x in operands]
    dtypes = [None if x is None else str(x.dtype).removeprefix("torch.") for x in operands]
    return Case(kernel.op, dialect_class(kernel.op, shapes, dtypes, attrs), make)


def _finished(run: Callable[[], object], device: str) -> Callable[[], object]:
    """`run` without gradients, waited for."""

    def whole() -> None:
        with torch.no_grad():
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    return whole
