"""The command `elision generate`: prompts in, text or JSON lines out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..passes.errors import ElisionError
from .files import check_target
from .shell import working

BITS = (4, 8, 16, 32)
RUNTIMES = ("onnxruntime", "torch")
CANVAS = "Masked diffusion models"
PICTURES = "Models that read pictures"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH_OR_PACKAGE",
        help="A folder, GGUF or ONNX file, or installed package.",
    ),
]


@dataclass(frozen=True)
class Asked:
    """The options of one call, checked as far as they can be without a model. prompts: texts, or token ids of the
    `texts`."""

    prompts: list[Any]
    single: bool
    max_new_tokens: int
    how: dict[str, Any]
    json: bool
    report: Path | None = None
    texts: Sequence[str] = ()


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to go on from.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE.jsonl", help='One object a line, with a field "prompt".'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, max=1 << 24, help="New tokens at most.")] = 128,
    bits: Annotated[
        int | None,
        typer.Option(help="4, 8, 16 or 32 bits a weight; default: what the model has."),
    ] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime or torch.")] = "onnxruntime",
    temperature: Annotated[float, typer.Option(help="0: always the best token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the best tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Over 1: tokens seen before become less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: said before.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of a text.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", min=2, max=1 << 24, help="Positions of the cache.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=512, help="Prompts that take a step together.")] = 8,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="Threads; 0: the runtime chooses.")] = 0,
    drafter: Annotated[
        str, typer.Option(help="none, auto, ngram, recycling, model, self or hierarchical.")
    ] = "none",
    draft_model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_PACKAGE", help="For the drafters model and hierarchical."),
    ] = None,
    tree: Annotated[
        str, typer.Option(help="Shape of draft trees: marginal, fixed, beam or dyspec.")
    ] = "marginal",
    mode: Annotated[
        str, typer.Option(help="exact: plain decoding's tokens; sampling: tokens of the same distribution.")
    ] = "exact",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page about how the text was drafted.")
    ] = None,
    cache_size: Annotated[
        int | None,
        typer.Option(
            "--cache-size", metavar="N", min=6, help="Keys a sequence may keep; the rest is forgotten (H2O)."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="A picture that the prompt is about; may be repeated.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    drop: Annotated[
        str,
        typer.Option(
            metavar="PASSES",
            help='Passes that leave image tokens out: "token-drop{policy=cls-topk budget=0.2}".',
            rich_help_panel=PICTURES,
        ),
    ] = "",
    policy: Annotated[
        str | None,
        typer.Option(
            help="Diffusion models: what is computed at a step (window, prefix, dual, delayed, block or none).",
            rich_help_panel=CANVAS,
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="W", help="Undecided tokens that are seen.", rich_help_panel=CANVAS)
    ] = None,
    active: Annotated[
        int | None,
        typer.Option(metavar="A", help="Of them, those that are computed.", rich_help_panel=CANVAS),
    ] = None,
    refresh: Annotated[
        int | None,
        typer.Option(metavar="R", help="Steps from one refresh to the next.", rich_help_panel=CANVAS),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Tokens of a block (policies prefix, dual, block).", rich_help_panel=CANVAS),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of a window: scattered (its masks) or contiguous (a range).", rich_help_panel=CANVAS
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="S", help="Denoising steps; default: one a token.", rich_help_panel=CANVAS),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Which tokens are decided first: confidence, entropy, margin, random, threshold or left.",
            rich_help_panel=CANVAS,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="With --rule threshold: decide all above this probability.", rich_help_panel=CANVAS
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance.", rich_help_panel=CANVAS)
    ] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="End at the first end of a text.", rich_help_panel=CANVAS)
    ] = False,
    buckets: Annotated[
        bool,
        typer.Option("--buckets", help="Few shapes: rows are rounded up.", rich_help_panel=CANVAS),
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile anew and keep nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each prompt.")] = False,
) -> None:
    """Write text with a causal language model: greedy, or sampled with a temperature; with a drafter, sooner. Or with
    a masked diffusion model, of whose canvas only a window is computed."""
    check_form(bits, runtime)
    if system is not None and not chat:
        raise ElisionError("--system takes --chat")
    how = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "stop": stop or (),
        "chat": chat,
        "system": system,
        "eos": () if ignore_eos else None,
    }
    _check_sampling(how)
    from .speculate import check_drafting, check_tree

    check_drafting(drafter, draft_model, mode)
    check_tree(tree)
    said: dict[str, Any] = {
        "policy": policy, "window": window, "active": active, "refresh": refresh, "block": block, "form": form,
        "steps": steps,
        "rule": rule, "threshold": threshold, "guidance": guidance, "early_stop": early_stop or None,
    }  # fmt: skip
    said = {name: value for name, value in said.items() if value is not None}
    from .canvas_command import generate_canvases, wants_canvas

    texts = _read(prompt, prompts)
    canvas = wants_canvas(model, said | ({"buckets": True} if buckets else {}))
    if report is not None:
        if prompts is not None or (drafter == "none" and not canvas):
            raise ElisionError("--report takes one --prompt and a --drafter")
        check_target(report)
        how["trace"] = True
    if canvas:
        _no_canvas({"--drafter": drafter != "none", "--draft-model": draft_model, "--cache-size": cache_size,
                    "--stop": stop, "--repetition-penalty": repetition_penalty, "--image": image})  # fmt: skip
    if drop and not image:
        raise ElisionError("--drop takes --image: it leaves tokens of pictures out")
    asked = Asked(texts, prompts is None, max_new_tokens, how, json, report, texts)
    offline()
    if canvas:
        shared = {
            name: how[name] for name in ("temperature", "top_k", "top_p", "seed", "chat", "system", "eos")
        }
        built = {"bits": bits, "runtime": runtime, "context": context, "batch": batch, "cache": not no_cache,
                "threads": threads, "buckets": buckets}  # fmt: skip
        generate_canvases(model, asked, shared | said | {"trace": report is not None}, built)
        return
    from .generate import Generator
    from .h2o import H2O

    seen: dict[str, Any] = {}
    if image:
        from .pictures_command import with_pictures

        asked, seen = with_pictures(asked, model, image, drop)
    with working("reading the model", silent=json) as tell:
        generator = Generator(
            model, bits=bits, runtime=runtime, context=context, batch=batch, cache=not no_cache,
            threads=threads, drafter=drafter, draft_model=draft_model, tree=tree, mode=mode,
            h2o=None if cache_size is None else H2O(cache_size), notify=tell,
            **seen,
        )  # fmt: skip
    write(generator, asked)


def _no_canvas(given: dict[str, Any]) -> None:
    """Raises ElisionError for an option that a diffusion model does not take."""
    for option, value in given.items():
        if value:
            raise ElisionError(
                f"{option} takes an autoregressive model, and this is a masked diffusion model"
            )


def check_form(bits: int | None, runtime: str) -> None:
    """In which form a model can be asked for. Raises ElisionError."""
    if bits is not None and bits not in BITS:
        raise ElisionError(f"--bits is {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, not {bits}")
    if runtime not in RUNTIMES:
        raise ElisionError(f"--runtime is {' or '.join(RUNTIMES)}, not {runtime!r}")


def _check_sampling(how: dict[str, Any]) -> None:
    """Nobody waits for a model to hear that an option means nothing."""
    from .generate_sampling import Sampling

    names = ("temperature", "top_k", "top_p", "seed", "repetition_penalty")
    Sampling(**{name: how[name] for name in names if how[name] is not None})


def offline() -> None:
    """What we load is on the disk; libraries below must not look elsewhere, nor draw bars of their own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# ---- prompts -------------------------------------------------------------------------------------------
def _read(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ElisionError("give a prompt: --prompt TEXT, or --prompts FILE.jsonl (one of them)")
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ElisionError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ElisionError(f"{file}: cannot be read ({error.strerror})") from None
    found = [
        _line(f"{file}, line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not found:
        raise ElisionError(f"{file}: no prompts in it")
    return found


def _line(where: str, line: str) -> str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ElisionError(f"{where}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise ElisionError(f'{where}: not an object with a text called "prompt"')
    return data["prompt"]


# ---- results -------------------------------------------------------------------------------------------
def write(generator: Any, asked: Asked) -> None:
    """Generates and prints. An interruption leaves what was written so far on lines of its own."""
    if asked.json:
        for result in _in_order(generator, asked):
            print(json.dumps(result.to_json(), ensure_ascii=False), flush=True)
            _page(generator, asked, result)
        return
    if asked.single:
        _page(generator, asked, _stream(generator, asked))
        return
    for number, result in enumerate(_in_order(generator, asked), 1):
        print(f"--- {number}\n{result.text}", flush=True)


def _page(generator: Any, asked: Asked, result: Any) -> None:
    if asked.report is not None:
        from .generation_report import write_generation_report

        write_generation_report(asked.report, generator, result, asked.texts[0])


def _stream(generator: Any, asked: Asked) -> Any:
    """The Generation, its text printed while it came."""
    if generator.text is None:
        (result,) = _in_order(generator, asked)
        print(*result.token_ids)
        return result
    pieces = generator.stream(asked.prompts[0], asked.max_new_tokens, **asked.how)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    result = pieces.result
    if sys.stderr.isatty():
        print(f"[{figures(result)}]", file=sys.stderr)
    return result


def figures(result: Any) -> str:
    """What a Generation came to, in a line: tokens, those of pictures that were kept, times."""
    said = [f"{result.prompt_tokens} + {result.new_tokens} tokens"]
    if result.pictures is not None:
        kept, tokens, seconds = (result.pictures[name] for name in ("kept", "tokens", "vision_seconds"))
        said += [f"{kept} of {tokens} image tokens", f"seen in {seconds:.2f} s"]
    said.append(f"first token after {result.prefill_seconds:.2f} s")
    if result.tokens_per_second:
        said.append(f"{result.tokens_per_second:.1f} tokens/s")
    return ", ".join(said)


def _in_order(generator: Any, asked: Asked) -> Iterator[Any]:
    return in_order(generator.events(asked.prompts, asked.max_new_tokens, **asked.how))


def in_order(events: Iterator[tuple[int, Any, Any]]) -> Iterator[Any]:
    """Complete results in the order of the prompts, each as soon as those before it are there. events: (number of the
    prompt, anything, the result or None)."""
    done: dict[int, Any] = {}
    following = 0
    for number, _, result in events:
        if result is not None:
            done[number] = result
        while following in done:
            yield done.pop(following)
            following += 1
