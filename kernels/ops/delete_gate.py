"""delete_gate, gate_budget: what a learned gate says about each token, and how many of each sample's there is room for.

A gate is a number from k (delete) to 0 (keep) for each token. In training it is added to the logits of the token's key
in every later attention; at inference tokens below a threshold are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import BOOL, FLOAT, INT32, INT64, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, fraction, numel, wanted

NORMS = ("rms", "layer", "none")


def delete_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    special: Tensor | None = None,
    *,
    k: float = -30.0,
    norm: str = "rms",
    eps: float = 1e-6,
    prefix: int = 0,
    suffix: int = 0,
    last: int = 0,
) -> tuple[Tensor, Tensor]:
    """x [B, N, C], weight [C], bias [1], valid [B or 1, N] (> 0: no padding), ids int [B, N], special int [S] -> gate
    [B, N] from k to 0, size [B, N].

    size is exp(gate), 0 for padding: in `attention` its logarithm is added to the logits. Both float32. The gate is
    k * sigmoid(-(weight . norm(x) + bias)), the norm without parameters of its own. 0 for protected tokens: the first
    `prefix`, the last `suffix`, and of every sample the `last` ones that are no padding, and those whose id is one of
    `special`. k for padding. Computed in float32; differentiable in x, weight and bias."""
    _check(norm)
    wide = x.float()
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    if norm != "none":
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    gate = k * torch.sigmoid(-((wide * weight.float()).sum(-1) + bias.float()))
    real = _real(gate, valid)
    gate = torch.where(_protected(real, ids, special, prefix, suffix, last), 0.0, gate)
    gate = torch.where(real, gate, k)
    return gate, torch.where(real, gate.exp(), 0.0)


def gate_budget(
    gate: Tensor,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    special: Tensor | None = None,
    *,
    threshold: float = -15.0,
    k: float = -30.0,
    count: int = -1,
    ratio: float = -1.0,
    prefix: int = 0,
    suffix: int = 0,
    last: int = 0,
) -> tuple[Tensor, Tensor]:
    """gate [B, N], valid [B or 1, N], ids [B, N], special [S] -> score float32 [B, N], counts int32 [B].

    They are operands of `top_tokens`. score: gate - k, and -1 for what is not to choose among: protected tokens (as in
    `delete_gate`) and padding. counts: how many have a gate above `threshold`, but no more than there is room for.
    `drop_tokens` with the same `count` or `ratio` makes the room; of a ratio each sample gets the share of its own
    tokens, whatever its padding. With neither there is room for all."""
    real = _real(gate, valid)
    protected = _protected(real, ids, special, prefix, suffix, last)
    candidate = real & ~protected
    score = torch.where(candidate, (gate - k).clamp(min=0), -1.0)
    counts = (candidate & (gate > threshold)).sum(1)
    if count >= 0 or ratio >= 0:
        length = gate.shape[1]
        room = length - wanted(length, count, ratio) - protected.sum(1)
        if count < 0:
            share, own = fraction(ratio), real.sum(1)
            left = own - own * share.numerator // share.denominator
            room = torch.minimum(room, left - (protected & real).sum(1))
        counts = torch.minimum(counts, room.clamp(min=0))
    return score, counts.int()


def _check(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"delete_gate: norm is one of {NORMS}, not {norm!r}")


def _real(gate: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.ones_like(gate, dtype=torch.bool)
    return (valid > 0).expand(gate.shape)


def _protected(
    real: Tensor, ids: Tensor | None, special: Tensor | None, prefix: int, suffix: int, last: int
) -> Tensor:
    length = real.shape[1]
    places = torch.arange(length, device=real.device).expand(real.shape)
    found = (places < prefix) | (places >= length - suffix)
    if last:
        end = torch.where(real, places, -1).amax(1, keepdim=True)
        found = found | (real & (places > end - last))
    if ids is not None and special is not None:
        found = found | (real & (ids[..., None] == special).any(-1))
    return found


# ---- ONNX --------------------------------------------------------------------------------------------
def _gate_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    _check(attrs["norm"])
    wide = b.cast("x", FLOAT)
    if attrs["norm"] == "layer":
        wide = b("Sub", wide, b("ReduceMean", wide, b.constant([-1]), keepdims=1))
    if attrs["norm"] != "none":
        square = b("ReduceMean", b("Mul", wide, wide), b.constant([-1]), keepdims=1)
        wide = b("Div", wide, b("Sqrt", b("Add", square, b.constant(attrs["eps"], FLOAT))))
    product = b("ReduceSum", b("Mul", wide, b.cast("weight", FLOAT)), b.constant([-1]), keepdims=0)
    z = b("Add", product, b.cast("bias", FLOAT))
    gate = b("Mul", b("Sigmoid", b("Neg", z)), b.constant(attrs["k"], FLOAT))
    real = _body_real(b, gate, operands[3])
    protected = _body_protected(b, gate, real, operands[4:], attrs)
    if protected is not None:
        gate = b("Where", protected, b.constant(0.0, FLOAT), gate)
    if real is None:
        return [gate, b("Exp", gate)]
    gate = b("Where", real, gate, b.constant(attrs["k"], FLOAT))
    return [gate, b("Where", real, b("Exp", gate), b.constant(0.0, FLOAT))]


def _body_real(b: Body, gate: str, valid: Any) -> str | None:
    """Which tokens are no padding, bool [B, N]; None where all are."""
    if valid is None:
        return None
    found = b.cast(b("Greater", b.cast("valid", FLOAT), b.constant(0.0, FLOAT)), INT32)
    return b.cast(b("Expand", found, b("Shape", gate)), BOOL)


def _body_protected(
    b: Body, gate: str, real: str | None, listed: list[Any], attrs: dict[str, Any]
) -> str | None:
    """Which tokens stay whatever the gate says, bool [B, N]; None for none."""
    length = b.length(gate, 1)
    places = b("Expand", b.count(length), b("Shape", gate))
    found = []
    if attrs["prefix"]:
        found.append(b("Less", places, b.constant(attrs["prefix"])))
    if attrs["suffix"]:
        found.append(b("GreaterOrEqual", places, b("Sub", length, b.constant([attrs["suffix"]]))))
    if attrs["last"]:
        if real is None:
            found.append(b("GreaterOrEqual", places, b("Sub", length, b.constant([attrs["last"]]))))
        else:
            mine = b("Where", real, places, b.constant(-1))
            end = b("ReduceMax", mine, b.constant([1]), keepdims=1)
            found.append(b("And", real, b("Greater", places, b("Sub", end, b.constant(attrs["last"])))))
    if None not in listed:
        same = b("Equal", b.unsqueeze(b.cast("ids", INT64), 2), b.cast("special", INT64))
        hit = b("ReduceMax", b.cast(same, INT32), b.constant([2]), keepdims=0)
        hit = b.cast(hit, BOOL)
        found.append(hit if real is None else b("And", real, hit))
    if not found:
        return None
    protected = found[0]
    for other in found[1:]:
        protected = b("Or", protected, other)
    return protected


def _budget_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    one = b.constant([1])

    def number(flags: str) -> str:
        return b("ReduceSum", b.cast(flags, INT64), one, keepdims=0)

    real = _body_real(b, "gate", operands[1])
    protected = _body_protected(b, "gate", real, operands[2:], attrs)
    nowhere = b("Less", b("Mul", "gate", b.constant(0.0, FLOAT)), b.constant(0.0, FLOAT))
    everywhere = b("Not", nowhere)
    real, protected = real or everywhere, protected or nowhere
    candidate = b("And", real, b("Not", protected))
    shifted = b("Max", b("Sub", "gate", b.constant(attrs["k"], FLOAT)), b.constant(0.0, FLOAT))
    score = b("Where", candidate, shifted, b.constant(-1.0, FLOAT))
    counts = number(b("And", candidate, b("Greater", "gate", b.constant(attrs["threshold"], FLOAT))))
    if attrs["count"] >= 0 or attrs["ratio"] >= 0:
        length = b.length("gate", 1)
        room = b("Sub", b("Sub", length, body_gone(b, length, attrs)), number(protected))
        if attrs["count"] < 0:
            own = number(real)
            left = b("Sub", own, body_gone(b, own, attrs))
            room = b("Min", room, b("Sub", left, number(b("And", protected, real))))
        counts = b("Min", counts, b("Max", room, b.constant(0)))
    return [score, b.cast(counts, INT32)]


def body_gone(b: Body, length: str, attrs: dict[str, Any]) -> str:
    """How many of `length` int64 tokens go: `count`, or floor(length * ratio)."""
    if attrs["count"] >= 0:
        return b.constant([attrs["count"]])
    share = fraction(attrs["ratio"])
    return b("Div", b("Mul", length, b.constant([share.numerator])), b.constant([share.denominator]))


def _budget_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [tuple(shapes[0]), (shapes[0][0],)]


ENDS = (Attr("prefix", 0), Attr("suffix", 0), Attr("last", 0))

GATE = OpDef(
    name="delete_gate",
    summary="A learned gate for each token, from k (delete) to 0 (keep).",
    inputs=("x", "weight", "bias", "valid?", "ids?", "special?"),
    outputs=("gate", "size"),
    attrs=(Attr("k", -30.0), Attr("norm", "rms"), Attr("eps", 1e-6), *ENDS),
    reference=delete_gate,
    shapes=lambda shapes, attrs: [tuple(shapes[0][:2])] * 2,
    dtypes=lambda dtypes, attrs: ["float32"] * 2,
    body=_gate_body,
    work=lambda shapes, attrs: 6 * numel(shapes[0]),
    source="Kallini et al., MrT5, ICLR 2025",
)
BUDGET = OpDef(
    name="gate_budget",
    summary="Scores of the tokens that a gate may delete, and how many of each sample's stay.",
    inputs=("gate", "valid?", "ids?", "special?"),
    outputs=("score", "counts"),
    attrs=(Attr("threshold", -15.0), Attr("k", -30.0), Attr("count", -1), Attr("ratio", -1.0), *ENDS),
    reference=gate_budget,
    shapes=_budget_shapes,
    dtypes=lambda dtypes, attrs: ["float32", "int32"],
    body=_budget_body,
    work=lambda shapes, attrs: 4 * numel(shapes[0]),
    chooses=True,
)
