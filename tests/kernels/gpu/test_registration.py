"""The Triton kernels as torch operators: loading, refusals, tracing with symbolic lengths. Nothing runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from elision.kernels import OPS
from elision.kernels.gpu import KERNELS, load
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs only")
from triton.backends.compiler import GPUTarget  # noqa: E402

F32, F16, I32, U8 = torch.float32, torch.float16, torch.int32, torch.uint8
LAUNCHES = {
    "match_tokens": [{"best", "partner"}, {"rank"}, {"slot", "keep", "source"}],
    "merge_tokens": [{"follower"}, {"y", "new_size"}],
    "restore_tokens": [{"out"}],
    "attention": [{"out"}],
    "linear_nbits": [{"out"}, {"out"}],
    "cached_attention": [{"key_cache", "value_cache"}, {"partial", "highest", "total"}, {"out"}],
}
"""For every launch of an op, what it writes."""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_imported_on_demand_only() -> None:
    seen = "print(any(n == 'triton' or n.startswith('triton.') for n in sys.modules))"
    assert python(f"import sys, elision.kernels, elision.kernels.gpu; {seen}") == "False"
    assert python(f"import sys, elision.kernels.gpu as g; g.load(); {seen}") == "True"


def test_a_missing_triton_is_named() -> None:
    said = python(
        "import importlib.util as u, elision.kernels.gpu as g\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "try: g.load()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert said.startswith("the GPU kernels need Triton")


def test_schemas_are_those_of_the_ops() -> None:
    def told(overload: Any) -> list[tuple[Any, ...]]:
        # Without the types: torch 2.11 calls an int a SymInt here.
        return [
            (a.name, a.kwarg_only, a.has_default_value(), a.default_value) for a in overload._schema.arguments
        ]

    for name, kernel in load().items():
        assert told(kernel.overload) == told(getattr(torch.ops.elision, name).default)
        assert len(kernel.overload._schema.returns) == len(OPS[name].outputs)


def test_tensors_of_the_cpu_are_refused() -> None:
    load()
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        torch.ops.elision_triton.match_tokens(torch.randn(1, 8, 4), r=2)


def fake(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _maps(batch: int, count: int, gone: int) -> list[Tensor]:
    return [fake(batch, n, dtype=I32) for n in (count, count - gone, gone)]


def _nbits(columns: int, group: int, bytes: int, channels: int = 8, **others: Any) -> list[Any]:
    """x, weight, scales, zeros and bias of a product columns -> 8."""
    groups = -(-columns // group)
    weight = fake(channels, groups, bytes, dtype=others.get("weight", U8))
    scales = fake(channels, others.get("groups", groups), dtype=others.get("scales", F32))
    return [fake(2, columns), weight, scales, others.get("zeros"), others.get("bias")]


def _cached(heads: int = 4, shared: int = 2, width: int = 16, **others: Any) -> list[Any]:
    """Operands of 3 rows on a cache of 40 slots."""
    new = fake(1, shared, 3, width, dtype=others.get("new", F32))
    cache = fake(others.get("cached", shared), 40, width, dtype=others.get("cache", F32))
    rows = others.get("rows", 3)
    seen = [fake(rows, dtype=others.get("slots", I32)), fake(3, 2, dtype=I32), fake(3, 5, dtype=I32)]
    return [fake(1, heads, 3, width), new, new, cache, cache, *seen, others.get("bias")]


FOUR = {"bits": 4, "group": 32}
REFUSED: list[tuple[str, Callable[[], list[Any]], dict[str, Any], str]] = [
    ("match_tokens", lambda: [fake(1, 8, 4, dtype=torch.float64)], {"r": 2}, "a metric of type float64"),
    ("match_tokens", lambda: [fake(1, 8, 4)], {"r": 2, "order": "any"}, "order is one of"),
    ("merge_tokens", lambda: [fake(2, 8, 4).long(), None, *_maps(2, 8, 3)], {"axis": 1}, "of type int64"),
    ("merge_tokens", lambda: [fake(2, 9, 4), None, *_maps(2, 8, 3)], {"axis": 1}, "of another length"),
    ("merge_tokens", lambda: [fake(2, 8, 4), None, *_maps(3, 8, 3)], {"axis": 1}, "maps of batch 3"),
    ("merge_tokens", lambda: [fake(2, 8, 4), fake(3, 8), *_maps(2, 8, 3)], {"axis": 1}, "sizes of batch 3"),
    (
        "merge_tokens",
        lambda: [fake(8, 4), None, *_maps(2, 8, 3)],
        {"axis": 0, "batch_axis": -1},
        "without a batch axis",
    ),
    ("merge_tokens", lambda: [fake(2, 8, 4), None, *_maps(2, 8, 3)], {"axis": 3}, "do not fit rank 3"),
    (
        "restore_tokens",
        lambda: [fake(2, 8, 4).to(torch.complex64), fake(2, 9, dtype=I32)],
        {"axis": 1},
        "complex",
    ),
    ("attention", lambda: [fake(1, 2, 8, 260)] * 3, {}, "wider than 256"),
    ("attention", lambda: [fake(8, 16)] * 3, {}, "without a head axis"),
    ("attention", lambda: [fake(1, 2, 8, 16), *[fake(1, 2, 8, 16).half()] * 2], {}, "different types"),
    ("attention", lambda: [fake(1, 3, 8, 16), *[fake(1, 2, 8, 16)] * 2], {}, "3 query heads on 2 key heads"),
    ("attention", lambda: [fake(2, 2, 8, 16), *[fake(1, 2, 8, 16)] * 2], {}, "different batch"),
    ("attention", lambda: [*[fake(1, 2, 8, 16)] * 3, fake(1, 2, 8, 7)], {}, "does not broadcast"),
    ("attention", lambda: [*[fake(1, 2, 8, 16)] * 3, fake(1, 1, 1, 8).long()], {}, "a mask of type int64"),
    ("attention", lambda: [*[fake(1, 2, 8, 16)] * 3, None, fake(1, 7)], {}, "do not fit the keys"),
    ("linear_nbits", lambda: [fake(2, 64).double(), *_nbits(64, 32, 16)[1:]], FOUR, "rows of type float64"),
    ("linear_nbits", lambda: _nbits(64, 32, 16, weight=I32), FOUR, "a weight of type int32"),
    ("linear_nbits", lambda: _nbits(64, 32, 16, zeros=fake(8, 2, dtype=I32)), FOUR, "zeros of type int32"),
    ("linear_nbits", lambda: _nbits(64, 32, 32), FOUR, r"a weight [8, 2, 32] for 64 columns in groups of 32"),
    ("linear_nbits", lambda: _nbits(64, 32, 16, groups=3), FOUR, "scales or zeros that do not fit"),
    ("linear_nbits", lambda: _nbits(64, 32, 16, bias=fake(9)), FOUR, "a bias that does not fit"),
    ("linear_nbits", lambda: _nbits(64, 32, 16), {"bits": 5, "group": 32}, "bits is 4 or 8, not 5"),
    ("cached_attention", lambda: _cached(width=260), {}, "wider than 256"),
    ("cached_attention", lambda: _cached(new=F16), {}, "of different types"),
    ("cached_attention", lambda: _cached(cache=torch.float64), {}, "on a cache of type float64"),
    ("cached_attention", lambda: _cached(slots=torch.int64), {}, "slots of types int64, int32, int32"),
    ("cached_attention", lambda: _cached(heads=5), {}, "5 query heads on 2 key heads"),
    ("cached_attention", lambda: _cached(rows=4), {}, "operands that do not fit together"),
    ("cached_attention", lambda: _cached(cached=1), {}, "operands that do not fit together"),
    ("cached_attention", lambda: _cached(bias=fake(3, 9)), {}, "a bias that does not fit the heads"),
    ("cached_attention", lambda: _cached(bias=fake(1, 0)), {}, "a bias that does not fit the heads"),
]
THE_OPS_OWN = ("is one of", "rank 3", "is 4 or 8")
"""Refusals that are errors of the op itself, wherever it runs; the others `lower` asks for beforehand."""


@pytest.mark.parametrize(
    ("op", "make", "attrs", "reason"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_a_kernel_cannot_take_is_an_error(
    op: str, make: Any, attrs: dict[str, Any], reason: str
) -> None:
    load()
    with FakeTensorMode():
        operands = make()
        with pytest.raises(ValueError, match=re.escape(reason)):
            getattr(torch.ops.elision_triton, op)(*operands, **attrs)
        if not any(part in reason for part in THE_OPS_OWN):
            shapes = [None if x is None else tuple(x.shape) for x in operands]
            dtypes = [None if x is None else str(x.dtype).removeprefix("torch.") for x in operands]
            padding = [None] * (len(OPS[op].inputs) - len(operands))
            assert reason in KERNELS[op].refuses(
                [*shapes, *padding], [*dtypes, *padding], OPS[op].complete(attrs)
            )


def _calls() -> dict[str, tuple[list[Tensor | None], dict[str, Any]]]:
    return {
        "match_tokens": ([fake(3, 20, 8)], {"ratio": 0.25, "prefix": 1}),
        "merge_tokens": ([fake(3, 20, 8, dtype=F16), fake(3, 20), *_maps(3, 20, 6)], {"axis": 1}),
        "restore_tokens": ([fake(3, 14, 8), fake(3, 20, dtype=I32)], {"axis": 1}),
        "attention": (
            [fake(3, 4, 20, 16), fake(3, 2, 22, 16), fake(3, 2, 22, 16), None, fake(3, 22)],
            {"causal": True},
        ),
        "linear_nbits": (
            [
                fake(2, 20, 768, dtype=F16),
                fake(64, 24, 16, dtype=U8),
                fake(64, 24),
                fake(64, 24, dtype=U8),
                fake(64),
            ],
            {"bits": 4, "group": 32},
        ),
        "cached_attention": (
            [
                fake(1, 4, 3, 16),
                *[fake(1, 2, 3, 16)] * 2,
                *[fake(2, 40, 16)] * 2,
                *[fake(*shape, dtype=I32) for shape in ((3,), (3, 2), (3, 5))],
            ],
            {"window": 9},
        ),
    }


def _cpu() -> list[Tensor]:
    with FakeTensorMode():
        return _cached()[:8]


def test_the_form_in_place_says_what_it_writes() -> None:
    load()
    functional = torch.ops.elision_triton.cached_attention.default._schema
    schema = torch.ops.elision_triton.cached_attention_.default._schema
    assert [a.name for a in schema.arguments] == [a.name for a in functional.arguments]
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["key_cache", "value_cache"] and len(schema.returns) == 1
    with FakeTensorMode():
        assert torch.ops.elision_triton.cached_attention_(*_cached()).shape == (1, 4, 3, 16)
    with pytest.raises(ValueError, match="elision_triton::cached_attention_ needs tensors on a GPU"):
        torch.ops.elision_triton.cached_attention_(*(torch.empty(x.shape, dtype=x.dtype) for x in _cpu()))


class _Driver:
    """A driver of no GPU: torch asks for the target to find out which tensors a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(LAUNCHES))
def test_compiling_sees_the_launches(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below autograd the op is launches of Triton kernels that write its results, with lengths that may be symbols."""
    load()
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), torch.no_grad():
        operands, attrs = _calls()[name]
        compiled = torch.compile(
            lambda *given: getattr(torch.ops.elision_triton, name)(*given, **attrs),
            backend=aot_autograd(fw_compiler=keep),
            dynamic=dynamic,
            fullgraph=True,
        )
        found = compiled(*operands)
        outputs = found if isinstance(found, tuple) else (found,)
        shapes = [None if x is None else tuple(x.shape) for x in operands]
        assert [tuple(x.shape) for x in outputs] == OPS[name].output_shapes(shapes, attrs)
    (graph,) = graphs
    launched = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert [set(node.kwargs["tensors_to_clone"]) for node in launched] == LAUNCHES[name]
    symbols = [n for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert bool(symbols) == dynamic
