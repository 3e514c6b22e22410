"""Which part of a model one call of the backend compiles: the whole, or one of the pieces between graph
breaks."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

MEMORY = 64
"""torch.compile calls remembered at a time."""


@dataclass
class Call:
    """What is known about one model under one torch.compile call, over all the graphs it has led to."""

    options: Any  # kept alive, so that its id stays its own
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


_calls: OrderedDict[tuple[int, CodeType | None], Call] = OrderedDict()


def fragment_of(gm: torch.fx.GraphModule, options: Any) -> Fragment:
    """Where `gm` stands in its model. `options` is the dict given to torch.compile; it and the outermost
    compiled function tell the graphs of different models apart."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    code, root = _code_and_root()
    # The model has gone by when its outermost function ends with this graph.
    is_last = not broken and code is root
    why = f"graph break: {getattr(reason, 'reason', '')}" if broken else "it comes after a graph break"
    return Fragment(_call(options, root), is_last, " ".join(why.split())[:160])


def _call(options: Any, root: CodeType | None) -> Call:
    key = (id(options), root)
    call = _calls.get(key)
    if call is None:
        call = _calls[key] = Call(options)
        while len(_calls) > MEMORY:
            _calls.popitem(last=False)
    return call


def _code_and_root() -> tuple[CodeType | None, CodeType | None]:
    """(the user's code that is being compiled, the outermost compiled code that is running): the same object
    when the model's own function is being compiled, from its start or from a graph break on."""
    from torch._dynamo.convert_frame import orig_code_map
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = _original(InstructionTranslator.current_tx().output.root_tx.f_code)
    except (AttributeError, LookupError):
        return None, None  # called by hand, outside Dynamo
    root = code
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if frame.f_code in orig_code_map:
            root = _original(orig_code_map[frame.f_code])
        frame = frame.f_back
    return code, root


def _original(code: CodeType) -> CodeType:
    """What the user wrote, for the code of a function that Dynamo made to continue after a graph break."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    metadata = ContinueExecutionCache.generated_code_metadata
    while code in metadata and metadata[code].code is not code:
        code = metadata[code].code
    return code
