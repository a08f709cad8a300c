"""Pictures as files that carry the settings they were drawn with, and labelled grids."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import JsonValue

from tunekit.errors import UserError
from tunekit.wholefile import whole_file

KEY = "tunekit"  # PNG text: every setting as JSON
READABLE = "parameters"  # PNG text: the same for people, in the form that web UIs display

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""The kinds of file that pictures are saved as, and what their names end in."""
_LONGEST = 100_000  # characters of settings
_MOST_EXIF = 65_000  # bytes; a JPEG has room for no more
# EXIF's places: a description of the picture, which is ASCII; the part with comments; a comment.
_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286

MARGIN = 8
SMALLEST_CELL = 160  # pixels; smaller pictures are enlarged so that their labels can be read
LABEL_SIZE = 13
LABEL_LINES = 3


def save_png(image: Image.Image, path: Path, settings: Mapping[str, JsonValue]) -> None:
    """Write `image` to `path` with `settings` inside it, whole or not at all.

    The PNG text `tunekit` holds the settings as JSON (see `read_settings`), `parameters` says
    them to people. Raises UserError with the path where the disk refuses.
    """
    info = PngInfo()
    info.add_text(READABLE, readable(settings))
    info.add_text(KEY, json.dumps(dict(settings), ensure_ascii=False))
    _write(image, path, "PNG", pnginfo=info)


def save(image: Image.Image, path: Path, settings: Mapping[str, JsonValue]) -> None:
    """Write `image` as the kind of file that `path` ends in (`SUFFIXES`), as `save_png` does.

    In JPEG and WebP the settings stand in EXIF: as JSON in the description, and for people in the
    comment that web UIs display. WebP keeps every pixel, JPEG nearly. Raises UserError also for
    settings that EXIF has no room for.
    """
    if path.suffix == SUFFIXES["png"]:
        save_png(image, path, settings)
        return
    exif = Image.Exif()
    exif[_DESCRIPTION] = f"{KEY} {json.dumps(dict(settings))}"
    exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + readable(settings).encode("utf-16-be")
    data = exif.tobytes()
    if len(data) > _MOST_EXIF:
        raise UserError(
            f"{path}: its settings are {len(data)} bytes, and such a file has room for "
            f"{_MOST_EXIF}: save it as PNG"
        )
    if path.suffix == SUFFIXES["webp"]:
        _write(image, path, "WEBP", exif=data, lossless=True)
    else:
        _write(image, path, "JPEG", exif=data, quality=95, subsampling=0)


def _write(image: Image.Image, path: Path, kind: str, **how: Any) -> None:
    try:
        with whole_file(path) as part:
            image.save(part, format=kind, **how)
    except OSError as fault:
        why = fault.strerror or str(fault)
        raise UserError(f"{path}: cannot be written: {why}") from fault


def read_settings(path: Path) -> dict[str, JsonValue]:
    """Return the settings that `save_png` or `save` wrote into the picture at `path`.

    Nothing but the file's head is decoded, and no more than 100,000 characters are read. Raises
    UserError where the file is missing, is no picture, or was not drawn by tunekit.
    """
    with warnings.catch_warnings():
        # Of the size of what nobody decodes here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                text = image.info.get(KEY) if image.format == "PNG" else _described(image)
        except FileNotFoundError as fault:
            raise UserError(f"{path}: no such file") from fault
        except UnidentifiedImageError:
            raise UserError(f"{path}: not a picture that can be read (PNG, JPEG, WebP)") from None
        except Exception as fault:  # hostile bytes make decoders raise anything; each is a fault
            raise UserError(f"{path}: not a picture that can be read ({fault})") from fault
    if not isinstance(text, str):
        raise UserError(f"{path}: holds no settings of tunekit (was it re-saved by another tool?)")
    if len(text) > _LONGEST:
        raise UserError(f"{path}: its settings are {len(text)} characters; {_LONGEST} are read")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path}: its settings are not JSON ({fault})") from fault
    if not isinstance(settings, dict):
        raise UserError(f"{path}: its settings are not a JSON object")
    return settings


def _described(image: Image.Image) -> str | None:
    """Return the JSON in the EXIF description of a picture of ours; None of another's."""
    text = image.getexif().get(_DESCRIPTION)
    if not isinstance(text, str) or not text.startswith(f"{KEY} "):
        return None
    return text.removeprefix(f"{KEY} ")


def readable(settings: Mapping[str, JsonValue]) -> str:
    """Return `settings` as three lines: prompt, negative prompt, and the others as `Key: value`."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    names = {
        "steps": "Steps",
        "scheduler": "Sampler",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "base": "Model",
        "scale": "Adapter scale",
        "version": "Version",
    }
    parts = [f"{names[key]}: {settings[key]}" for key in names if settings.get(key) is not None]
    if settings.get("width") is not None and settings.get("height") is not None:
        parts.insert(min(4, len(parts)), f"Size: {settings['width']}x{settings['height']}")
    adapters = settings.get("adapters")
    if isinstance(adapters, list):
        parts += [
            f"Adapter: {adapter.get('name')} {adapter.get('weight')}"
            for adapter in adapters
            if isinstance(adapter, dict)
        ]
    return "\n".join([*lines, ", ".join(parts)])


def grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """Return one picture with `images` in rows of `columns`, each with its label beneath.

    Small pictures are enlarged by a whole factor, without smoothing, until a label fits. A label
    takes up to three lines; a longer one ends in an ellipsis. `labels` is as long as `images`.
    """
    assert images
    assert columns >= 1
    assert labels is None or len(labels) == len(images)
    columns = min(columns, len(images))
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    factor = max(1, math.ceil(SMALLEST_CELL / width))
    cell_width, picture_height = width * factor, height * factor
    font = ImageFont.load_default(LABEL_SIZE)
    wrapped = [_wrap(label, font, cell_width) for label in labels] if labels else []
    line_height = LABEL_SIZE + 4
    label_height = max((len(lines) for lines in wrapped), default=0) * line_height
    label_height += 4 if label_height else 0
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB",
        (
            MARGIN + columns * (cell_width + MARGIN),
            MARGIN + rows * (picture_height + label_height + MARGIN),
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        left = MARGIN + column * (cell_width + MARGIN)
        top = MARGIN + row * (picture_height + label_height + MARGIN)
        size = (image.width * factor, image.height * factor)
        enlarged = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        for number, line in enumerate(wrapped[place] if wrapped else ()):
            y = top + picture_height + 4 + number * line_height
            draw.text((left, y), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` into at most LABEL_LINES lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        candidate = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(candidate) <= width:
            lines[-1] = candidate
        else:
            lines.append(word)
    kept = lines[:LABEL_LINES]
    if len(lines) > LABEL_LINES:
        kept[-1] += "…"
    return [_cut(line, font, width) for line in kept]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten `line` until it is at most `width` pixels wide, ending it in an ellipsis."""
    if font.getlength(line) <= width:
        return line
    bare = line.removesuffix("…")
    while bare and font.getlength(f"{bare}…") > width:
        bare = bare[:-1]
    return f"{bare}…"
