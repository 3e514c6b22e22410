"""What decoding a canvas needs to know about a model besides its graphs, and how a diffusion model is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ..passes.errors import ModelFileError
from .lm_facts import Facts, read_json
from .lm_source import Source

_SHIFTED = {"dream"}
"""Types of models that were made from autoregressive ones: a position's logits decide the next."""


@dataclass(frozen=True)
class CanvasFacts:
    """mask: the id that stands for what is to be decided. shift: the logits of a position decide the next one. The
    rest as of `lm_facts.Facts`."""

    vocabulary: int
    mask: int
    positions: int | None = None
    ends: tuple[int, ...] = ()
    shift: bool = False
    architecture: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CanvasFacts:
        return CanvasFacts(**{**data, "ends": tuple(data["ends"])})


def is_diffusion(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a model that fills masks in: it was made for that, or names a mask token."""
    names = config.get("architectures") or [""]
    return str(names[0]).endswith("ForMaskedLM") or isinstance(config.get("mask_token_id"), int)


def config_of(model: Any) -> dict[str, Any]:
    """The configuration of a `Source` or a module, {} where there is none. Raises ModelFileError."""
    if isinstance(model, Source):
        folder: Path = model.folder
        return {} if model.kind == "gguf" else read_json(folder / "config.json")
    config = getattr(model, "config", None)
    return {} if config is None or not hasattr(config, "to_dict") else dict(config.to_dict())


def check_mask(config: Mapping[str, Any], tokenizer: Any, mask: int | None) -> int:
    """The mask token's id: `mask`, or what configuration or tokenizer say. Raises ModelFileError where none does."""
    for known in (mask, config.get("mask_token_id"), getattr(tokenizer, "mask_token_id", None)):
        if isinstance(known, Integral):
            return int(known)
    raise ModelFileError(
        "no mask token: neither the configuration (mask_token_id) nor the tokenizer names one, so this is no "
        "diffusion language model"
    )


def canvas_facts(
    config: Mapping[str, Any],
    facts: Facts,
    tokenizer: Any,
    mask: int | None = None,
    shift: bool | None = None,
) -> CanvasFacts:
    """`facts` and what `config` and tokenizer say besides; `mask` and `shift` where the caller knows. Raises
    ModelFileError where nothing says which token is the mask."""
    found = check_mask(config, tokenizer, mask)
    if not 0 <= found < facts.vocabulary:
        raise ModelFileError(f"the mask token {found} is not among the {facts.vocabulary} ids of the model")
    said = config.get("shift_logits")
    if shift is None:
        shift = bool(said) if said is not None else str(config.get("model_type", "")).lower() in _SHIFTED
    ends = facts.ends or tuple(
        one for one in [getattr(tokenizer, "eos_token_id", None)] if isinstance(one, int)
    )
    return CanvasFacts(
        vocabulary=facts.vocabulary,
        mask=found,
        positions=facts.positions,
        ends=tuple(end for end in ends if end != found),
        shift=shift,
        architecture=facts.architecture,
    )
