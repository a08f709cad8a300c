"""The data section of a recipe: which pictures, which words, and how they are shown to training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from tunekit.schema_source import TEMPLATE_LISTS, Captions, Pictures
from tunekit.section import (
    LIST,
    ONE,
    SECTION,
    Section,
    Template,
    Word,
    also,
    by_form,
    distinct,
    holds_path,
)

_RGB = re.compile(r"#[0-9a-fA-F]{6}")


class Buckets(Section):
    """Training pictures in their own shapes, sorted into buckets of about the same area."""

    min: int | None = Field(
        None,
        ge=16,
        le=8192,
        description="Shortest edge of a bucket in pixels; null: half the resolution.",
        json_schema_extra=also("min_bucket_reso"),
    )
    max: int | None = Field(
        None,
        ge=16,
        le=8192,
        description="Longest edge of a bucket in pixels; null: twice the resolution.",
        json_schema_extra=also("max_bucket_reso"),
    )
    step: int = Field(
        64,
        ge=1,
        le=1024,
        description="Edges of buckets are multiples of this many pixels, and of what the family "
        "needs.",
        json_schema_extra=also("bucket_reso_steps", "bucket_step"),
    )

    @field_validator("max")
    @classmethod
    def _not_below_min(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min")
        if value is not None and least is not None and least > value:
            raise ValueError(f"{value} is less than min, {least}: no edge is between them")
        return value


class Mask(Section):
    """Which part of a picture is the subject: the loss counts there."""

    source: Literal["files", "alpha"] = Field(
        "files",
        description="Where masks are from: `files` named NAME.mask.png or NAME-masklabel.png, or a "
        "`mask` column of the metadata; `alpha` the pictures' own alpha channel. White is subject.",
    )
    background_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of the loss where the mask is black, 0 to 1.",
        json_schema_extra=also("unmasked_weight", "unmasked_probability"),
    )


def _no_trigger(text: str) -> str:
    if "{trigger}" in text:
        raise ValueError(f'"{text}" holds {{trigger}}: these pictures keep the class as it was')
    return text


class Prior(Section):
    """Pictures of the class that are trained beside the subject, so that the class stays alive."""

    prompts: Annotated[
        tuple[Annotated[Template, AfterValidator(_no_trigger)], ...], AfterValidator(distinct)
    ] = Field(
        ("a {class}",),
        strict=False,
        min_length=1,
        description="What the untouched base draws, and the captions of these pictures. {class} is "
        "filled in.",
        json_schema_extra=also("class_prompt", "class_prompts"),
    )
    count: int = Field(
        64,
        ge=1,
        le=100_000,
        description="Pictures in all, 1 to 100,000; the prompts take turns.",
        json_schema_extra=also("num_class_images"),
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Weight of their loss beside that of the subject, above 0 to 100.",
        json_schema_extra=also("prior_loss_weight", "prior_weight"),
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="Folder of pictures to take instead of drawing; `count` is then their number.",
        json_schema_extra=also("class_data_dir", "reg_data_dir") | holds_path("folder"),
    )
    steps: int = Field(25, ge=1, le=1000, description="Denoising steps a picture, 1 to 1000.")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="Classifier-free guidance they are drawn with, 0 to 100."
    )


def _background(value: str) -> str:
    if value not in ("white", "grey", "black") and not _RGB.fullmatch(value):
        raise ValueError(f'"{value}" is no colour: white, grey, black or #rrggbb')
    return value


PathText = Annotated[str, Field(min_length=1), Tag(ONE)]
PicturesSection = Annotated[Pictures, Tag(SECTION)]
Resolution = Annotated[int, Field(ge=16, le=4096)]


class Data(Section):
    """Which images, which words?"""

    source: Annotated[
        PathText
        | PicturesSection
        | Annotated[
            tuple[Annotated[PathText | PicturesSection, by_form], ...],
            Field(min_length=1, strict=False),
            Tag(LIST),
        ],
        by_form,
    ] = Field(
        description="The training pictures: a folder, a .parquet file or a .tar shard; a section "
        "of keys (see `data.source` below), which may name a Hub dataset; or a list of these. "
        "Paths are relative to the working directory, else to the recipe's project.",
        json_schema_extra=also(
            "instance_data_dir", "train_data_dir", "folder_path", "image_dir", "path"
        )
        | holds_path("pictures"),
    )
    trigger: Word = Field(
        description="The new word that will call the subject or style, such as `zorp`. "
        "1 to 100 characters, no braces.",
        json_schema_extra=also("trigger_word", "instance_token", "token", "placeholder_token"),
    )
    class_noun: Word = Field(
        alias="class",
        description="What the subject is, such as `robot`: a noun that the untouched base knows. "
        "1 to 100 characters, no braces.",
        json_schema_extra=also("class_tokens", "class_name", "class_prompt", "initializer_token"),
    )
    captions: Captions = Field(
        default_factory=Captions,
        description="The words: templates, and what is done to captions at each visit.",
    )
    holdout: str | None = Field(
        None,
        min_length=1,
        description="Folder of real pictures never trained on: the ceiling of the scores. "
        "null: the ceiling is estimated from the training pictures among themselves.",
        json_schema_extra=also("validation_data_dir", "held_out") | holds_path("folder"),
    )
    resolution: (
        Annotated[
            Annotated[Resolution, Tag(ONE)]
            | Annotated[
                tuple[Resolution, ...],
                Field(min_length=1, strict=False),
                AfterValidator(distinct),
                Tag(LIST),
            ],
            by_form,
        ]
        | None
    ) = Field(
        None,
        description="Edge of the training pictures in pixels, 16 to 4096, a multiple of what the "
        "family needs (8 for most); with buckets the edge of a square of their area. A list: each "
        "picture at each of them, samples at the first. null: the base's own size.",
        json_schema_extra=also("size", "image_size"),
    )
    buckets: Buckets | None = Field(
        None,
        description="Keep the pictures' shapes; null: square pictures.",
        json_schema_extra=also("enable_bucket", "bucket", "aspect_ratio_bucketing"),
    )
    upscale: bool = Field(
        False,
        description="Whether pictures smaller than the resolution may be enlarged, which teaches "
        "blur. Otherwise they are refused, or with buckets go to a smaller bucket.",
        json_schema_extra=also("bucket_upscale", "allow_upscale"),
    )
    crop: Literal["center", "random", "smart"] = Field(
        "center",
        description="Where a picture that does not have its bucket's shape is cut: in the middle, "
        "at `random` (a few places, fixed by the picture), or `smart`: where its mask, or else "
        "most of its detail, is.",
        json_schema_extra=also("random_crop", "center_crop"),
    )
    flip: bool = Field(
        False,
        description="Whether half of the visits see the picture mirrored. A character is seldom "
        "symmetric: off by default.",
        json_schema_extra=also("flip_aug", "random_flip", "flip_x"),
    )
    background: Annotated[str, AfterValidator(_background)] = Field(
        "white",
        description="Colour under transparent parts: white, grey, black or `#rrggbb`.",
        json_schema_extra=also("alpha_background"),
    )
    mask: Mask | None = Field(
        None,
        description="Train on the masked part of the pictures; null: on all of them.",
        json_schema_extra=also("masked_loss", "masked_training"),
    )
    prior: Prior | None = Field(
        None,
        description="Pictures of the class beside those of the subject; null: none.",
        json_schema_extra=also("with_prior_preservation", "prior_preservation", "reg"),
    )

    @field_validator("class_noun")
    @classmethod
    def _differs_from_trigger(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("trigger"):
            raise ValueError(f'"{value}" is the trigger as well; the trigger is a new word')
        return value

    @field_validator("captions")
    @classmethod
    def _hold_trigger(cls, value: Captions, info: ValidationInfo) -> Captions:
        trigger = info.data.get("trigger")
        templates = (value.template,) if isinstance(value.template, str) else value.template
        if trigger is None or value.template in TEMPLATE_LISTS or value.trigger == "insert":
            return value
        for text in templates:
            if not any(t in text + value.prefix + value.suffix for t in ("{trigger}", trigger)):
                raise ValueError(
                    f'"{text}" holds neither {{trigger}} nor "{trigger}": it would not teach the '
                    "word"
                )
        return value

    @field_validator("source")
    @classmethod
    def _weighted_alike(cls, value: Any) -> Any:
        parts = value if isinstance(value, tuple) else (value,)
        weighted = [isinstance(part, Pictures) and part.weight is not None for part in parts]
        if any(weighted) and not all(weighted):
            raise ValueError("a weight is a share among sources: give one to each of them")
        return value

    @property
    def sources(self) -> tuple[Pictures, ...]:
        """The sources, each as a section of its own."""
        parts = self.source if isinstance(self.source, tuple) else (self.source,)
        return tuple(Pictures(path=p) if isinstance(p, str) else p for p in parts)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions, the one of the samples first; empty where the base decides."""
        if self.resolution is None:
            return ()
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)
