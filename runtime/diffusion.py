"""`elision.DiffusionGenerator`: text from a masked diffusion language model that computes a window of its canvas.

generator = elision.DiffusionGenerator("path/to/model")
print(generator.generate("def main():", max_new_tokens=256, window=128, active=32, refresh=32).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from .canvas_buckets import POSITIONS, ROWS, Bucketed
from .canvas_facts import CanvasFacts
from .canvas_plan import canvas_ids
from .canvas_policies import POLICIES, Policy, Window, policy_named
from .canvas_result import Event, Result
from .canvas_rules import Draw, Rule
from .canvas_sampler import Sampler
from .canvas_step import CanvasModel
from .generate import prompts_of
from .lm_text import Text, encoded

OPTIONS = ("window", "active", "refresh", "block", "form")
"""Of policies; each has some of them."""


@dataclass(frozen=True)
class How:
    """How a canvas is decided. policy: "window", "prefix", "dual", "delayed", "block", "none" or a
    `canvas_policies.Policy`; window, active, refresh, block, form: its options, None for its own defaults. rule,
    schedule, threshold, eos_rule, position_temperature: see `canvas_rules.Rule`; temperature, top_k, top_p, noise: see
    `canvas_rules.Draw`; steps, guidance, early_stop, seed: see `canvas_sampler.Sampler`."""

    policy: Any = "window"
    window: int | None = None
    active: int | None = None
    refresh: int | None = None
    block: int | None = None
    form: str | None = None
    steps: int | None = None
    rule: str = "confidence"
    schedule: str = "even"
    threshold: float = 0.9
    position_temperature: float = 0.0
    eos_rule: str = "free"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    noise: str = "softmax"
    guidance: float = 0.0
    early_stop: bool = False
    seed: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> How:
        """From options of `DiffusionGenerator.generate`; what is no field of it is for others."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in known})

    def parts(self) -> tuple[Policy, Rule, Draw]:
        """Raises ElisionError for what means nothing, numbers that the policy does not have among it."""
        rule = Rule(self.rule, self.schedule, self.threshold, self.position_temperature, self.eos_rule)
        draw = Draw(self.temperature, self.top_k, self.top_p, self.noise)
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        if not isinstance(self.policy, str):
            if given:
                raise ElisionError(f"{next(iter(given))} belongs into the policy that is given")
            return self.policy, rule, draw
        kind: Any = POLICIES.get(self.policy)
        for name in given:
            if kind is not None and name not in {one.name for one in fields(kind)}:
                raise ElisionError(f"the policy {self.policy} has no {name}")
        if kind is Window and "window" in given:
            # Who says how large the window is and no more means all else to fit into it.
            given.setdefault("active", min(Window.active, max(1, given["window"])))
        return policy_named(self.policy, **given), rule, draw

    def to_json(self) -> dict[str, Any]:
        policy = self.parts()[0]
        numbers = {name: getattr(policy, name) for name in OPTIONS if hasattr(policy, name)}
        told = {**asdict(self), "policy": policy.name, **numbers}
        return {name: value for name, value in told.items() if value is not None}


@dataclass
class DiffusionGeneration:
    """What came of one prompt.

    text: of the new tokens, up to the first that ends a text. token_ids: the new tokens, by position. prefill_seconds:
    until the first step was made, decode_seconds: from then to the last. steps, refreshes, token_computations,
    token_computations_full (what the full sampler computes in as many steps), refresh_seconds, step_seconds,
    rest_seconds: see `canvas_result.Result`. finish: "masks" (all are decided) or "eos" (cut by the early stop).
    result: with the whole canvas, and the trace where it was asked for."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    finish: str
    steps: int
    refreshes: int
    token_computations: int
    token_computations_full: int
    refresh_seconds: float
    step_seconds: float
    rest_seconds: float
    settings: dict[str, Any] = field(repr=False, default_factory=dict)
    result: Result = field(repr=False, default_factory=Result)

    def to_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "result"}


class DiffusionGenerator:
    """A masked diffusion language model that is ready to fill canvases.

    model: a folder in Hugging Face format of a model that transformers knows, an ONNX file from input_ids to logits
        with its config.json beside it, or a module that gives `.logits` for input_ids and has a `config`.
    mask: id of the mask token, shift: whether logits of a position decide the next one; both are read from the
    configuration where they are not given. bits, runtime, context, cache, threads, notify: as of `elision.Generator`.
    batch: canvases that take a step together. buckets: rows and positions of every call are rounded up to a few numbers
    (True, or (rows, positions) of which they are multiples), for a host that compiles for each shape.

    Raises ElisionError, one line, for what cannot be read, and for a model whose tokens meet in another way than by
    attention of all to all (a causal one, for example)."""

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        bits: int | None = None,
        runtime: str = "onnxruntime",
        context: int | None = None,
        mask: int | None = None,
        shift: bool | None = None,
        batch: int = 8,
        buckets: bool | tuple[int, int] = False,
        cache: bool = True,
        threads: int = 0,
        notify: Callable[[str], None] | None = None,
        **compile_options: Any,
    ) -> None:
        from .canvas_open import open_canvas

        if batch < 1:
            raise ElisionError(f"a batch has 1 canvas or more, not {batch}")
        opened = open_canvas(
            model, tokenizer=tokenizer, bits=bits, runtime=runtime, context=context, mask=mask, shift=shift,
            cache=cache, threads=threads, notify=notify or (lambda _step: None), **compile_options,
        )  # fmt: skip
        named = str(model) if isinstance(model, str) or hasattr(model, "__fspath__") else type(model).__name__
        running: CanvasModel = opened.model
        if buckets:
            sizes = (ROWS, POSITIONS) if buckets is True else buckets
            running = Bucketed(opened.model, *sizes)
            opened.settings["buckets"] = list(sizes)
        self._set(running, opened.facts, opened.tokenizer, {"model": named, **opened.settings}, batch)

    @classmethod
    def around(
        cls, model: CanvasModel, facts: CanvasFacts, tokenizer: Any = None, batch: int = 8
    ) -> DiffusionGenerator:
        """A generator around anything that computes canvases."""
        self = cls.__new__(cls)
        self._set(model, facts, tokenizer, {}, batch)
        return self

    def _set(
        self, model: CanvasModel, facts: CanvasFacts, tokenizer: Any, settings: dict[str, Any], batch: int
    ) -> None:
        self.model, self.facts, self.settings, self.batch = model, facts, settings, batch
        self.text = None if tokenizer is None else Text(tokenizer, facts.vocabulary)

    def generate(self, prompt: Any, max_new_tokens: int = 128, **options: Any) -> Any:
        """One DiffusionGeneration for a text or a list of ids; a list of them for a list of prompts.

        The canvas is the prompt and `max_new_tokens` masks behind it; masks in the prompt are filled in too. options:
        the fields of `How`; chat, system: as of `elision.Generator`; eos: ids that end a text in the place of the
        model's own; trace: keep what each step did. Raises ElisionError."""
        prompts, single = prompts_of(prompt)
        found = {
            number: one
            for number, _event, one in self.events(prompts, max_new_tokens, **options)
            if one is not None
        }
        results = [found[number] for number in range(len(prompts))]
        return results[0] if single else results

    def events(
        self, prompts: Sequence[Any], max_new_tokens: int = 128, **options: Any
    ) -> Iterator[tuple[int, Event, DiffusionGeneration | None]]:
        """(number of the prompt, what a step has decided, the whole once it is complete)."""
        canvases, sampler, settings = self.prepare(prompts, max_new_tokens, options)
        return self.run(canvases, sampler, settings, bool(options.get("trace")))

    def prepare(
        self, prompts: Sequence[Any], max_new_tokens: int, options: dict[str, Any]
    ) -> tuple[list[np.ndarray], Sampler, dict[str, Any]]:
        """The canvases, what decides them, and the settings that are told. Raises ElisionError."""
        others = {"chat", "system", "eos", "trace"}
        known = {one.name for one in fields(How)}
        unknown = sorted(set(options) - known - others)
        if unknown:
            raise ElisionError(
                f"{unknown[0]!r} is no option of generate; it has {', '.join(sorted(known | others))}"
            )
        how = How.of(options)
        policy, rule, draw = how.parts()
        if max_new_tokens < 0:
            raise ElisionError(f"the number of new tokens is 0 or more, not {max_new_tokens}")
        eos = options.get("eos")
        ends = self.facts.ends if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        sampler = Sampler(
            self.model, self.facts.mask, eos=ends, policy=policy, rule=rule, draw=draw, steps=how.steps,
            guidance=how.guidance, shift=self.facts.shift, seed=how.seed, early_stop=how.early_stop,
            context=self.facts.positions, batch=self.batch,
        )  # fmt: skip
        chat, system = bool(options.get("chat")), options.get("system")
        canvases = [
            canvas_ids(self.encode(prompt, chat=chat, system=system), max_new_tokens, self.facts.mask)
            for prompt in prompts
        ]
        settings = {**self.settings, **how.to_json(), "max_new_tokens": max_new_tokens, "batch": self.batch}
        return canvases, sampler, settings

    def encode(self, prompt: Any, *, chat: bool = False, system: str | None = None) -> list[int]:
        """The ids of a prompt, a text or ids already. Raises ElisionError."""
        return encoded(self.text, self.facts.vocabulary, prompt, chat=chat, system=system)

    def words(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, or its number where there is no tokenizer."""
        if self.text is None:
            return [f"{item} " for item in ids]
        return [self.text.tokenizer.decode([int(item)], clean_up_tokenization_spaces=False) for item in ids]

    def run(
        self, canvases: list[np.ndarray], sampler: Sampler, settings: dict[str, Any], trace: bool = False
    ) -> Iterator[tuple[int, Event, DiffusionGeneration | None]]:
        """`events`, of what `prepare` has made."""
        begun = time.perf_counter()
        first: dict[int, float] = {}
        for event in sampler.stream(canvases, trace=trace):
            now = time.perf_counter()
            first.setdefault(event.canvas, now)
            if event.result is None:
                yield event.canvas, event, None
                continue
            given = int((canvases[event.canvas] != self.facts.mask).sum())
            before = first[event.canvas]
            whole = self._generation(
                event.result, given, before - begun, now - before, sampler.ends, settings
            )
            yield event.canvas, event, whole

    def _generation(
        self,
        result: Result,
        given: int,
        before: float,
        after: float,
        ends: Sequence[int],
        settings: dict[str, Any],
    ) -> DiffusionGeneration:
        new = result.new_tokens
        stop = next((place for place, item in enumerate(new) if item in ends), len(new))
        total = before + after
        return DiffusionGeneration(
            text="" if self.text is None else self.text.decode(new[:stop]),
            token_ids=list(new),
            prompt_tokens=given,
            new_tokens=len(new),
            prefill_seconds=round(before, 6),
            decode_seconds=round(after, 6),
            tokens_per_second=round(len(new) / total, 3) if total > 0 else None,
            finish=result.finish,
            steps=result.steps,
            refreshes=result.refreshes,
            token_computations=result.computed,
            token_computations_full=result.full,
            refresh_seconds=round(result.refresh_seconds, 6),
            step_seconds=round(result.step_seconds, 6),
            rest_seconds=round(result.rest_seconds, 6),
            settings=settings,
            result=result,
        )
