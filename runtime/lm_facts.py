"""What generation needs to know about a model besides its graph; read from configurations, kept in artefacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..passes.errors import ModelFileError

# What generation_config may ask for, and Sampling knows how to do.
_KEPT = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_LIMITS = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len")
_ENDLESS = {"t5", "mt5", "umt5", "longt5", "bloom", "mpt"}
"""Positions are distances here: the number in the configuration is what it was trained with, no limit."""


@dataclass(frozen=True)
class Facts:
    """vocabulary: how many ids there are. positions: how many the model has, None where there is no limit. ends: ids
    that end a text. start: the id an encoder-decoder's decoder begins with. encoder: whether there is one. rules: the
    part of generation_config that changes which id is chosen."""

    vocabulary: int
    positions: int | None = None
    ends: tuple[int, ...] = ()
    start: int | None = None
    encoder: bool = False
    architecture: str = ""
    rules: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Facts:
        return Facts(**{**data, "ends": tuple(data["ends"])})


def facts_from(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocabulary: int | None = None
) -> Facts:
    """Facts from config.json and generation_config.json as dictionaries; `vocabulary` where the graph tells it.

    Raises ModelFileError where nothing says how many ids there are."""
    merged = {**config, **(config.get("text_config") or {})}
    known = vocabulary or merged.get("vocab_size")
    if not known:
        raise ModelFileError("the configuration does not say how many ids the model knows (vocab_size)")
    kind = str(config.get("model_type", ""))
    limits = [merged[name] for name in _LIMITS if isinstance(merged.get(name), int)]
    encoder = bool(config.get("is_encoder_decoder"))

    def said(name: str) -> Any:
        value = generation.get(name)
        return merged.get(name) if value is None else value

    ends = said("eos_token_id")
    return Facts(
        vocabulary=int(known),
        positions=None if kind in _ENDLESS or not limits else int(limits[0]),
        ends=tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),),
        start=said("decoder_start_token_id") if encoder else None,
        encoder=encoder,
        architecture=kind,
        rules={name: said(name) for name in _KEPT if said(name) is not None},
    )


def facts_of_module(module: Any) -> Facts:
    """Facts of a transformers model in memory. Raises ModelFileError for another kind of module."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelFileError(f"{type(module).__name__}: no transformers model; it has no config")
    generation = getattr(module, "generation_config", None)
    table = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    weight = getattr(table, "weight", None)
    vocabulary = int(weight.shape[0]) if weight is not None else None
    return facts_from(config.to_dict(), generation.to_dict() if generation is not None else {}, vocabulary)


def facts_beside(file: Path, vocabulary: int | None) -> Facts:
    """Facts for an ONNX file from the configurations in its folder, as far as there are any."""
    config = read_json(file.with_name("config.json"))
    own = read_json(file.with_name("genai_config.json")).get("model", {})  # of onnxruntime-genai's builder
    if own:
        limits = {
            "max_position_embeddings": own.get("context_length"),
            "eos_token_id": own.get("eos_token_id"),
        }
        config = {"vocab_size": own.get("vocab_size"), **limits, **config}
    return facts_from(config, read_json(file.with_name("generation_config.json")), vocabulary)


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file, {} where there is no file. Raises ModelFileError for anything else."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{file}: not readable as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ModelFileError(f"{file}: not a JSON object")
    return data
