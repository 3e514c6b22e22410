"""The additive mask of a raised attention: what the steps between scores and softmax add up to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from .fx_raise_steps import Miss, Step, same
from .graph import Op, Shape, Value, product

if TYPE_CHECKING:
    from .fx import FxGraph

aten = torch.ops.aten

Memo = dict[Any, Value]
"""Masks already built: layers that add the same values share them."""

# Adding this much to a logit is the same as putting it in its place, also in a row that is masked as a whole.
_REPLACES = -1e8


class Emit(Protocol):
    def __call__(
        self, target: Any, inputs: list[Value | None], attrs: dict[str, Any] | None = None
    ) -> Value: ...


class Mask:
    """Replays the steps on a mask in place of the scores."""

    def __init__(self, graph: FxGraph, after: Op, dtype: str, memo: Memo) -> None:
        self.graph, self.cursor, self.dtype, self.memo = graph, after, dtype, memo

    def emit(self, target: Any, inputs: list[Value | None], attrs: dict[str, Any] | None = None) -> Value:
        """Insert one call behind the attention; a mask step that was made before is not made again."""
        made = self.graph.insert_call(target, inputs, attrs, after=self.cursor)
        self.cursor = made
        return made.output

    def _shared(self, target: Any, inputs: list[Value | None], attrs: dict[str, Any] | None = None) -> Value:
        key = (target, tuple(map(id, inputs)), repr(sorted((attrs or {}).items())))
        if key not in self.memo:
            self.memo[key] = self.emit(target, inputs, attrs)
        return self.memo[key]

    def plan(self, steps: list[Step], scores: Op, scale: float, lead: Shape) -> tuple[float, list[Step]]:
        """The scale and the factors for the queries; raises Miss before anything is emitted."""
        shape = scores.output.shape
        factors: list[Step] = []
        for step in steps:
            shape = step.op.output.shape if step.kind == "reshape" else shape
            if step.kind == "scale":
                scale *= step.number
            elif step.kind in ("multiply", "divide"):
                assert step.value is not None and step.value.shape is not None and shape is not None
                if step.value.rank > 0 and not same(shape[:-2], lead):
                    raise Miss(f"%{step.value.name} scales heads that are folded into the batch")
                factors.append(step)
            elif step.kind == "fill" and step.number > _REPLACES:
                raise Miss(
                    f"{step.op.target} (%{step.op.name}) fills in {step.number:g}, too little for a mask"
                )
        if not scale > 0:
            raise Miss(f"the scale is {scale:g}")
        return scale, factors

    def build(self, steps: list[Step], scores: Op, lead: Shape) -> Value | None:
        """The mask [.., n, m] in the dtype of the queries, None when there is none."""
        mask: Value | None = None
        shape = scores.output.shape
        assert shape is not None
        if len(scores.inputs) > 2 and scores.attrs.get("beta", 1):
            mask = scores.inputs[2]
            mask = self._times(mask, float(scores.attrs.get("beta", 1)))
        for step in steps:
            if step.kind == "reshape":
                assert step.op.output.shape is not None
                mask = self._reshaped(mask, shape, step.op.output.shape)
                shape = step.op.output.shape
            elif step.kind != "cast":
                mask = self._after(mask, step)
        if mask is None:
            return None
        mask = self._reshaped(mask, shape, (*lead, *shape[-2:]))
        assert mask is not None
        if mask.dtype != self.dtype:
            wanted = getattr(torch, self.dtype)
            own = getattr(torch, mask.dtype)
            if own.is_floating_point and torch.finfo(own).max > torch.finfo(wanted).max:
                # A narrower dtype must not turn the lowest number into -inf.
                mask = self._shared(aten.clamp.default, [mask], {"min": torch.finfo(wanted).min})
            mask = self._shared(aten.to.dtype, [mask], {"dtype": wanted})
        if mask.rank == 3:
            mask = self._shared(aten.unsqueeze.default, [mask], {"dim": 0})
        return mask

    def _times(self, mask: Value | None, factor: float) -> Value | None:
        if mask is None or factor == 1.0:
            return mask
        return self._shared(aten.mul.Tensor, [mask], {"other": factor})

    def _after(self, mask: Value | None, step: Step) -> Value | None:
        value = step.value
        if step.kind == "scale":
            return self._times(mask, step.number)
        if step.kind in ("multiply", "divide"):
            target = aten.mul.Tensor if step.kind == "multiply" else aten.div.Tensor
            return None if mask is None else self._shared(target, [mask, value])
        if step.kind == "add":
            return value if mask is None else self._shared(aten.add.Tensor, [mask, value])
        if step.kind == "subtract":
            if mask is None:
                return self._shared(aten.neg.default, [value])
            return self._shared(aten.sub.Tensor, [mask, value])
        assert step.kind == "fill"
        wanted = getattr(torch, mask.dtype if mask is not None else self.dtype)
        number = max(step.number, torch.finfo(wanted).min) if step.number > float("-inf") else step.number
        if mask is None:
            mask = self._shared(aten.zeros_like.default, [value], {"dtype": wanted})
        if not step.when:
            value = self._shared(aten.logical_not.default, [value])
        return self._shared(aten.masked_fill.Scalar, [mask, value], {"value": number})

    def _reshaped(self, mask: Value | None, before: Shape, after: Shape) -> Value | None:
        """A mask for scores of shape `before` as one for the same scores in shape `after`."""
        if mask is None or same(before, after):
            return mask
        assert mask.shape is not None
        own = mask.shape
        if all(same(d, 1) for d in own[:-2]):  # the same for all heads and samples
            tail = own[-2:]
            return (
                mask if len(own) <= 2 else self._shared(aten.reshape.default, [mask], {"shape": list(tail)})
            )
        seen = _unfolded_mask(mask, after)
        if seen is not None:
            return seen
        tail = own[-2:]
        whole = (*before[:-2], *tail)
        if not same(own, whole):
            mask = self._shared(aten.expand.default, [mask], {"size": list(whole)})
        if not same(product(before[:-2]), product(after[:-2])):
            raise Miss(f"the mask %{mask.name} does not follow the scores into {list(map(str, after))}")
        return self._shared(aten.reshape.default, [mask], {"shape": [*after[:-2], *tail]})


def _unfolded_mask(mask: Value, after: Shape) -> Value | None:
    """The mask before its heads were folded into the batch, where that can be seen."""
    value = mask
    for _ in range(4):
        op = value.producer
        if op is None or not op.inputs or op.inputs[0] is None or op.inputs[0].shape is None:
            return None
        source = op.inputs[0]
        assert source.shape is not None
        if op.kind == "reshape":
            assert mask.shape is not None
            wanted = (*after[:-2], *mask.shape[-2:])
            return source if same(source.shape, wanted) else None
        if op.kind != "tie":
            return None
        value = source
    return None
