"""Prompts on their way to text encoders: tokenizers, and what a prompt loses at their length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunekit import words
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.modelfolder import ModelFolder

CLIP_READS = 77
"""How many tokens CLIP reads where its configuration does not say it."""


def tokenizer_name(encoder: str) -> str:
    """Return what diffusers calls a text encoder's tokenizer: tokenizer_2 of text_encoder_2."""
    return encoder.replace("text_encoder", "tokenizer")


def tokenizer(folder: ModelFolder, encoder: str, kind: str, reads: int = CLIP_READS) -> Any:
    """Return a text encoder's tokenizer, that reads no more than the encoder does.

    kind: its class's name in transformers. reads: how many tokens it is given where the encoder's
    configuration does not say it. Raises UserError where it cannot be loaded.
    """
    import transformers

    path = folder.path / tokenizer_name(encoder)
    try:
        made = getattr(transformers, kind).from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be loaded: {line[:300]}") from error
    # Some tokenizers do not say how much the encoder reads.
    places = folder.configs.get(encoder, {}).get("max_position_embeddings", reads)
    if not all(isinstance(number, int | float) for number in (places, made.model_max_length)):
        raise UserError(f"{path}: how much {encoder} reads is no number: {places!r:.60}")
    made.model_max_length = min(made.model_max_length, places)
    return made


def tokens(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Return what the tokenizer makes of prompts: `input_ids` and `attention_mask`, [B, length]."""
    return tokenizer(
        [words.expand(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def cut_words(tokenizer: Any, prompt: str) -> str:
    """Return the end of `prompt` that is not read, or '' where all fits."""
    # The last token read is the end mark, in the place of the first one cut.
    whole = words.expand(tokenizer, prompt)
    ids = tokenizer(whole, truncation=False, verbose=False).input_ids
    cut: str = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])
    # A copy of CLIP's tokenizer, such as one with new words, does not know its ends of words.
    return cut.replace("</w>", " ").strip()


def unread(tokenizers: Mapping[str, Any], prompt: str) -> str:
    """Return the end of `prompt` that none of several text encoders reads."""
    return min((cut_words(one, prompt) for one in tokenizers.values()), key=len)


def told(tokenizer: Any) -> list[Any]:
    """Return as JSON values all that decides which tokens a prompt becomes."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call asked for, not what the tokenizer is; the length stands beside it.
    rules |= {"padding": None, "truncation": None}
    return [rules, tokenizer.model_max_length, tokenizer.special_tokens_map]


def clip_layer(encoder: Any, ids: Tensor, back: int, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Return what a CLIP text encoder's layers make of tokens [B, length].

    back: how many layers before the last. Returns that layer's states [B, length, width], before
    the last norm, and all of the encoder's answer.
    """
    answer = encoder(ids, attention_mask=mask, output_hidden_states=True)
    return answer.hidden_states[-1 - back], answer
