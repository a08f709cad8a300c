"""The data section of a recipe: which pictures, which words, and how they are shown to training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from tunekit.section import Section, Template, Word, also, distinct, holds_path

TEMPLATE_LISTS = ("dreambooth", "textual-inversion-object", "textual-inversion-style")
"""Lists of caption templates that a recipe may name instead of writing one."""

_RGB = re.compile(r"#[0-9a-fA-F]{6}")


class Pictures(Section):
    """One source of pictures: `path` on this disk, or `dataset` on the Hub."""

    path: str | None = Field(
        None,
        min_length=1,
        description="Folder of pictures, .parquet file, or .tar shard (webdataset); `*` in a file "
        "name stands for anything.",
        json_schema_extra=also("folder", "image_dir", "data_files") | holds_path("pictures"),
    )
    dataset: str | None = Field(
        None,
        pattern=r"^[\w.-]{1,96}(/[\w.-]{1,96})?$",
        description="Dataset on the Hugging Face Hub, `owner/name`, read as a stream.",
        json_schema_extra=also("dataset_name", "hub_id", "repo_id"),
    )
    config: str | None = Field(
        None,
        min_length=1,
        description="Configuration of the Hub dataset; null: its only one.",
        json_schema_extra=also("dataset_config_name", "subset"),
    )
    split: str = Field(
        "train",
        min_length=1,
        description="Split that is used: of a Hub dataset, or the rows of metadata whose `split` "
        "says so (rows without one belong to `train`).",
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit of the Hub dataset; null: main."
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Column of the pictures in tables and shards; null: the only one there is.",
        json_schema_extra=also("image_key"),
    )
    caption_column: str | None = Field(
        None,
        min_length=1,
        description="Column of the captions; null: `text` or `caption`, where there is one.",
        json_schema_extra=also("caption_key", "text_column"),
    )
    repeats: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Visits each picture of this source gets in an epoch, 1 to 10,000.",
        json_schema_extra=also("num_repeats", "dataset_repeats"),
    )
    weight: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Share of all visits this source gets, in proportion to the weights of the "
        "others, above 0 to 1000; instead of repeats, and then for every source.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Pictures:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs `path` (on this disk) or `dataset` (on the Hub), one of them")
        if self.path is not None and (self.config or self.revision):
            raise ValueError("`config` and `revision` belong to a Hub `dataset`, not to a `path`")
        if self.weight is not None and self.repeats != 1:
            raise ValueError("has `repeats` and `weight`: take one of them")
        return self


class Captions(Section):
    """The words: templates, and what is done to captions at each visit."""

    template: (
        Template
        | Annotated[
            tuple[Template, ...], Field(min_length=1, strict=False), AfterValidator(distinct)
        ]
    ) = Field(
        "a {trigger} {class}",
        description="Caption of pictures that bring none: a template, a list of them (one for each "
        "visit), or the name of a list: `dreambooth`, `textual-inversion-object`, "
        "`textual-inversion-style`. {trigger} and {class} are filled in.",
        json_schema_extra=also("instance_prompt", "caption_template", "default_caption"),
    )
    trigger: Literal["expect", "insert"] = Field(
        "expect",
        description="Captions without the trigger: `expect` warns, `insert` puts it before the "
        "class noun, or in front with it where the caption does not say it.",
    )
    prefix: str = Field(
        "",
        max_length=1000,
        description="Text before every caption.",
        json_schema_extra=also("caption_prefix"),
    )
    suffix: str = Field(
        "",
        max_length=1000,
        description="Text after every caption.",
        json_schema_extra=also("caption_suffix"),
    )
    separator: str = Field(
        ",",
        min_length=1,
        max_length=10,
        description="What stands between the tags of a caption, for shuffle and tag_dropout.",
        json_schema_extra=also("caption_separator"),
    )
    shuffle: bool = Field(
        False,
        description="Whether a caption's tags come in another order at each visit.",
        json_schema_extra=also("shuffle_caption", "shuffle_tags"),
    )
    keep_tokens: int = Field(
        0,
        ge=0,
        le=1000,
        description="Tags at the start that are neither shuffled nor dropped, 0 to 1000.",
        json_schema_extra=also("keep_tags"),
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of visits trained with an empty caption, 0 to 1 (1 excluded).",
        json_schema_extra=also(
            "caption_dropout", "caption_dropout_rate", "proportion_empty_prompts"
        ),
    )
    tag_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Chance of each tag to be left out at a visit, 0 to 1 (1 excluded).",
        json_schema_extra=also("caption_tag_dropout_rate"),
    )

    @model_validator(mode="after")
    def _used(self) -> Captions:
        if self.keep_tokens and not (self.shuffle or self.tag_dropout):
            raise ValueError("`keep_tokens` does nothing without `shuffle` or `tag_dropout`")
        return self

    @property
    def changes_tags(self) -> bool:
        """Whether a caption's text may differ at every visit."""
        return self.shuffle or self.tag_dropout > 0


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


Resolution = Annotated[int, Field(ge=16, le=4096)]


class Data(Section):
    """Which images, which words?"""

    source: (
        Annotated[str, Field(min_length=1)]
        | Pictures
        | Annotated[
            tuple[Annotated[str, Field(min_length=1)] | Pictures, ...],
            Field(min_length=1, strict=False),
        ]
    ) = Field(
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
        json_schema_extra=also("caption"),
    )
    holdout: str | None = Field(
        None,
        min_length=1,
        description="Folder of real pictures never trained on: the ceiling of the scores. "
        "null: the ceiling is estimated from the training pictures among themselves.",
        json_schema_extra=also("validation_data_dir", "held_out") | holds_path("folder"),
    )
    resolution: (
        Resolution
        | Annotated[
            tuple[Resolution, ...], Field(min_length=1, strict=False), AfterValidator(distinct)
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
