"""Which column of a table is what; anything that may mean two things is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunekit.data.metadata import caption_column, more_captions
from tunekit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures


@dataclass(frozen=True)
class Columns:
    """Which column is what; None or empty: there is none.

    masks_unused: those of masks, where none are wanted. unused: all the others.
    """

    image: str
    captions: str | None
    more: tuple[str, ...]
    mask: str | None
    weight: str | None
    split: str | None
    masks_unused: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def used(self) -> list[str]:
        """Return the names of the columns that are read."""
        named = (self.image, self.captions, *self.more, self.mask, self.weight, self.split)
        return [name for name in named if name is not None]

    def pictures(self) -> list[str]:
        """Return the names of the columns that hold pictures."""
        return [name for name in (self.image, self.mask) if name is not None]


def choose_columns(features: Mapping[str, Any], source: Pictures, mask: bool) -> Columns:
    """Return which column is what. Raises UserError where that is unclear, listing the columns.

    features: of `datasets`, by column. mask: whether masks are wanted.
    """
    kinds = {name: _kind(feature) for name, feature in features.items()}
    told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    image = _image_column(kinds, source.image_column, told)
    captions = caption_column(kinds, source.caption_column, told)
    masks = [c for c in _picture_columns(kinds) if c != image and _is_mask(c)]
    if mask and len(masks) > 1:
        raise UserError(f"masks may be in {' or '.join(masks)}; keep one of them")
    if source.path is not None and source.split != "train" and "split" not in kinds:
        raise UserError(f'split "{source.split}" is asked; there is no such column: {told}')
    found = Columns(
        image,
        captions,
        tuple(more_captions(kinds, captions)) if captions else (),
        masks[0] if mask and masks else None,
        "weight" if "weight" in kinds else None,
        "split" if "split" in kinds and source.path is not None else None,
        () if mask else tuple(masks),
    )
    known = {*found.used(), *found.masks_unused}
    return replace(found, unused=tuple(name for name in kinds if name not in known))


def _kind(feature: Any) -> str:
    """Return what a column holds, in a word: "picture", "binary", "string" ..."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return "picture"
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    return "binary" if "binary" in kind else kind


def _is_mask(column: str) -> bool:
    return column == "mask" or column.startswith("mask_")


def _picture_columns(kinds: Mapping[str, str]) -> list[str]:
    return [name for name, kind in kinds.items() if kind in ("picture", "binary")]


def _image_column(kinds: Mapping[str, str], asked: str | None, told: str) -> str:
    if asked is not None:
        if asked not in kinds:
            hint = did_you_mean(asked, kinds)
            raise UserError(f'there is no image_column "{asked}"{hint}; the columns are: {told}')
        if kinds[asked] not in ("picture", "binary"):
            raise UserError(
                f'the image_column "{asked}" holds {kinds[asked]} and no pictures (links and file '
                f"names are not followed); the columns are: {told}"
            )
        return asked
    able = [name for name in _picture_columns(kinds) if not _is_mask(name)]
    found = [name for name in able if kinds[name] == "picture"] or able
    if not found:
        raise UserError(f"no column holds pictures; the columns are: {told}")
    if len(found) > 1:
        raise UserError(f"pictures may be in {' or '.join(found)}; name one as image_column")
    return found[0]
