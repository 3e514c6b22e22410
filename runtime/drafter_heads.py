"""Heads on the model's own hidden state as drafter (Medusa, Cai et al., ICML 2024).

Head d guesses the token d + 1 places after the last committed one, from the hidden state which that one was chosen
from. It needs a step graph that puts hidden states out: the pass `taps`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError, ModelFileError
from .draft_tree import Proposal
from .drafters import Draft, Guess, Verified
from .lm_source import require
from .lm_step import largest_of
from .tensors import read_tensors

WIDTH = 6
"""Guesses of one head."""

# Guesses of one rank do better or worse by how sure the head is: they are counted apart from these chances on.
_CERTAIN = (0.05, 0.2, 0.5, 0.8)

_TENSOR = re.compile(r"(?:[A-Za-z_.]+\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight|bias)")


@dataclass(frozen=True)
class Head:
    """One head: scores = weight h + bias, where h went through the blocks, each h + silu(matrix h + its bias).

    weight: float32 [V, H]; bias: float32 [V]; blocks: (float32 [H, H], float32 [H] or None) each. Raises ElisionError
    where they do not fit each other."""

    weight: np.ndarray
    bias: np.ndarray | None = None
    blocks: tuple[tuple[np.ndarray, np.ndarray | None], ...] = ()

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ElisionError(f"a head's weight is [V, H], not {list(self.weight.shape)}")
        rows, width = self.weight.shape
        parts = [("bias", self.bias, (rows,))]
        for number, (matrix, bias) in enumerate(self.blocks):
            parts += [(f"block {number}", matrix, (width, width)), (f"block {number}'s bias", bias, (width,))]
        for name, array, shape in parts:
            if array is not None and array.shape != shape:
                raise ElisionError(
                    f"{name} of a head [{rows}, {width}] is {list(array.shape)}, not {list(shape)}"
                )

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [H] -> float32 [V]."""
        for matrix, bias in self.blocks:
            x = matrix @ hidden if bias is None else matrix @ hidden + bias
            hidden = hidden + x / (1 + np.exp(np.minimum(-x, 80)))
        scores = self.weight @ hidden
        return scores if self.bias is None else scores + self.bias


Scores = Callable[[np.ndarray], np.ndarray]
"""A hidden state float32 [H] -> scores [V]."""


class Heads:
    """heads: the first guesses the token after the next one, and so on: a `Head`, (weight, bias or None), or any
    function of the hidden state. vocabulary: ids of the model; what heads score beyond them is padding. width: guesses
    of each head."""

    kind = Proposal.DETERMINISTIC
    costly = True
    name = "heads"

    def __init__(
        self,
        heads: Sequence[Scores | tuple[np.ndarray, np.ndarray | None]],
        vocabulary: int | None = None,
        width: int = WIDTH,
    ) -> None:
        if not heads:
            raise ElisionError("a drafter of heads needs one at least")
        self.heads: list[Scores] = [
            Head(head[0], head[1]) if isinstance(head, tuple) else head for head in heads
        ]
        self.vocabulary, self.width = vocabulary, width
        self._seconds = 0.0

    def begin(self, ids: Sequence[int], room: int) -> Draft:
        return _HeadsDraft(self)

    def seconds(self) -> float:
        return self._seconds

    def guesses(self, depth: int, hidden: np.ndarray) -> list[Guess]:
        """What head `depth` guesses. Raises ElisionError for a hidden state of another width."""
        begun = time.perf_counter()
        head = self.heads[depth]
        if isinstance(head, Head) and hidden.shape != head.weight.shape[1:]:
            raise ElisionError(
                f"head {depth} reads {head.weight.shape[1]} numbers, the model's hidden state has {hidden.size}"
            )
        scores = np.asarray(head(hidden), np.float32)[: self.vocabulary]
        best = largest_of(scores[None], self.width)
        with np.errstate(over="ignore", invalid="ignore"):
            chances = np.exp(best.values[0] - best.values[0, 0]) / np.exp(scores - best.values[0, 0]).sum()
        chances = np.clip(np.nan_to_num(chances), 0.001, 0.95)
        found = []
        for rank, (token, chance) in enumerate(zip(best.ids[0].tolist(), chances.tolist())):
            certain = sum(chance > limit for limit in _CERTAIN)
            found.append(Guess(token, ("heads", depth, rank, certain), chance, self.name))
        spent = time.perf_counter() - begun
        self._seconds = spent if self._seconds == 0 else 0.9 * self._seconds + 0.1 * spent
        return found


class _HeadsDraft:
    """A state: how many tokens come after the last committed one."""

    def __init__(self, shared: Heads) -> None:
        self._shared = shared
        self._hidden: np.ndarray | None = None  # none before the first verification
        self._known: dict[int, list[Guess]] = {}

    def root(self) -> int:
        return 0

    def step(self, state: int, token: int) -> int:
        return state + 1

    def expand(self, states: Sequence[int]) -> list[list[Guess]]:
        return [self._guesses(state) for state in states]

    def _guesses(self, depth: int) -> list[Guess]:
        if self._hidden is None or depth >= len(self._shared.heads):
            return []
        if depth not in self._known:
            self._known[depth] = self._shared.guesses(depth, self._hidden)
        return self._known[depth]

    def observe(self, seen: Verified) -> None:
        self._known, self._hidden = {}, None
        if seen.hidden is not None and seen.new:
            # A copy: the array is good until the model's next call only.
            self._hidden = np.array(seen.hidden[seen.path[len(seen.new) - 1]], np.float32)

    def close(self) -> None:
        self._hidden, self._known = None, {}


# ---- files ---------------------------------------------------------------------------------------------
def load_heads(file: str | Path, *, width: int | None = None, vocabulary: int | None = None) -> list[Head]:
    """The heads of a .safetensors file, as training scripts for Medusa name them.

    Of head i with n blocks: `i.j.linear.weight` [H, H] and `i.j.linear.bias` [H] (may be absent) for each block j < n,
    `i.n.weight` [V, H] and `i.n.bias` [V] (may be absent); one prefix before all, as `medusa_head.`, does not matter.
    Numbers are float32, float16 or bfloat16. width, vocabulary: H and V of the model; heads may score more ids than
    that. Raises ElisionError for a file that is missing, lacks a tensor or has one that does not fit."""
    path = Path(file)
    found: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for name, array in read_tensors(path).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelFileError(
                f"{path}: {name!r} is no tensor of a head (0.0.linear.weight, 0.1.weight, ...)"
            )
        layers = found.setdefault(int(match[1]), {})
        layers.setdefault(int(match[2]), {})[match[3]] = array
    if sorted(found) != list(range(len(found))) or not found:
        raise ModelFileError(f"{path}: has heads {sorted(found)}, not 0, 1, ...")
    heads = []
    for number in range(len(found)):
        try:
            heads.append(_head(number, found[number], width, vocabulary))
        except ElisionError as error:
            raise ModelFileError(f"{path}: head {number}: {error}") from None
    return heads


def _head(
    number: int, layers: dict[int, dict[str, np.ndarray]], width: int | None, vocabulary: int | None
) -> Head:
    last = max(layers)
    blocks = []
    for place in range(last):
        part = layers.get(place, {})
        if "linear.weight" not in part or "weight" in part or "bias" in part:
            raise ElisionError(f"{number}.{place}.linear.weight is missing, or stands beside others")
        blocks.append((part["linear.weight"], part.get("linear.bias")))
    part = layers[last]
    if "weight" not in part or "linear.weight" in part or "linear.bias" in part:
        raise ElisionError(f"{number}.{last + ('linear.weight' in part)}.weight [V, H] is missing")
    head = Head(part["weight"], part.get("bias"), tuple(blocks))
    rows, across = head.weight.shape
    if width is not None and across != width:
        raise ElisionError(f"it reads {across} numbers, the model's hidden state has {width}")
    if vocabulary is not None and rows < vocabulary:
        raise ElisionError(f"it scores {rows} ids, the model has {vocabulary}")
    return head


def save_heads(heads: Sequence[Head], file: str | Path) -> None:
    """Writes what `load_heads` reads."""
    tensors: dict[str, Any] = {}
    for number, head in enumerate(heads):
        last = len(head.blocks)
        for place, (matrix, bias) in enumerate(head.blocks):
            tensors[f"{number}.{place}.linear.weight"] = matrix
            tensors[f"{number}.{place}.linear.bias"] = bias
        tensors[f"{number}.{last}.weight"], tensors[f"{number}.{last}.bias"] = head.weight, head.bias
    require("safetensors", "writing heads")
    from safetensors.numpy import save_file

    held = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    save_file(held, str(file))
