"""New words of a tokenizer, as diffusers knows them: `<zorp>`, `<zorp>_1`, ... are one word.

A prompt says only the first; the others are put behind it before the prompt is split into tokens,
as diffusers' `maybe_convert_prompt` does, so that training, our drawing and other people's
pipelines read the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from tunekit.errors import UserError


def vector_names(name: str, vectors: int) -> list[str]:
    """Return what the tokenizer calls each vector of a word."""
    return [name, *(f"{name}_{number}" for number in range(1, vectors))]


def add(tokenizer: Any, words: Mapping[str, int]) -> None:
    """Have a transformers tokenizer know new words, {name: vectors}."""
    names = [vector for name, count in words.items() for vector in vector_names(name, count)]
    added = tokenizer.add_tokens(names)
    assert added == len(names), (names, added)


def with_words(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """Return a copy of a transformers tokenizer that knows new words, {name: vectors}."""
    grown = copy.deepcopy(tokenizer)
    add(grown, words)
    return grown


def expand(tokenizer: Any, prompt: str) -> str:
    """Return `prompt` with every vector of each new word, in the tokenizer's own spelling."""
    return _replaced(tokenizer, prompt, whole=True)


def spell(tokenizer: Any, prompt: str) -> str:
    """Return `prompt` with each new word in the tokenizer's own spelling: "<ZORP>" is "<zorp>"."""
    return _replaced(tokenizer, prompt, whole=False)


def _replaced(tokenizer: Any, prompt: str, whole: bool) -> str:
    added = tokenizer.added_tokens_encoder
    if len(added) == len(tokenizer.all_special_tokens):
        return prompt
    own = {name.lower(): name for name in added if name not in tokenizer.all_special_tokens}

    def replacement(match: re.Match[str]) -> str:
        name = own[match[0].lower()]
        vectors, number = [name], 1
        while whole and f"{name}_{number}" in added:
            vectors.append(f"{name}_{number}")
            number += 1
        return " ".join(vectors)

    # The longest first: <zorp>_1 is no <zorp>, and <zorp>_12 no <zorp>_1.
    names = sorted(own, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), replacement, prompt, flags=re.IGNORECASE)


def known(tokenizer: Any, words: str) -> list[int]:
    """Return the token of each of `words`.

    Raises UserError where one of them is made up of pieces: it has no vector of its own.
    """
    ids, unknown = [], []
    for word in words.split():
        own = tokenizer(word, add_special_tokens=False).input_ids
        if len(own) != 1 or own[0] == tokenizer.unk_token_id:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(own)).replace("</w>", "")
            unknown.append(f'"{word}" (read as {pieces})')
        ids += own
    if unknown:
        raise UserError(f"the base has no word {', '.join(unknown)}: start at words that it knows")
    return ids


def fault(tokenizer: Any, name: str) -> str | None:
    """Return why `name` cannot be a new word of this tokenizer; None where it can."""
    own = tokenizer(name, add_special_tokens=False).input_ids
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary or len(own) == 1:
        return f'the base knows "{name}" already: choose a new word, such as <{name.strip("<>")}>'
    inside = [word for word in vocabulary if name.lower() in word.lower()]
    if inside:
        word = min(inside, key=len).replace("</w>", "")
        return (
            f'"{name}" is a part of "{word}", which the base knows and could no longer read: '
            f"write it <{name.strip('<>')}>"
        )
    return None
