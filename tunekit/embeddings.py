"""Files of new words: textual-inversion embeddings, and those bundled with an adapter.

One word is one tensor [vectors, width] under the word's name (diffusers) or `emb_params`, or one
tensor for each text encoder (`clip_l`, `clip_g`); the last two are called by the metadata, or else
by the file's name. In a bundle they stand as `bundle_emb.WORD.string_to_param.*`, or
`bundle_emb.WORD.clip_l`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.factors import group
from tunekit.safefile import check_header

if TYPE_CHECKING:
    from torch import Tensor

ONE = ""
"""The key of a word's vectors where there is one text encoder."""
STARTS = "tunekit.word_starts"
"""Metadata: {word: the base's words that it started at}, as JSON."""
WORD = "tunekit.word"
"""Metadata: the word of a file whose tensors do not say it."""
_ENCODERS = ("clip_l", "clip_g")
_BUNDLED = re.compile(r"^bundle_emb\.(?P<word>[^.]+)\.(?P<key>string_to_param\.\*|clip_[lg])$")
_MOST_VECTORS = 75
_NAMELESS = "emb_params"
_LAYER = re.compile(r".*\.(weight|bias)")  # a part of a model, which is never a word


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word of a file. rows: [vectors, width] by text encoder ("clip_l", "clip_g"; ONE where there
    is one). start: the base's words that it started at, where the file says so."""

    word: str
    rows: Mapping[str, Tensor]
    start: str | None = None

    @property
    def vectors(self) -> int:
        """How many vectors it has in each text encoder."""
        return len(next(iter(self.rows.values())))


def single(word: str, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of one word, as diffusers and ComfyUI read it."""
    return {key if key != ONE else word: tensor for key, tensor in rows.items()}


def bundled(word: str, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a word inside an adapter file, as A1111 and Forge read it."""
    return {
        f"bundle_emb.{word}.{key if key != ONE else 'string_to_param.*'}": tensor
        for key, tensor in rows.items()
    }


def split(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[tuple[Embedding, ...], dict[str, Tensor]]:
    """Return the words of the file at `path`, and the tensors that belong to none.

    Raises UserError for a word whose tensors no text encoder could read.
    """
    found: dict[str, dict[str, Tensor]] = {}
    rest = dict(tensors)
    for key, tensor in tensors.items():
        if match := _BUNDLED.match(key):
            part = match["key"] if match["key"] in _ENCODERS else ONE
            found.setdefault(match["word"], {})[part] = tensor
            del rest[key]
    if not found and (alone := _alone(metadata.get(WORD, path.stem), tensors)):
        found, rest = alone, {}
    starts = _starts(metadata)
    words = tuple(_checked(path, word, rows, starts.get(word)) for word, rows in found.items())
    return words, rest


def contents(path: Path) -> tuple[bool, bool]:
    """Return whether the file at `path` holds new words, and whether anything else; by its header.

    Raises UserError for what is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            flat = len(names) == 1 and len(file.get_slice(names[0]).get_shape()) <= 2
            flat = flat and not _LAYER.fullmatch(names[0])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())}") from None
    if any(_BUNDLED.match(name) for name in names):
        return True, not all(_BUNDLED.match(name) for name in names)
    named: dict[str, Any] = dict.fromkeys(names)
    words = bool(names) and not group(named)[0] and (flat or set(names) <= set(_ENCODERS))
    return words, not words


def _alone(word: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """Return the word of a file that holds nothing else; `word` where its tensors do not say it."""
    if tensors and tensors.keys() <= set(_ENCODERS):
        return {word: dict(tensors)}
    if len(tensors) != 1 or group(tensors)[0]:
        return None
    ((name, tensor),) = tensors.items()
    if tensor.ndim not in (1, 2) or _LAYER.fullmatch(name):
        return None
    return {word if name == _NAMELESS else name: {ONE: tensor}}


def _checked(path: Path, word: str, rows: Mapping[str, Tensor], start: str | None) -> Embedding:
    if not word or len(word) > 100 or re.search(r"\s|[{}]", word):
        raise UserError(f"{path}: its word {json.dumps(word)[:110]} cannot stand in a prompt")
    if ONE in rows and len(rows) > 1:
        raise UserError(f"{path}: {word} has vectors for one text encoder and for several")
    whole = {}
    for key, tensor in rows.items():
        named = f"{word} ({key})" if key else word
        vectors = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
        if vectors.ndim != 2 or not vectors.numel() or len(vectors) > _MOST_VECTORS:
            shape = list(tensor.shape)
            raise UserError(f"{path}: {named} has the shape {shape}: no word has that")
        if not vectors.is_floating_point() or not bool(vectors.double().isfinite().all()):
            raise UserError(f"{path}: {named} holds NaN, infinite or other than real numbers")
        whole[key] = vectors
    if len({len(vectors) for vectors in whole.values()}) > 1:
        raise UserError(f"{path}: {word} has other numbers of vectors in its text encoders")
    return Embedding(word, whole, start)


def _starts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the metadata says of where words started; nothing where it is not ours."""
    try:
        said = json.loads(metadata.get(STARTS, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {word: text for word, text in said.items() if isinstance(text, str)}
