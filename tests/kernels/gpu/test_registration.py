"""The Triton kernels as torch operators: loading, refusals, tracing with symbolic lengths. Nothing runs."""

from __future__ import annotations

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

F32, F16, I32 = torch.float32, torch.float16, torch.int32
LAUNCHES = {
    "match_tokens": [{"best", "partner"}, {"rank"}, {"slot", "keep", "source"}],
    "merge_tokens": [{"follower"}, {"y", "new_size"}],
    "restore_tokens": [{"out"}],
    "attention": [{"out"}],
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
]


@pytest.mark.parametrize(
    ("op", "make", "attrs", "reason"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_a_kernel_cannot_take_is_an_error(
    op: str, make: Any, attrs: dict[str, Any], reason: str
) -> None:
    load()
    with FakeTensorMode():
        operands = make()
        with pytest.raises(ValueError, match=reason):
            getattr(torch.ops.elision_triton, op)(*operands, **attrs)
        if (
            "is one of" not in reason and "rank 3" not in reason
        ):  # the rest is in what `lower` asks beforehand
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
    }


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
