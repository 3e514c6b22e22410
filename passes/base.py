"""What a pass is: a name, typed options, whether it preserves the function, and `run`.

A pass is one class in one file. It reads and edits a `Graph`, never prints, and knows no other pass. The
manager (`manager.py`) copies, verifies, times and costs around it.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from .errors import PipelineError
from .ir.graph import Graph
from .lowering import Table
from .options import format_value, make_options

if TYPE_CHECKING:
    from .parts import Parts, PartsPlan
    from .tunable import Knob

# Modules of this package whose import registers passes; read on the first look-up so that
# `import elision.passes` stays light. A new pass is one row.
BUILTIN: tuple[str, ...] = (
    "token_merge",
    "quantize",
    "quantize_rows",
    "onnx.passes",
    "incremental",
    "window",
    "token_drop",
    "token_gate",
    "segment_merge",
    "key_scores",
    "lower",
    "head",
    "keep_rows",
    "skip_layers",
    "taps",
    "extra_embeddings",
    "image_ids",
    "dynamic_vocab",
)

_REGISTRY: dict[str, type[Pass]] = {}

Arrays = list[np.ndarray | None]


@dataclass(frozen=True)
class NoOptions:
    """The options of a pass that has none."""


@dataclass
class NewSignature:
    """A graph that takes other inputs than before, and how to compare the two all the same.

    `before`: arrays for the inputs of the graph that the pass was given; `after`: arrays for those of its result,
    on which output i must equal output `outputs[i]` of the former (its last rows, where `last_rows` and it had fewer).
    None without example inputs: then nothing is compared. `added`: where the pass has done no more than add inputs
    (or none, and the outputs are others), arrays for those by name. `expected`: from the outputs that `outputs` names
    to what the new ones must be, None for one that has no counterpart."""

    before: list[Any] | None = None
    after: list[Any] | None = None
    outputs: list[int] = field(default_factory=list)
    last_rows: bool = False
    added: dict[str, Any] | None = None
    expected: Callable[[Arrays], Arrays] | None = None

    def expect(self, found: Sequence[np.ndarray | None]) -> Arrays:
        """What the new outputs must be, from those of the graph before; None, or too few, where that is not known."""
        picked = [found[i] if i < len(found) else None for i in self.outputs]
        return picked if self.expected is None else self.expected(picked)


def same_examples(
    context: PassContext, outputs: int, added: Mapping[str, np.ndarray] | None = None
) -> NewSignature:
    """The signature of a graph that runs on the examples as they are and `added`, behind them; nothing is compared
    where there are none."""
    given = None if context.example_inputs is None else [as_array(item) for item in context.example_inputs]
    if given is None or any(array is None for array in given):
        return NewSignature()
    more = dict(added or {})
    return NewSignature(given, [*given, *more.values()], list(range(outputs)), added=more)


@dataclass
class Outcome:
    """What a pass did. `changed` is False only if the graph is exactly as it was.

    `declined` is a sentence that says why the pass left the graph alone although it could have changed it;
    `statistics` are counts (how often each thing fired); `extra` is for callers, kept out of reports; `signature`
    is set when the result takes other inputs.
    """

    changed: bool = False
    notes: list[str] = field(default_factory=list)
    statistics: dict[str, int | float | str] = field(default_factory=dict)
    declined: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    signature: NewSignature | None = None


@dataclass(frozen=True)
class PassContext:
    """What a pass may ask of its surroundings.

    `force`: apply even where no saving is expected. `target`: what will run the graph, "torch" or
    "onnxruntime". `example_inputs`: tensors or arrays in the order of `graph.inputs`. `want_map`: also put
    out the composed token map. `samples`: real inputs to calibrate on, each like `example_inputs`. `formats`: the
    quantized weights of the file that the model was loaded from (`passes.formats.SourceFormats`). `read_arrays`: gives
    the arrays of a safetensors file by name, for passes that need trained weights of their own. `added`: examples for
    inputs that passes add (`Pass.new_inputs`), by name.
    """

    force: bool = False
    target: str = "torch"
    example_inputs: Sequence[Any] | None = None
    want_map: bool = False
    table: Table | None = None
    samples: Sequence[Sequence[Any]] | None = None
    formats: Any = None
    read_arrays: Callable[[str], Mapping[str, np.ndarray]] | None = None
    added: Mapping[str, np.ndarray] = field(default_factory=dict)

    def example_of(self, name: str, dtype: str, shape: Sequence[int | None]) -> np.ndarray | None:
        """The example for the input `name` that a pass adds, None where none was given; a length None is free.

        Raises PipelineError where its type or shape does not fit."""
        array = self.added.get(name)
        if array is None:
            return None
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
        if array.dtype.name != dtype or not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise PipelineError(
                f"example input {name!r} is {array.dtype.name} {list(array.shape)}, the new input is {dtype} [{wanted}]"
            )
        return array


def as_array(item: Any) -> Any:
    """An example, a tensor or an array, as an array; None for what has no data. bfloat16 comes as float32."""
    if hasattr(item, "fake_mode"):
        return None
    if hasattr(item, "detach"):
        item = item.detach().cpu()
        item = item.float() if str(item.dtype) == "torch.bfloat16" else item
        return item.numpy()
    return item if isinstance(item, np.ndarray) else None


def numpy_dtype(name: str) -> np.dtype:
    """A value's dtype as numpy's; bfloat16 as ml_dtypes has it."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Pass(abc.ABC):
    """Base of every pass. Keyword arguments are checked against `Options`, a frozen dataclass.

    Raises PipelineError for an unknown option, a wrong type or a value out of range.
    """

    name: ClassVar[str] = ""
    # True: the graph computes the same function afterwards. A pass that some options make lossy says so of itself.
    exact: bool = False
    # Facts of `order.FACTS` that must not hold where it changes a graph.
    before: ClassVar[tuple[str, ...]] = ()
    reduces: ClassVar[bool] = False  # True: pointless unless the estimated cost falls; see manager.py
    summary: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions

    def __init__(self, **options: Any) -> None:
        self.options: Any = make_options(self.name, self.Options, options)
        self.given: tuple[str, ...] = tuple(options)  # what the text form prints back

    def with_options(self, **changes: Any) -> Pass:
        """The same pass with other options, given as if they stood in its text."""
        given = {name: getattr(self.options, name) for name in self.given}
        return type(self)(**{**given, **changes})

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """The options that a search may set on `graph`, where those in `given` are said; none by default.

        Raises Refused or NothingMatched where the pass does not apply."""
        return []

    @abc.abstractmethod
    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Edit `graph` in place. Raises Refused or NothingMatched with a sentence that says why."""

    def new_inputs(self) -> tuple[str, ...]:
        """The names of inputs that the pass adds and that a caller may give examples for."""
        return ()

    def for_parts(self, parts: Parts) -> PartsPlan | None:
        """What runs on which part of a model that comes in parts; None: this pass, on every part that it fits."""
        return None

    def key(self) -> str:
        """The pass and all its options, defaults too: equal keys do the same to the same graph."""
        kind = type(self)
        values = " ".join(
            f"{f.name}={format_value(getattr(self.options, f.name))}" for f in fields(self.options)
        )
        return f"{kind.__module__}.{kind.__qualname__}:{self.name}{{{values}}}"

    def __str__(self) -> str:
        shown = " ".join(f"{name}={format_value(getattr(self.options, name))}" for name in self.given)
        return f"{self.name}{{{shown}}}" if shown else self.name

    def __repr__(self) -> str:
        return f"<pass {self}>"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.options == self.options  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.key())


PassClass = TypeVar("PassClass", bound=type[Pass])


def register(cls: PassClass) -> PassClass:
    """Class decorator: make the pass known to pipeline texts under its `name`.

    Registering the same class again (a notebook cell run twice) replaces it; two different classes with one
    name are a PipelineError.
    """
    known = _REGISTRY.get(cls.name)
    if not cls.name:
        raise PipelineError(f"pass {cls.__qualname__} has no name")
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PipelineError(
            f"two passes are called {cls.name!r}: {known.__module__}.{known.__qualname__} "
            f"and {cls.__module__}.{cls.__qualname__}"
        )
    _REGISTRY[cls.name] = cls
    return cls


def known_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, in alphabetical order."""
    for module in BUILTIN:
        importlib.import_module(f".{module}", __package__)
    return dict(sorted(_REGISTRY.items()))
