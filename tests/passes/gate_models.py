"""Small encoders and encoder-decoders with a gate before one of their blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from elision.passes.base import Outcome, PassContext
from elision.passes.ir.fx import FxGraph
from elision.passes.token_gate import TokenGate
from torch import Tensor, nn

from tests.zoo.export import export, quiet
from tests.zoo.model import Built, Call, randomise

WIDTH = 32
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-3}


@cache
def t5() -> Call:
    """An encoder-decoder of T5's shape: ids, mask, decoder ids -> logits [B, M, V]."""
    torch.manual_seed(5)
    config = hf.T5Config(
        **{"vocab_size": 100, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
        **{"num_decoder_layers": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0, "use_cache": False},
    )
    module = Call(
        hf.T5ForConditionalGeneration(config), "input_ids attention_mask decoder_input_ids", "logits"
    )
    randomise(module, 5)
    return module.eval()


def ids(lengths: tuple[int, ...], count: int, seed: int = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask [B, count]; the samples do not depend on the padding or on each other."""
    made, mask = torch.zeros(len(lengths), count, dtype=torch.int64), torch.zeros(len(lengths), count)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        drawn = torch.randint(3, 97, (length,), generator=generator)
        place = slice(count - length, count) if left else slice(0, length)
        made[row, place], mask[row, place] = drawn, 1
    return made, mask.long()


def weights(seed: int = 0, shift: float = 0.0, width: int = WIDTH) -> dict[str, Tensor]:
    """A gate that has made up its mind."""
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(width, generator=generator), "bias": torch.tensor([shift])}


def args_of(lengths: tuple[int, ...] = (14, 9, 11), count: int = 14, **more: Any) -> tuple[Tensor, ...]:
    """A call of `t5`."""
    given, mask = ids(lengths, count, **more)
    return given, mask, ids((6,) * len(lengths), 6, seed=7)[0]


@cache
def t5_graph(dynamic: bool = True) -> FxGraph:
    """The graph of `t5`, batch and length of the source dynamic."""
    with quiet():
        batch, source = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("source", min=4, max=512)
        shapes = ({0: batch, 1: source}, {0: batch, 1: source}, {0: batch}) if dynamic else None
        return FxGraph.from_export(export(Built(t5(), args_of()), shapes))


def gated(graph: FxGraph, context: PassContext | None = None, **options: Any) -> tuple[FxGraph, Outcome]:
    """A copy of the graph with a gate, verified."""
    made = graph.copy()
    assert isinstance(made, FxGraph)
    outcome = TokenGate(**options).run(made, context or PassContext())
    made.verify()
    return made, outcome


def run(graph: FxGraph | nn.Module, args: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        call: Any = graph.run if isinstance(graph, FxGraph) else graph
        return call(*args)


@cache
def kept(capacity: float) -> FxGraph:
    """`t5` with a hard gate before block 1, any batch and length."""
    return gated(t5_graph(), layer=1, capacity=capacity, arrays=weights(3))[0]
