"""Which part of a model one call of the backend compiles: the whole, or one of the pieces between graph
breaks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch


@dataclass
class Call:
    """What is known about one torch.compile call, over all the graphs it has led to."""

    any_matched: bool = False
    complained: bool = False


@dataclass
class Fragment:
    """One graph of a model. `is_last`: nothing of the model comes after it; `why`: what cut it off."""

    call: Call = field(repr=False)
    is_last: bool
    why: str

    @property
    def any_matched(self) -> bool:
        return self.call.any_matched

    def matched(self) -> None:
        self.call.any_matched = True

    def first_complaint(self) -> bool:
        """True once per call."""
        first, self.call.complained = not self.call.complained, True
        return first


_calls: WeakKeyDictionary[Any, Call] = WeakKeyDictionary()


def fragment_of(gm: torch.fx.GraphModule) -> Fragment:
    """Where `gm`, the graph that Dynamo compiles at this moment, stands in its model."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    code, root, function = _surroundings()
    # The model has gone by when its outermost function ends with this graph.
    is_last = not broken and code is root
    why = "it comes after a graph break"
    if broken:
        why = "graph break: " + str(getattr(reason, "reason", "")).strip().split("\n")[0]
    return Fragment(_call(function), is_last, why[:160])


def _call(function: Any) -> Call:
    """The record of a torch.compile call, known by the function that it wraps."""
    try:
        return _calls.setdefault(function, Call())
    except TypeError:  # not hashable, or no weak references to it
        return Call()


def _surroundings() -> tuple[CodeType | None, CodeType | None, Any]:
    """(the user's code that is being compiled, the outermost compiled code that is running, what
    torch.compile wraps). The first two are one object when the model's own function is being compiled, from
    its start or from a graph break on."""
    from torch._dynamo.convert_frame import orig_code_map
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        running: Any = InstructionTranslator.current_tx()
        code = _original(running.output.root_tx.f_code)
    except (AttributeError, LookupError):
        return None, None, None  # called by hand, outside Dynamo
    root = code
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            return code, root, frame.f_locals.get("fn")
        if frame.f_code in orig_code_map:
            root = _original(orig_code_map[frame.f_code])
        frame = frame.f_back
    return code, root, None


def _original(code: CodeType) -> CodeType:
    """What the user wrote, for the code of a function that Dynamo made to continue after a graph break."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    metadata = ContinueExecutionCache.generated_code_metadata
    while code in metadata and metadata[code].code is not code:
        code = metadata[code].code
    return code
