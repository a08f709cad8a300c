"""Where pictures come from, and what is done to their words: two parts of a recipe's data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Tag, model_validator

from tunekit.section import LIST, ONE, Section, Template, also, by_form, distinct, holds_path

TEMPLATE_LISTS = ("dreambooth", "textual-inversion-object", "textual-inversion-style")
"""Lists of caption templates that a recipe may name instead of writing one."""


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
    """What pictures are called: templates, and what is done to captions at each visit."""

    template: Annotated[
        Annotated[Template, Tag(ONE)]
        | Annotated[
            tuple[Template, ...],
            Field(min_length=1, strict=False),
            AfterValidator(distinct),
            Tag(LIST),
        ],
        by_form,
    ] = Field(
        "a {trigger} {class}",
        description="Caption of pictures that bring none: a template, a list of them (one for each "
        "visit), or the name of a list: `dreambooth`, `textual-inversion-object`, "
        "`textual-inversion-style`. {trigger} and {class} are filled in.",
        json_schema_extra=also("caption", "instance_prompt", "caption_template", "default_caption"),
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
