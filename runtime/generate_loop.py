"""The decoding loop: prompts are read one after the other, running sequences take one step together.

A sequence is admitted as soon as there are slots for it and the batch has room, so that a long one holds nobody up.
With a draft (`speculation`), a step verifies a tree for each sequence; without, its last token alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .draft_tree import Tree
from .drafters import Verified
from .generate_sampling import Sampler
from .lm_images import Written
from .lm_step import (
    CHUNK,
    Largest,
    Rows,
    Slots,
    StepModel,
    chain,
    further,
    joined,
    largest_of,
    prompt_chunks,
    slots_of,
    tree_rows,
)
from .lm_text import Stream
from .speculation import SAMPLING, SequenceDraft, Speculation, Spent
from .verify import accepted_token, walk

HEADROOM = 63
"""Slots for the nodes of a tree besides a sequence's own, where the cache has them."""


@dataclass(eq=False)
class Running:
    """One sequence. limit: new ids at most; ends: ids that end it (they are kept in `new`, and give no text).

    written: where there are pictures in the prompt: their rows, and the positions of its tokens; `words` are its ids
    without those of pictures. quiet: nobody reads along, so that text is made at the end.
    finish: "eos", "stop" (a stop string), "length"
    (max_new_tokens) or "context" (no position is left)."""

    prompt: list[int]
    limit: int
    sampler: Sampler
    stream: Stream
    ends: frozenset[int] = frozenset()
    number: int = 0
    cut_by: str = "length"  # what `limit` was set by
    quiet: bool = False
    new: list[int] = field(default_factory=list)
    finish: str | None = None
    start: int = -1  # the first of its slots
    held: int = 0  # how many they are
    draft: SequenceDraft | None = None
    spent: Spent = field(default_factory=Spent)
    unsaid: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    written: Written | None = None

    @cached_property
    def words(self) -> list[int]:
        """The ids of the prompt that are those of words."""
        return self.prompt if self.written is None else self.written.words

    @cached_property
    def gone(self) -> int:
        """How many tokens of the prompt were left out: all behind them are so many positions further."""
        return 0 if self.written is None else int(self.written.places[-1]) + 1 - len(self.prompt)

    @property
    def slots(self) -> int:
        """How many it needs: the last new id is never fed."""
        return max(1, len(self.prompt) + self.limit - 1)

    @property
    def past(self) -> int:
        """Tokens before the last one."""
        return len(self.prompt) + len(self.new) - 1


def decode(
    model: StepModel,
    sequences: Sequence[Running],
    batch: int,
    chunk: int = CHUNK,
    speculation: Speculation | None = None,
) -> Iterator[tuple[Running, str]]:
    """Runs all sequences; yields (sequence, piece of text) whenever one has new ids, and once more at its end if text
    had been held back. Every sequence fits the cache when it is alone: whoever made them has checked that."""
    waiting, active, slots = deque(sequences), [], slots_of(model)
    spare = 0 if speculation is None else _headroom(sequences, batch, slots.total)
    try:
        while waiting or active:
            while waiting and len(active) < batch and _admit(waiting[0], slots, spare):
                one = waiting.popleft()
                _begin(model, one, chunk, speculation)
                active.append(one)
                if one.new:
                    yield one, _said(one)
            for one in [item for item in active if item.finish]:
                slots.give_back(one.start)
                _close(one)
            active = [item for item in active if not item.finish]
            if active:
                _round(model, active, speculation)
                for one in active:
                    yield one, _said(one)
    finally:
        for one in active:
            _close(one)


def _said(one: Running) -> str:
    text = "".join(one.pieces)
    one.pieces.clear()
    return text


def _headroom(sequences: Sequence[Running], batch: int, total: int) -> int:
    """How many slots besides its own each sequence can have, so that as many run together as without any."""
    longest = sorted((one.slots for one in sequences), reverse=True)[:batch]
    return max(0, min(HEADROOM, (total - sum(longest)) // max(1, len(longest))))


def _admit(one: Running, slots: Slots, spare: int) -> bool:
    """Gives a sequence its slots, with room for a tree where that can be had."""
    for held in dict.fromkeys((one.slots + spare, one.slots)):
        start = slots.take(held)
        if start is not None:
            one.start, one.held = start, held
            return True
    return False


def _begin(model: StepModel, one: Running, chunk: int, speculation: Speculation | None) -> None:
    """Reads the prompt and commits the first new id."""
    one.begun = time.perf_counter()
    if one.limit < 1:
        one.first = one.ended = one.begun
        one.finish = one.cut_by
        return
    places = None
    if one.written is not None:
        model.show(one.written.rows)
        places = one.written.places
    *earlier, rows = prompt_chunks(one.start, one.prompt, chunk, places)
    for part in earlier:
        model.largest(part, [len(part) - 1])
    last = [len(rows) - 1]
    if one.sampler.plain:
        token = one.sampler.best(model.largest(rows, last), 0)
    else:
        token = one.sampler.choose(model.step(rows, last)[0], one.words, 0, last=one.limit == 1)
    _commit(one, token)
    _settle(one)
    if speculation is not None and not one.finish:
        seed = (one.sampler.how.seed, one.number)
        one.draft = speculation.begin([*one.words, *one.new], one.limit - len(one.new), seed)


def _close(one: Running) -> None:
    if one.draft is not None:
        one.draft.close()
        one.draft = None


def _round(model: StepModel, active: list[Running], speculation: Speculation | None) -> None:
    """One call of the model for all, and what each of them commits."""
    begun = time.perf_counter()
    trees = [_tree(one, len(active)) for one in active]
    drafted = time.perf_counter()
    rows = joined([_rows(one, tree) for one, tree in zip(active, trees)])
    ready = time.perf_counter()
    scores = None if all(one.sampler.plain for one in active) else model.step(rows)
    found = model.largest(rows) if scores is None else None
    hidden = getattr(model, "hidden", None) if found is None else found.hidden
    done = time.perf_counter()
    places = np.cumsum([0, *map(len, trees)]).tolist()
    if scores is not None and any(one.draft is not None for one in active):
        found = largest_of(scores, model.largest_k)
    seen = []
    for one, tree, low, high in zip(active, trees, places, places[1:]):
        part = None if found is None else Largest(found.values[low:high], found.ids[low:high])
        path, new = _verify(one, tree, part, None if scores is None else scores[low:high], speculation)
        _compact(model, one, path, len(new))
        seen.append((path, new, part))
    verified = time.perf_counter()
    count = places[-1]
    for one, tree, (path, new, part), low, high in zip(active, trees, seen, places, places[1:]):
        share, spent = len(tree) / count, one.spent
        learned = time.perf_counter()
        if one.draft is not None and part is not None:
            drafting = (drafted - begun) * share
            states = None if hidden is None else hidden[low:high]
            one.draft.observe(
                Verified(tree, part.ids, path, new, states), (verified - begun) * share, drafting
            )
        spent.rounds += 1
        spent.rows += len(tree)
        spent.tokens += len(new)
        spent.draft += (drafted - begun) * share + (time.perf_counter() - learned)
        spent.verify += (done - ready) * share
        spent.rest += (ready - drafted + verified - done) * share
        if len(tree) > 1:
            for node in tree.confirmed(path, new)[1:]:
                origin = tree.origins[node]
                spent.origins[origin] = spent.origins.get(origin, 0) + 1
        if spent.trace is not None:
            spent.trace.append(
                tree.to_json()
                | {
                    "accepted": path,
                    "new": new,
                    "draft": (drafted - begun) * share,
                    "verify": (done - ready) * share,
                }
            )


def _tree(one: Running, sequences: int) -> Tree:
    """What the sequence verifies: never more than its slots hold, never deeper than it may still write."""
    root = one.new[-1]
    if one.draft is None:
        return Tree.of(root)
    return one.draft.propose(root, one.past, one.held - one.past, one.limit - len(one.new) - 1, sequences)


def _rows(one: Running, tree: Tree) -> Rows:
    if len(tree) == 1:
        return further(chain(one.start, one.past, tree.tokens), one.gone)
    return further(tree_rows(one.start, one.past, tree.tokens, tree.parents, tree.depths), one.gone)


def _verify(
    one: Running, tree: Tree, best: Largest | None, scores: np.ndarray | None, speculation: Speculation | None
) -> tuple[list[int], list[int]]:
    sampler = one.sampler
    history, known = [*one.words, *one.new], len(one.new)
    rejecting = speculation is not None and speculation.mode == SAMPLING and not sampler.how.greedy

    def choose(node: int, tokens: Sequence[int]) -> int:
        if scores is None:
            assert best is not None
            return sampler.best(best, node)
        new = known + len(tokens)
        text, last = [*history, *tokens], new + 1 >= one.limit
        if not rejecting:
            return sampler.choose(scores[node], text, new, last=last)
        p = sampler.dense(scores[node], text, new, last=last)
        return accepted_token(p, tree, node, sampler.random)

    found = walk(tree, choose, lambda token: _commit(one, token))
    _settle(one)
    return found


def _commit(one: Running, token: int) -> bool:
    """Takes a new id; whether the text goes on. Text is made at once only where stop strings decide."""
    one.new.append(token)
    if token in one.ends:
        one.finish = "eos"
    else:
        one.unsaid.append(token)
        if one.stream.watching:
            _say(one)
        if one.stream.stopped:
            one.finish = "stop"
        elif len(one.new) >= one.limit:
            one.finish = one.cut_by
    return one.finish is None


def _say(one: Running) -> None:
    """The text of ids that gave none yet."""
    if one.unsaid:
        one.pieces.append(one.stream.push(*one.unsaid))
        one.unsaid.clear()


def _settle(one: Running) -> None:
    """After some commits: their text, and all that was held back where this was the end."""
    one.ended = time.perf_counter()
    one.first = one.first or one.ended
    if not one.quiet or one.finish:
        _say(one)
    if one.finish in ("eos", one.cut_by):
        piece = one.stream.finish()
        if one.finish != "eos" and one.stream.stopped:
            one.finish = "stop"
        one.pieces.append(piece)


def _compact(model: StepModel, one: Running, path: list[int], new: int) -> None:
    """The accepted nodes' keys and values into the slots that follow the past; the others are overwritten later."""
    if one.finish is None and path != list(range(len(path))):
        base = one.start + one.past - new  # where the root lies: `past` counts the new tokens already
        nodes = np.asarray(path)
        model.move(base + nodes, base + np.arange(len(path)))
