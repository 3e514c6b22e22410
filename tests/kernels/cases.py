"""Operands for every op of the dialect: tests of all ops iterate over these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from elision.kernels import OPS
from elision.kernels.ops.gated import FUNCTIONS
from torch import Tensor

from .embedding_cases import embedding_calls
from .linear_cases import linear_calls
from .segment_cases import segment_calls
from .step_cases import JOINED, STEPS


@dataclass(frozen=True)
class Case:
    """One call of an op. `batch` marks the operands' axes that may be dynamic: {operand: {axis: name}}."""

    op: str
    label: str
    make: Callable[[], list[Tensor | None]]
    attrs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def call(op: str, operands: list[Tensor | None], attrs: dict[str, Any]) -> list[Tensor]:
    """The torch op; always a list."""
    out = getattr(torch.ops.elision, op)(*operands, **attrs)
    return list(out) if isinstance(out, tuple) else [out]


def token_map(batch: int, count: int, r: int, prefix: int = 0, suffix: int = 0) -> list[Tensor]:
    """A map of random tokens: slot, keep, source."""
    metric = torch.randn(batch, count, 6)
    return call("match_tokens", [metric], {"r": r, "prefix": prefix, "suffix": suffix})


def padded_size(batch: int, count: int) -> Tensor:
    """Sizes with padding at the end of every sample but the first."""
    size = torch.ones(batch, count)
    for sample in range(1, batch):
        size[sample, count - 2 * sample :] = 0
    return size


def _padded_map(batch: int, count: int, r: int) -> list[Tensor | None]:
    metric, size = torch.randn(batch, count, 6), padded_size(batch, count)
    return [size, *call("match_padded_tokens", [metric, size], {"r": r})]


def _qkv(heads: int = 4, kv_heads: int = 4, n: int = 5, m: int = 9, batch: int = 2) -> list[Tensor | None]:
    return [
        torch.randn(batch, heads, n, 8),
        torch.randn(batch, kv_heads, m, 8),
        torch.randn(batch, kv_heads, m, 6),
    ]


def _sizes(batch: int, count: int) -> Tensor:
    return torch.randint(1, 5, (batch, count)).float()


def _matching() -> list[Case]:
    budgets: list[dict[str, Any]] = [
        {"r": 0},
        {"r": 3},
        {"r": 4, "prefix": 1},
        {"r": 2, "prefix": 2, "suffix": 1},
        {"ratio": 0.3, "prefix": 1},
        {"r": 100, "order": "original"},
        {"ratio": 0.5, "suffix": 2, "order": "original", "prefix": 3},
    ]
    cases = []
    for attrs in budgets:
        label = ",".join(f"{k}={v}" for k, v in attrs.items())
        for batch, count in ((1, 16), (3, 17)):
            cases.append(
                Case(
                    "match_tokens",
                    f"{label}-{batch}x{count}",
                    lambda b=batch, n=count: [torch.randn(b, n, 8)],
                    attrs,
                )
            )
            cases.append(
                Case(
                    "match_padded_tokens",
                    f"{label}-{batch}x{count}",
                    lambda b=batch, n=count: [torch.randn(b, n, 8), padded_size(b, n)],
                    attrs,
                )
            )
    padded_shared = {"r": 4, "prefix": 1}
    cases.append(
        Case(
            "match_padded_tokens",
            "shared size",
            lambda: [torch.randn(2, 12, 8), padded_size(2, 12)[1:]],
            padded_shared,
        )
    )
    for attrs in (
        {"height": 6, "width": 5, "ratio": 0.5},
        {"height": 7, "width": 7, "r": 9, "sy": 3, "sx": 2, "seed": 3},
        {"height": 4, "width": 4, "r": 0},
    ):
        count = attrs["height"] * attrs["width"]
        cases.append(
            Case(
                "match_grid_tokens",
                ",".join(f"{k}={v}" for k, v in attrs.items()),
                lambda n=count: [torch.randn(2, n, 8)],
                attrs,
            )
        )
    return cases


def _maps() -> list[Case]:
    def merge(
        shape: tuple[int, ...], size: Tensor | None, r: int, batch: int, dtype: Any = torch.float32
    ) -> Any:
        count = 14
        return lambda: [
            torch.randn(*shape).to(dtype),
            None if size is None else size,
            *token_map(batch, count, r),
        ]

    return [
        Case("merge_tokens", "plain", merge((2, 14, 5), None, 4, 2), {"axis": 1}),
        Case("merge_tokens", "sized", merge((2, 14, 5), _sizes(2, 14), 4, 2), {"axis": 1}),
        Case("merge_tokens", "shared size", merge((3, 14, 5), _sizes(1, 14), 6, 3), {"axis": 1}),
        Case("merge_tokens", "shared map", merge((3, 14, 5), _sizes(1, 14), 6, 1), {"axis": 1}),
        Case("merge_tokens", "r=0", merge((2, 14, 5), _sizes(2, 14), 0, 2), {"axis": 1}),
        Case("merge_tokens", "rank 2", merge((2, 14), None, 3, 2), {"axis": 1}),
        Case("merge_tokens", "heads", merge((2, 3, 14, 4), _sizes(2, 14), 5, 2), {"axis": 2}),
        Case("merge_tokens", "tokens first", merge((14, 2, 4), None, 5, 2), {"axis": 0, "batch_axis": 1}),
        Case("merge_tokens", "no batch", merge((3, 14), _sizes(1, 14), 5, 1), {"axis": 1, "batch_axis": -1}),
        Case("merge_tokens", "one of x", merge((1, 14, 4), _sizes(2, 14), 5, 2), {"axis": 1}),
        Case("merge_tokens", "half", merge((2, 14, 5), None, 4, 2, torch.float16), {"axis": 1}),
        Case(
            "merge_tokens",
            "padded",
            lambda: [torch.randn(3, 12, 4), *_padded_map(3, 12, 4)],
            {"axis": 1},
        ),
        Case(
            "merge_tokens",
            "many",
            lambda: [torch.randn(2, 400, 4), *_padded_map(2, 400, 150)],
            {"axis": 1},
        ),
        Case(
            "restore_tokens",
            "plain",
            lambda: [torch.randn(2, 9, 4), token_map(2, 13, 4)[0]],
            {"axis": 1},
        ),
        Case(
            "restore_tokens",
            "dropped",
            lambda: [torch.randn(3, 8, 4), _padded_map(3, 12, 4)[1]],
            {"axis": 1},
        ),
        Case(
            "restore_tokens",
            "heads",
            lambda: [torch.randn(9, 2, 4, 3), token_map(2, 13, 4)[0]],
            {"axis": 0, "batch_axis": 1},
        ),
        Case(
            "restore_tokens",
            "no batch",
            lambda: [torch.randn(4, 9), token_map(1, 13, 4)[0]],
            {"axis": 1, "batch_axis": -1},
        ),
        Case(
            "select_tokens",
            "positions",
            lambda: [torch.randn(13, 4), token_map(3, 13, 4)[1]],
            {"axis": 1, "rank": 3},
        ),
        Case(
            "select_tokens",
            "bool mask",
            lambda: [torch.rand(2, 1, 1, 13) > 0.3, token_map(2, 13, 4)[1]],
            {"axis": 3, "rank": 4},
        ),
        Case(
            "select_tokens",
            "ids",
            lambda: [torch.arange(26).reshape(2, 13), token_map(2, 13, 4)[1]],
            {"axis": 1, "rank": 2},
        ),
        Case(
            "select_tokens",
            "shared bias",
            lambda: [torch.randn(4, 13, 13), token_map(2, 13, 4)[1]],
            {"axis": 3, "rank": 4},
        ),
        Case(
            "select_tokens",
            "no batch",
            lambda: [torch.randn(4, 13, 3), token_map(1, 13, 4)[1]],
            {"axis": 1, "rank": 3, "batch_axis": -1},
        ),
        Case("compose_slots", "plain", lambda: [token_map(2, 13, 4)[0], token_map(2, 9, 3)[0]], {}),
        Case("compose_slots", "dropped", lambda: [_padded_map(3, 12, 4)[1], token_map(3, 8, 3)[0]], {}),
        Case("shift_map", "both", lambda: [*token_map(2, 13, 4, 1, 2)], {"start": 1, "stop": 2}),
        Case("shift_map", "start", lambda: [*token_map(2, 13, 4, 1)], {"start": 1}),
        Case("range_size", "both", lambda: [_sizes(2, 9)], {"start": 1, "stop": 2}),
        Case("range_size", "none", lambda: [_sizes(2, 9)], {}),
        Case(
            "slice_tokens", "first", lambda: [torch.randn(2, 9, 4)], {"axis": 1, "end": 1, "keepdim": False}
        ),
        Case(
            "slice_tokens", "last", lambda: [torch.randn(2, 9, 4)], {"axis": 1, "start": -1, "keepdim": False}
        ),
        Case("slice_tokens", "middle", lambda: [torch.randn(2, 9, 4)], {"axis": 1, "start": 1, "end": -2}),
        Case("pool_tokens", "mean", lambda: [torch.randn(2, 9, 4), _sizes(2, 9)], {"axis": 1}),
        Case("pool_tokens", "sum", lambda: [torch.randn(2, 9, 4), _sizes(1, 9)], {"axis": 1, "mode": "sum"}),
        Case(
            "pool_tokens",
            "padded",
            lambda: [torch.randn(3, 9, 4), padded_size(3, 9)],
            {"axis": 1, "keepdim": True},
        ),
        Case(
            "pool_tokens",
            "tokens first",
            lambda: [torch.randn(9, 2, 4), _sizes(2, 9)],
            {"axis": 0, "batch_axis": 1},
        ),
        Case(
            "pool_tokens",
            "no batch",
            lambda: [torch.randn(9, 4), _sizes(1, 9)],
            {"axis": 0, "batch_axis": -1},
        ),
        Case("mean_heads", "plain", lambda: [torch.randn(2, 3, 9, 4)], {}),
        Case("mean_heads", "half", lambda: [torch.randn(2, 3, 9, 4).half()], {}),
        Case("valid_size", "bool", lambda: [torch.rand(3, 1, 1, 9) > 0.4], {"axis": 3, "batch_axis": 0}),
        Case(
            "valid_size",
            "additive",
            lambda: [torch.where(torch.rand(3, 2, 9, 9) > 0.8, 0.0, -3e38)],
            {"axis": 3, "batch_axis": 0},
        ),
        Case("valid_size", "ints", lambda: [torch.randint(0, 2, (3, 9))], {"axis": 1, "batch_axis": 0}),
        Case("valid_size", "no batch", lambda: [torch.rand(3, 9) > 0.6], {"axis": 1, "batch_axis": -1}),
    ]


def _attention() -> list[Case]:
    additive = torch.where(torch.rand(2, 1, 5, 9) > 0.3, 0.0, -3e38)
    boolean = torch.rand(2, 1, 1, 9) > 0.3
    boolean[..., 0] = True
    empty = _sizes(2, 9)
    empty[1, 5:] = 0
    return [
        Case("attention", "plain", lambda: [*_qkv()], {}),
        Case("attention", "scale", lambda: [*_qkv()], {"scale": 0.3}),
        Case("attention", "sized", lambda: [*_qkv(), None, _sizes(2, 9)], {}),
        Case("attention", "shared size", lambda: [*_qkv(), None, _sizes(1, 9)], {}),
        Case("attention", "padding", lambda: [*_qkv(), None, empty], {}),
        Case("attention", "bool mask", lambda: [*_qkv(), boolean], {}),
        Case("attention", "bool mask and size", lambda: [*_qkv(), boolean, empty], {}),
        Case("attention", "bias", lambda: [*_qkv(), additive], {}),
        Case("attention", "bias and size", lambda: [*_qkv(), additive, empty], {}),
        Case("attention", "grouped", lambda: [*_qkv(4, 2), None, _sizes(2, 9)], {}),
        Case("attention", "causal", lambda: [*_qkv(n=9)], {"causal": True}),
        Case("attention", "causal and size", lambda: [*_qkv(n=9), None, _sizes(2, 9)], {"causal": True}),
        Case(
            "attention",
            "rank 3",
            lambda: [torch.randn(2, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8), None, _sizes(2, 9)],
            {},
        ),
    ]


def _joined() -> list[Case]:
    """The cases of attention whose operands have four axes, with the heads joined."""
    found = []
    for case in _attention():
        heads, shared = case.make()[0].shape[1], case.make()[1].shape[1]  # type: ignore[union-attr]
        if case.make()[0].dim() != 4:  # type: ignore[union-attr]
            continue

        def make(case: Case = case) -> list[Tensor | None]:
            q, k, v, *rest = case.make()
            return [*(x.transpose(1, 2).flatten(2) for x in (q, k, v) if x is not None), *rest]

        found.append(
            Case("joined_attention", case.label, make, {**case.attrs, "heads": heads, "kv_heads": shared})
        )
    return found


def _steps() -> list[Case]:
    return [
        *(Case("cached_attention", step.label, step.make, step.attrs or {}) for step in STEPS),
        *(Case("joined_cached_attention", case.label, case.make, case.all_attrs) for case in JOINED),
        *(Case("key_scores", step.label, step.make_scored, step.attrs or {}) for step in STEPS if step.plain),
    ]


def _gated() -> list[Case]:
    cases = [
        Case("gated", fn, lambda: [torch.randn(2, 5, 6), torch.randn(2, 5, 6)], {"fn": fn})
        for fn in FUNCTIONS
    ]
    cases.append(Case("gated", "packed", lambda: [torch.randn(2, 5, 12)], {"fn": "silu"}))
    cases.append(Case("gated", "packed half", lambda: [torch.randn(5, 12).half()], {"fn": "gelu_tanh"}))
    return cases


def _norms() -> list[Case]:
    def make(*names: str, dtype: torch.dtype = torch.float32) -> Any:
        return lambda: [
            torch.randn(19).to(dtype) if n == "weight" else torch.randn(2, 5, 19).to(dtype) for n in names
        ]

    return [
        Case("rms_norm", "alone", make("x", "weight"), {"eps": 1e-5}),
        Case("rms_norm", "half", make("x", "weight", dtype=torch.float16), {"eps": 1e-3}),
        Case("add_rms_norm", "added", make("x", "residual", "weight"), {"eps": 1e-6}),
    ]


def _dropping() -> list[Case]:
    def scores() -> Tensor:
        score = torch.rand(2, 9)
        score[0, :3] = -1
        return score

    def flags(*rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32)

    def rows(n: int = 6, m: int = 9, heads: int = 2) -> list[Tensor | None]:
        return [torch.randn(2, 4, n, 8), torch.randn(2, heads, m, 8)]

    prefixed = flags([-1, 1, 0, 0, 0, 1], [-1, 0, 0, 1, 1, 0])
    six = flags([1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0])
    mixed = flags([-1, 0, 1, 0, 0, 1, -1], [-1, 1, 0, 1, 0, 0, 0])
    past = torch.ones(6, 9, dtype=torch.bool).tril(2).expand(2, 1, 6, 9)
    valid = flags([1, 1, 1, 1, 0, 0], [1] * 6)
    return [
        Case("attention_rows", "first", lambda: rows(), {}),
        Case("attention_rows", "third, mean", lambda: rows(), {"first": 2, "heads": "mean", "scale": 0.3}),
        Case("attention_rows", "every other", lambda: rows(), {"first": 1, "step": 2}),
        Case("attention_rows", "last, masked", lambda: [*rows(), past], {"last": True}),
        Case("attention_rows", "last valid", lambda: [*rows(), past, valid], {"last": True}),
        Case("attention_rows", "causal", lambda: [*rows(9), None, None], {"first": 4, "causal": True}),
        Case("attention_rows", "additive", lambda: [*rows(), torch.randn(1, 1, 6, 9)], {"step": 3}),
        Case("attention_rows", "keys only", lambda: [*rows(), torch.rand(2, 1, 1, 9) > 0.2], {"step": 3}),
        Case("top_tokens", "count", lambda: [scores()], {"count": 4}),
        Case("top_tokens", "ratio", lambda: [scores()], {"ratio": 0.4}),
        Case("top_tokens", "counts", lambda: [scores(), torch.tensor([2, 7]).int()], {}),
        Case("top_tokens", "among", lambda: [scores(), None, torch.randn(2, 9)], {"ratio": 0.5}),
        Case("top_tokens", "shared", lambda: [scores().abs()], {"count": 3, "shared": True}),
        Case("top_tokens", "too many", lambda: [scores()], {"count": 40}),
        Case("place_rows", "enough", lambda: [torch.rand(2, 5) > 0.4, torch.rand(12)], {}),
        Case("place_rows", "too few", lambda: [torch.rand(2, 5) > 0.1, torch.rand(2)], {"outside": -3.0}),
        Case("adaptive_counts", "outliers", lambda: [scores()], {"capacity": 5}),
        Case("adaptive_counts", "mass", lambda: [scores()], {"capacity": 5, "mass": 0.8}),
        Case("adaptive_counts", "among", lambda: [scores(), torch.randn(2, 9)], {"capacity": 3}),
        Case("drop_tokens", "plain", lambda: [mixed], {"count": 2}),
        Case("drop_tokens", "does not fit", lambda: [mixed], {"count": 5}),
        Case("drop_tokens", "padded", lambda: [mixed, flags([1, 1, 1, 1, 1, 1, 0], [1] * 7)], {"count": 3}),
        Case(
            "drop_tokens",
            "ends stay",
            lambda: [mixed, flags([0, 1, 1, 1, 1, 1, 0], [1] * 7)],
            {"count": 2, "prefix": 1, "suffix": 2},
        ),
        *(
            Case(
                "tile_budgets",
                f"{budget} of {alpha}{' published' if published else ''}",
                lambda: [torch.rand(10, 17)],
                {
                    **{"rows": 2, "columns": 2, "height": 4, "width": 4, "prefix": 1},
                    **{"budget": budget, "alpha": alpha, "published": published},
                },
            )
            for budget, alpha in ((16, 0.5), (37, 0.3), (70, 0.1))
            for published in (False, True)
        ),
        Case("guard_rows", "plain", lambda: [torch.randn(2, 3, 4), torch.tensor([1.0, 1.0])], {}),
        Case("guard_rows", "tokens first", lambda: [torch.randn(3, 2), torch.ones(2)], {"batch_axis": 1}),
        Case("distinct_tokens", "plain", lambda: [torch.randn(2, 6, 5)], {}),
        Case("contextual_tokens", "two", lambda: [torch.randn(2, 6, 5), six], {"count": 2, "kept": 2}),
        Case("contextual_tokens", "all", lambda: [torch.randn(2, 6, 5), six], {"count": 4, "kept": 2}),
        Case(
            "contextual_tokens", "prefix", lambda: [torch.randn(2, 6, 5), prefixed], {"count": 1, "kept": 3}
        ),
        Case(
            "absorb_tokens",
            "plain",
            lambda: [torch.randn(2, 6, 3), torch.randn(2, 6, 5), torch.rand(2, 6), six],
            {"kept": 2, "neighbours": 3},
        ),
        Case("mean_channels", "plain", lambda: [torch.randn(2, 6, 3)], {}),
    ]


def _gates() -> list[Case]:
    valid = torch.tensor([[1.0] * 7, [1, 1, 1, 1, 1, 0, 0]])
    ends = {"prefix": 1, "suffix": 1, "last": 2}
    kept = torch.tensor([[0.0, 1, 0, 1, 0, 1, 0], [-1, 0, 0, 1, 0, 1, 1]])
    ids, special = torch.tensor([[1, 5, 9, 2, 4, 2, 7], [2, 3, 3, 9, 8, 9, 2]]), torch.tensor([2, 9])

    def gated(dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [torch.randn(2, 7, 5).to(dtype), torch.randn(5), torch.tensor([0.3])]

    def gates() -> Tensor:
        return -30 * torch.rand(2, 7)

    slot = torch.tensor([[0, -1, 1, -1, 2], [-1, 0, 1, 2, -1]], dtype=torch.int32)
    return [
        Case("delete_gate", "plain", lambda: gated(), {}),
        Case("delete_gate", "padded, ends", lambda: [*gated(), valid], {"k": -10.0, "norm": "layer", **ends}),
        Case("delete_gate", "half", lambda: [*gated(torch.float16), valid], {"last": 1}),
        Case("delete_gate", "no norm, ends", lambda: gated(), {"norm": "none", **ends}),
        Case("gate_budget", "threshold", lambda: [gates()], {}),
        Case("gate_budget", "share", lambda: [gates(), valid], {"ratio": 0.4, "threshold": -25.0, **ends}),
        Case("gate_budget", "count", lambda: [gates(), valid], {"count": 3, "threshold": -28.0, **ends}),
        Case("gate_budget", "no padding", lambda: [gates()], {"ratio": 0.4, "threshold": -30.0, "last": 1}),
        Case("delete_gate", "ids", lambda: [*gated(), valid, ids, special], {"last": 1}),
        Case("delete_gate", "ids, no padding", lambda: [*gated(), None, ids, special], {}),
        Case("gate_budget", "ids", lambda: [gates(), valid, ids.int(), special], {"ratio": 0.4, "last": 1}),
        Case("longest_row", "plain", lambda: [(gates() > -15).float()], {}),
        Case("longest_row", "nothing", lambda: [torch.zeros(2, 7), valid], {}),
        Case("longest_row", "ends", lambda: [kept, valid], {"prefix": 1, "suffix": 1}),
        Case("drop_tokens", "share", lambda: [(gates() > -15).float(), valid], {"ratio": 0.4}),
        Case("drop_tokens", "slots", lambda: [kept, valid, torch.arange(4)], {"prefix": 1}),
        Case("drop_tokens", "slots, does not fit", lambda: [kept, valid, torch.arange(2)], {}),
        Case(
            "blend_tokens", "plain", lambda: [torch.randn(2, 3, 4), slot, torch.randn(2, 5, 4)], {"axis": 1}
        ),
        Case(
            "blend_tokens",
            "tokens first",
            lambda: [torch.randn(3, 2), slot, torch.randn(5, 2)],
            {"axis": 0, "batch_axis": 1},
        ),
        Case(
            "blend_tokens",
            "no batch",
            lambda: [torch.randn(3, 4), slot[:1], torch.randn(5, 4)],
            {"axis": 0, "batch_axis": -1},
        ),
        Case("pad_tokens", "keys", lambda: [torch.randn(2, 4, 5, 8)], {"axis": 2}),
        Case("pad_tokens", "size", lambda: [torch.rand(2, 5)], {"axis": 1, "value": 1.0}),
        Case("pad_tokens", "mask", lambda: [torch.rand(2, 1, 1, 5) > 0.5], {"axis": 3, "value": 1.0}),
    ]


CASES = [
    *_gates(),
    *(Case(*call) for call in segment_calls()),
    *_norms(),
    *_dropping(),
    *_matching(),
    *_maps(),
    *_attention(),
    *_joined(),
    *_steps(),
    *_gated(),
    *(Case(*call) for call in linear_calls()),
    *(Case(*call) for call in embedding_calls()),
]
assert {case.op for case in CASES} == set(OPS)
