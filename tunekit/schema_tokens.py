"""New words of a recipe: what each is called, how many vectors it has, and where they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from tunekit.section import Section, also, holds_path

RANDOM = "random"
EMBEDDING = ".safetensors"
MOST_VECTORS = 64
RESERVED = ("bundle", "diffusers", "kohya")
"""What the other files of an export end with."""


def _lower(name: str) -> str:
    if name != name.lower():
        raise ValueError(
            f'"{name}" has capitals, and text encoders read lower case: write "{name.lower()}"'
        )
    return name


def _init(text: str) -> str:
    if text.endswith((".pt", ".bin", ".pth", ".ckpt")):
        raise ValueError(f'"{text}" is a pickle, which may run code: give a {EMBEDDING} file')
    return text


class Token(Section):
    """A new word of the text encoder, and how it is taught."""

    name: Annotated[
        str,
        Field(min_length=2, max_length=40, pattern=r"^<?[^\W_][\w-]*>?$"),
        AfterValidator(_lower),
    ] = Field(
        description="The word, such as `<zorp>`: 2 to 40 letters, digits, `-` and `_`, in lower "
        "case, best in `<` and `>`. No word of the base, and no part of another.",
        json_schema_extra=also("placeholder_token", "token_string", "trigger"),
    )
    vectors: int = Field(
        1,
        ge=1,
        le=MOST_VECTORS,
        description="Vectors of the word, 1 to 64: each takes the place of a word in every prompt.",
        json_schema_extra=also("num_vectors", "num_vectors_per_token", "tokens"),
    )
    init: Annotated[str, AfterValidator(_init)] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Where the vectors start: at words that the base knows (they take turns), at "
        "`random` draws with the vocabulary's statistics, or at those of an embedding file "
        "(`.safetensors`); null: at data.class.",
        json_schema_extra=also("initializer_token", "init_word", "initializer_concept")
        | holds_path("embedding"),
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Peak learning rate of these vectors, above 0 to 10; null: that of train.",
        json_schema_extra=also("lr", "embedding_lr", "token_lr", "ti_lr"),
    )
    stop_at: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the steps after which the word stays as it is, above 0 to 1: from "
        "there on only the adapter learns.",
        json_schema_extra=also("train_text_encoder_ti_frac", "stop_ti_at", "freeze_at"),
    )
    keep_norm: bool = Field(
        False,
        description="Whether the vectors keep the vocabulary's mean length: set after every step.",
        json_schema_extra=also("normalize", "clip_ti_decay", "normalize_embeddings"),
    )

    @property
    def init_file(self) -> str | None:
        """The embedding file the vectors start at; None where they start at anything else."""
        return self.init if self.init is not None and self.init.endswith(EMBEDDING) else None

    def start_words(self, class_noun: str) -> str | None:
        """Return the words of the base that it starts at; None where it starts elsewhere."""
        if self.init is None:
            return class_noun
        return None if self.init == RANDOM or self.init_file is not None else self.init


def clashes(tokens: Sequence[Token]) -> list[tuple[int, str]]:
    """Return (place, problem) for each name that is, or is in, the name of one before it."""
    found = []
    for at, token in enumerate(tokens):
        if file_word(token.name) in RESERVED:
            found.append((at, f'"{token.name}" would have the name of an adapter file: rename it'))
        for other in tokens[:at]:
            if token.name == other.name:
                problem = f'"{token.name}" is a token already: give its vectors in one'
            elif token.name in other.name or other.name in token.name:
                problem = (
                    f'"{token.name}" and "{other.name}" contain each other, so one would be read '
                    "where the other is meant: choose other names"
                )
            elif file_word(token.name) == file_word(other.name):
                problem = f'"{token.name}" and "{other.name}" would have one file: rename one'
            else:
                continue
            found.append((at, problem))
            break
    return found


def file_word(name: str) -> str:
    """Return the name without < and >, which not every disk takes in the name of a file."""
    return name.strip("<>")
