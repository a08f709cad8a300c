"""Pictures that guide a drawing: one that it starts from, where it may change, one it is held to.

Read as every other picture is (`data.images`), and known by the sha256 of their files.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tunekit.checkpoint import sha256
from tunekit.data import masks
from tunekit.data.buckets import cover
from tunekit.data.images import PictureError, apply_fit, open_rgb
from tunekit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import nn

SIDES = ("left", "top", "right", "bottom")
_MOST_ADDED = 4096
_STRENGTH = 0.75  # as people know it; what is masked is drawn wholly anew


@dataclass(frozen=True, eq=False)
class Start:
    """A picture that drawing starts from.

    strength: how much of it is drawn anew, above 0 to 1. mask: mode L, white where it may change;
    what is black stays, pixel for pixel; None: all of it may. extended: whether it was made larger,
    so that its size is the drawing's. told: what pictures say of it.
    """

    image: Image.Image
    strength: float
    mask: Image.Image | None
    extended: bool
    told: Mapping[str, JsonValue]

    @classmethod
    def read(
        cls,
        path: Path,
        strength: float | None = None,
        mask: Path | None = None,
        extend: Mapping[str, int] | None = None,
    ) -> Start:
        """Return the picture at `path` as a start.

        strength: None: 0.75, and 1 with a mask or where it is extended. mask: a file of the
        picture's size, white on what is drawn anew. extend: pixels added at "left", "top", "right"
        and "bottom", 0 to 4096, and drawn anew. Raises UserError for files that cannot be read, for
        sizes that differ, and for numbers out of range.
        """
        image = open_rgb(path)
        told: dict[str, JsonValue] = {"name": path.name, "sha256": sha256(path)}
        where = _mask(mask, path, image.size) if mask is not None else None
        if mask is not None:
            told["mask"] = {"name": mask.name, "sha256": sha256(mask)}
        extend = {side: pixels for side, pixels in (extend or {}).items() if pixels}
        for side, pixels in extend.items():
            if side not in SIDES:
                near = did_you_mean(side, SIDES)
                raise UserError(f"extend: {side} is no side{near}; there is: {', '.join(SIDES)}")
            if not 0 <= pixels <= _MOST_ADDED:
                raise UserError(f"extend: {side}={pixels} is not in 0 to {_MOST_ADDED} pixels")
        if extend:
            added = [extend.get(side, 0) for side in SIDES]
            image, where = _extended(image, where, added)
            told["extend"] = {side: extend[side] for side in SIDES if side in extend}
        strength = (_STRENGTH if where is None else 1.0) if strength is None else strength
        if not 0 < strength <= 1:
            raise UserError(f"strength: {strength:g} is not above 0 to 1")
        return cls(image, strength, where, bool(extend), {**told, "strength": strength})

    def fitted(self, width: int, height: int) -> tuple[Image.Image, Image.Image | None]:
        """Return picture and mask at this size: scaled, and its longer side cut at both ends."""
        if self.image.size == (width, height):
            return self.image, self.mask
        plan = cover(*self.image.size, (width, height), 0.5)
        mask = self.mask
        return apply_fit(self.image, plan), None if mask is None else apply_fit(mask, plan)


@dataclass(frozen=True, eq=False)
class Control:
    """A picture that a ControlNet holds the drawing to. scale: how strongly, 0 to 2."""

    image: Image.Image
    scale: float = 1.0
    told: Mapping[str, JsonValue] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, scale: float | None = None) -> Control:
        """Return the picture at `path`, such as edges or depths, as the ControlNet was taught them.

        Raises UserError for what cannot be read, and for a scale out of range.
        """
        scale = 1.0 if scale is None else scale
        if not 0 <= scale <= 2:
            raise UserError(f"control_scale: {scale:g} is not in 0 to 2")
        told: dict[str, JsonValue] = {"name": path.name, "sha256": sha256(path), "scale": scale}
        return cls(open_rgb(path), scale, told)


def guided(
    pipeline: Any,
    width: int,
    height: int,
    start: Start | None,
    control: Control | None,
    controlnet: nn.Module | None,
) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' pipeline for these guides, of the same modules, and what it is called with.

    Raises UserError where diffusers has none for this base.
    """
    size = {"width": width, "height": height}
    if start is None and control is None:
        return pipeline, size
    given: dict[str, Any] = {}
    auto = "AutoPipelineForText2Image"
    if start is not None:
        image, mask = start.fitted(width, height)
        given = {"image": image, "strength": start.strength}
        auto = "AutoPipelineForImage2Image"
        if mask is not None:
            given["mask_image"] = mask
            auto = "AutoPipelineForInpainting"
    made = _of_kind(pipeline, auto, controlnet)
    takes = inspect.signature(made.__call__).parameters
    if control is not None:
        plan = cover(*control.image.size, (width, height), 0.5)
        key = "control_image" if "control_image" in takes else "image"
        given[key] = apply_fit(control.image, plan)
        given["controlnet_conditioning_scale"] = control.scale
    if not takes.keys() >= given.keys():  # one that means something else by a mask
        raise _without(pipeline)
    return made, {**given, **{edge: pixels for edge, pixels in size.items() if edge in takes}}


def _of_kind(pipeline: Any, auto: str, controlnet: nn.Module | None) -> Any:
    import diffusers

    held = {} if controlnet is None else {"controlnet": controlnet}
    try:
        made = getattr(diffusers, auto).from_pipe(pipeline, add_watermarker=False, **held)
    except ValueError:
        raise _without(pipeline) from None
    made.set_progress_bar_config(disable=True)
    return made


def _without(pipeline: Any) -> UserError:
    return UserError(
        f"controlnet: diffusers has no pipeline for this base ({type(pipeline).__name__}) that "
        "takes these pictures together: leave out the mask, the picture to start from, or the "
        "ControlNet"
    )


def _mask(path: Path, picture: Path, size: tuple[int, int]) -> Image.Image:
    try:
        mask = masks.read(path)
    except PictureError as error:
        raise UserError(f"{path}: {error}") from error
    if mask.size != size:
        wide, high = mask.size
        raise UserError(
            f"{path}: is {wide}x{high}, and {picture} is {size[0]}x{size[1]}: save the mask at the "
            "picture's size"
        )
    if mask.getextrema()[1] == 0:
        raise UserError(f"{path}: is black, so nothing may change: make white what is drawn anew")
    return mask


def _extended(
    image: Image.Image, mask: Image.Image | None, added: Sequence[int]
) -> tuple[Image.Image, Image.Image]:
    """Return picture and mask with so many pixels at left, top, right, bottom, to be drawn anew.

    There the picture's edge goes on, as something to start from.
    """
    import numpy as np

    left, top, right, bottom = added
    wide = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    inside = np.zeros(image.size[::-1], np.uint8) if mask is None else np.asarray(mask)
    where = np.pad(inside, ((top, bottom), (left, right)), constant_values=255)
    return Image.fromarray(wide), Image.fromarray(where)
