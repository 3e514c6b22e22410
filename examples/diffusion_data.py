"""What the small diffusion model and its judge learn from: the Python source of the running interpreter's library.

Files are split by a hash of their path, so that the same file is held out on every machine. The text becomes ids of a
byte-level BPE; canvases are cut from it anywhere, and the end of a file fills the rest of its canvas with <eos>.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
SPECIAL = ("<pad>", "<eos>", "[MASK]")
PAD, EOS, MASK = range(3)
FIRST_PLAIN = len(SPECIAL)
"""Ids from here on are text."""

LONGEST_LINE = 160
SKIPPED_FOLDERS = {
    "site-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "__phello__",
    "crashers",
    "build",
}
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """ids: uint16 of all files, each one ended by <eos>. starts: where the files begin, and the end of the last."""

    ids: np.ndarray
    starts: np.ndarray

    def canvases(self, count: int, length: int, random: np.random.Generator) -> np.ndarray:
        """int64 [count, length], cut at random places. What lies beyond the end of a file is <eos>."""
        first = random.integers(0, len(self.ids) - 1, count)
        end = self.starts[np.searchsorted(self.starts, first, "right")]
        index = first[:, None] + np.arange(length)
        beyond = index >= end[:, None]
        return np.where(beyond, EOS, self.ids[np.minimum(index, len(self.ids) - 1)].astype(np.int64))

    def full_canvases(self, length: int) -> np.ndarray:
        """int64 [n, length]: all canvases, one after the other, that lie inside one file."""
        found = []
        for start, end in zip(self.starts[:-1], self.starts[1:]):
            for first in range(start, end - length, length):
                found.append(self.ids[first : first + length])
        return np.asarray(found, np.int64).reshape(-1, length)


def sources() -> Iterator[tuple[str, str]]:
    """(path, normalised text) of the library's files, in order of their paths. Tables of data are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        folders = name.split("/")[:-1]
        if any(f in SKIPPED_FOLDERS or f.endswith("data") or f.startswith("config-") for f in folders):
            continue
        if name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if (plain := normalised(text)) is not None:
            yield name, plain


def normalised(text: str) -> str | None:
    """Tabs as spaces, no blanks at line ends, no long lines, at most two empty lines in a row. None where it is a table
    of data, or short."""
    lines = [line.rstrip() for line in text.expandtabs(8).splitlines()]
    kept = [line for line in lines if len(line) <= LONGEST_LINE]
    plain = re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).strip("\n") + "\n"
    letters, digits = sum(map(str.isalpha, plain)), sum(map(str.isdigit, plain))
    odd = sum(not c.isascii() for c in plain) + plain.count("\\x") * 4 + plain.count("\\u") * 6
    if len(plain) < 400 or len(kept) < 0.9 * len(lines):
        return None
    if digits > 0.12 * len(plain) or letters < 0.4 * len(plain) or odd > 0.05 * len(plain):
        return None
    return plain


def held_out(name: str) -> bool:
    """Whether the file of this path is kept from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of VOCABULARY tokens, of which the first are SPECIAL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and what transformers.AutoTokenizer wants to know beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "eos_token": SPECIAL[EOS],
        "mask_token": SPECIAL[MASK],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Corpus:
    """The texts as one corpus."""
    parts, starts = [], [0]
    for encoding in tokenizer.encode_batch(list(texts)):
        parts.append(np.asarray([*encoding.ids, EOS], np.uint16))
        starts.append(starts[-1] + len(parts[-1]))
    return Corpus(np.concatenate(parts), np.asarray(starts, np.int64))


def write_prompts(
    path: Path, tokenizer: Tokenizer, files: Sequence[tuple[str, str]], count: int, prompt: int, length: int
) -> None:
    """`count` excerpts of `length` tokens, each from another file, as lines {"file", "prompt", "rest"}: about `prompt`
    tokens and what follows them. A prompt is whole lines; encoding both parts gives the ids of the whole."""
    random = np.random.default_rng(0)
    lines: list[str] = []
    for place in random.permutation(len(files)):
        name, text = files[place]
        ids = tokenizer.encode(text).ids
        for near in range(97, len(ids) - length - 48, 97):
            first = near + _line_end(tokenizer, ids[near:], 24)
            whole = ids[first : first + length]
            cut = _line_end(tokenizer, whole, prompt)
            parts = [tokenizer.decode(part) for part in (whole[:cut], whole[cut:])]
            again = [tokenizer.encode(part).ids for part in parts]
            usable = _mostly_code(parts[0]) and _mostly_code(parts[1])
            if cut and usable and again[0] + again[1] == whole:
                row = {"file": name, "prompt": parts[0], "rest": parts[1]}
                lines.append(json.dumps(row, ensure_ascii=False))
                break
        if len(lines) == count:
            break
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line_end(tokenizer: Tokenizer, ids: Sequence[int], near: int) -> int:
    """A place at most 24 before or after `near` where a new line begins, 0 for none."""
    for distance in range(25):
        for place in (near - distance, near + distance):
            if tokenizer.decode(ids[place : place + 1]).startswith("\n"):
                return place
    return 0


def _mostly_code(text: str) -> bool:
    """Neither a comment nor prose: a few definitions or statements per ten lines."""
    lines = [line.strip() for line in text.splitlines()]
    code = sum(bool(re.search(r"[=(\[:]", line)) and not line.startswith("#") for line in lines)
    return code >= 0.45 * len(lines)
