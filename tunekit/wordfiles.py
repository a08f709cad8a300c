"""New words of files put into a family, by diffusers' own loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunekit import words
from tunekit.changes.rows import AddedRows
from tunekit.embeddings import ONE, Embedding
from tunekit.loaded import Loaded, VerificationError, combined, undisturbed
from tunekit.tokens import start_rows

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.families import Family

_LOADS = "loads"


def load_words(family: Family, path: Path, found: Sequence[Embedding], alone: bool) -> Loaded:
    """Put the words of the file at `path` into `family`.

    alone: whether the file holds nothing else, so that diffusers can read it itself. At strength 0
    a word is drawn as the words it started at, or as the vocabulary's mean where the file does not
    say them. Raises VerificationError where they do not fit; nothing is changed then.
    """
    keys = {e: family.embedding_keys.get(e, ONE) for e in family.tokenizers}
    if not keys:
        raise VerificationError(_LOADS, f"{family.label} is of a family that learns no new words")
    for embedding in found:
        _check(family, embedding, keys)
    parts = []
    for embedding in found:
        for encoder, key in keys.items():
            by_path = alone and key == ONE
            parts.append(_load(family, encoder, embedding, key, path if by_path else None))
    return combined(parts)


def _check(family: Family, embedding: Embedding, keys: dict[str, str]) -> None:
    word = embedding.word
    if embedding.rows.keys() != set(keys.values()):
        held, needed = (", ".join(k or "one") for k in (embedding.rows, keys.values()))
        said = f"{word} has vectors for other text encoders ({held}) than {family.label} ({needed})"
        raise VerificationError(_LOADS, said)
    for encoder, key in keys.items():
        if problem := words.fault(family.tokenizers[encoder], word):
            raise VerificationError(_LOADS, problem)
        if _trains_words(family, encoder):
            said = "words that train are attached: give embedding files and checkpoints apart"
            raise VerificationError(_LOADS, said)
        wide, own = embedding.rows[key].shape[1], _table(family, encoder).shape[1]
        if wide != own:
            said = f"{word} has vectors {wide} wide, and those of {family.label} are {own} wide"
            raise VerificationError(_LOADS, said)


def _load(
    family: Family, encoder: str, embedding: Embedding, key: str, path: Path | None
) -> Loaded:
    import torch

    word, rows = embedding.word, embedding.rows[key]
    tokenizer, module = family.tokenizers[encoder], family.text_encoders[encoder]
    former = words.with_words(tokenizer, {})  # diffusers teaches the one it is given
    old = _table(family, encoder)
    tokens, text_model = len(old), cast(Any, module)
    try:
        zero = start_rows(tokenizer, old, len(rows), embedding.start)
    except ValueError:  # words of another base than this one
        zero = start_rows(tokenizer, old, len(rows), None)
    # transformers draws numbers for the rows that diffusers then writes.
    with undisturbed(family), torch.random.fork_rng(devices=[]):
        try:
            _loader(family).load_textual_inversion(
                str(path) if path is not None else {word: rows},
                token=word,
                tokenizer=tokenizer,
                text_encoder=module,
                use_safetensors=True,
                local_files_only=True,
            )
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise VerificationError(
                _LOADS, f"diffusers cannot load {word} into {family.label}: {line}"
            ) from fault
    table = _table(family, encoder)
    table.requires_grad_(False)
    ids = tokenizer.convert_tokens_to_ids(words.vector_names(word, len(rows)))
    held = table[ids].clone()

    def set_scale(scale: float, text: float | None = None) -> None:
        scale = scale if text is None else text
        own = held if scale == 1 else (zero + scale * (held.float() - zero)).to(held.dtype)
        with torch.no_grad():
            # Another word may have come behind it, in a table of its own.
            _table(family, encoder)[ids] = own

    def change() -> Tensor:
        rows: Tensor = _table(family, encoder)[ids].detach().float().cpu()
        return rows

    def remove() -> None:
        with torch.random.fork_rng(devices=[]):
            text_model.resize_token_embeddings(tokens).requires_grad_(False)
        family.use_tokenizer(encoder, former)

    changes: dict[str, Callable[[], Tensor]] = {f"{encoder}/{word}": change}
    return Loaded(1, changes, partial(_rounding, rows.numel()), set_scale, remove)


def _loader(family: Family) -> Any:
    """Return the family's pipeline, with diffusers' loader of words where it is without one."""
    from diffusers.loaders import TextualInversionLoaderMixin

    pipeline = family.pipeline()
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        kinds = (TextualInversionLoaderMixin, type(pipeline))
        pipeline.__class__ = type("Loader", kinds, {})
    return pipeline


def _rounding(numbers: int, name: str, floor: float) -> float:
    """Return how far the vectors move where each of their numbers is off by `floor`."""
    return floor * math.sqrt(numbers)


def _trains_words(family: Family, encoder: str) -> bool:
    return isinstance(_input(family, encoder), AddedRows)


def _table(family: Family, encoder: str) -> Any:
    """Return a text encoder's vocabulary, [tokens, width]; words that train stand beside it."""
    table = _input(family, encoder)
    while isinstance(table, AddedRows):
        table = table.table
    return table.weight


def _input(family: Family, encoder: str) -> Any:
    module: Any = family.text_encoders[encoder]
    return module.get_input_embeddings()
