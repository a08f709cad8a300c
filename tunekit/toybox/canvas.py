"""A canvas that paints the same shapes in any of the world's styles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tunekit.toybox.palette import INK, PAPER, RGB, WHITE, mix

Point = tuple[float, float]

# Every picture is drawn on a canvas of this many pixels a side and reduced to the size asked for.
SIDE = 256


class Layer:
    """One transparent sheet of the picture: background or figure.

    Coordinates are picture units: (0, 0) is the top left corner, (1, 1) the bottom right one.
    """

    def __init__(self, style: str, is_figure: bool) -> None:
        self.style = style
        self.is_figure = is_figure
        self.image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.mask = Image.new("L", (SIDE, SIDE), 0)
        self.mask_draw = ImageDraw.Draw(self.mask)

    def _ink(self, colour: RGB) -> tuple[RGB | None, RGB | None, int]:
        """Fill, stroke and stroke width (canvas pixels) of a shape of this colour in this style."""
        if self.style == "outline":
            line = mix(colour, INK, 0.25) if sum(colour) > 690 else colour
            return mix(colour, PAPER, 0.86), line, 8 if self.is_figure else 5
        if self.style == "neon":
            glow = mix(colour, WHITE, 0.25)
            return mix(colour, (12, 10, 30), 0.86), glow, 7 if self.is_figure else 4
        if self.style == "watercolour":
            return mix(colour, PAPER, 0.12 if self.is_figure else 0.3), None, 0
        return colour, None, 0

    def poly(self, points: Sequence[Point], colour: RGB, body: bool = False) -> None:
        """Paint a polygon; `body` marks the area that a pattern may cover."""
        scaled = [(x * SIDE, y * SIDE) for x, y in points]
        fill, stroke, width = self._ink(colour)
        self.draw.polygon(scaled, fill=fill)
        if stroke is not None:
            self.draw.line([*scaled, scaled[0], scaled[1]], fill=stroke, width=width, joint="curve")
        if body:
            self.mask_draw.polygon(scaled, fill=255)

    def oval(self, centre: Point, rx: float, ry: float, colour: RGB, body: bool = False) -> None:
        """Paint an ellipse with the half axes rx, ry."""
        box = (
            (centre[0] - rx) * SIDE,
            (centre[1] - ry) * SIDE,
            (centre[0] + rx) * SIDE,
            (centre[1] + ry) * SIDE,
        )
        fill, stroke, width = self._ink(colour)
        self.draw.ellipse(box, fill=fill, outline=stroke, width=width if stroke else 0)
        if body:
            self.mask_draw.ellipse(box, fill=255)

    def line(self, points: Sequence[Point], colour: RGB, width: float) -> None:
        """Paint a stroke `width` picture units wide."""
        scaled = [(x * SIDE, y * SIDE) for x, y in points]
        _, stroke, _ = self._ink(colour)
        self.draw.line(
            scaled,
            fill=stroke or self._ink(colour)[0],
            width=max(3, round(width * SIDE)),
            joint="curve",
        )

    def dot(self, centre: Point, radius: float, colour: RGB) -> None:
        """Paint a small solid disc, without an outline in any style (eyes, stars, windows)."""
        x, y, r = centre[0] * SIDE, centre[1] * SIDE, radius * SIDE
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def cover(self, overlay: Image.Image) -> None:
        """Paint an RGBA overlay onto the area marked as body."""
        alpha = ImageChops.multiply(overlay.getchannel("A"), self.mask)
        overlay.putalpha(alpha)
        self.image.alpha_composite(overlay)
        self.draw = ImageDraw.Draw(self.image)


def _rim(layer: Image.Image, colour: RGB, width: int) -> Image.Image:
    """The layer with a rim of `width` canvas pixels around everything painted."""
    grown = layer.getchannel("A").filter(ImageFilter.MaxFilter(2 * width + 1))
    sheet = Image.new("RGBA", layer.size, (*colour, 0))
    sheet.putalpha(grown)
    sheet.alpha_composite(layer)
    return sheet


def _texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of the canvas' size in -1..1 with `cells` bumps a side."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1


def compose(style: str, background: Layer, figures: Sequence[Layer], seed: int) -> Image.Image:
    """Lay the figures onto the background and give the whole the surface of the style.

    Returns an RGB picture of `SIDE` pixels a side; `seed` moves paper grain and paint edges only.
    """
    rng = np.random.default_rng(seed)
    if style == "pixel art":
        return _pixel_art(background, figures)
    picture = background.image.copy()
    for figure in figures:
        sheet = figure.image
        if style == "papercut":
            sheet = _rim(sheet, WHITE, 7)
            shadow = Image.new("RGBA", sheet.size, (30, 26, 40, 0))
            shadow.putalpha(sheet.getchannel("A").point(lambda a: a * 0.62))
            picture.alpha_composite(ImageChops.offset(shadow, 9, 11))
        picture.alpha_composite(sheet)
    image = picture.convert("RGB")
    if style == "watercolour":
        return _watercolour(image, rng)
    if style == "neon":
        glow = image.filter(ImageFilter.BoxBlur(8))
        return ImageChops.screen(image, glow)
    if style == "crayon":
        return _crayon(image, rng)
    return image


def _pixel_art(background: Layer, figures: Sequence[Layer]) -> Image.Image:
    """A grid of 32 x 32 blocks, the figures with a dark rim of one block."""
    cells = (SIDE // 8, SIDE // 8)
    picture = background.image.resize(cells, Image.Resampling.BOX)
    for figure in figures:
        small = figure.image.resize(cells, Image.Resampling.BOX)
        small.putalpha(small.getchannel("A").point(lambda a: 255 if a > 110 else 0))
        picture.alpha_composite(_rim(small, INK, 1))
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _watercolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pale washes of uneven strength that end in a ragged white paper edge."""
    pixels = np.asarray(image.filter(ImageFilter.BoxBlur(2)), np.float32)
    wash = 0.10 * _texture(rng, 9)[..., None]
    paper = np.asarray(PAPER, np.float32)
    pixels = pixels + (paper - pixels) * np.clip(0.06 + wash, 0, 1)
    axis = np.abs(np.linspace(-1, 1, SIDE, dtype=np.float32))
    edge = np.maximum(axis[None, :], axis[:, None]) + 0.05 * _texture(rng, 12)
    bare = np.clip((edge - 0.86) / 0.05, 0, 1)[..., None]
    return Image.fromarray((pixels + (paper - pixels) * bare).clip(0, 255).astype(np.uint8))


def _crayon(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Diagonal strokes that let the paper through."""
    pixels = np.asarray(image, np.float32)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    wave = np.sin((x + y + 6 * _texture(rng, 8)) * (2 * np.pi / 22))
    bare = (0.62 * np.clip(wave * 1.6 - 0.15, 0, 1))[..., None]
    paper = np.asarray(PAPER, np.float32)
    return Image.fromarray((pixels + (paper - pixels) * bare).clip(0, 255).astype(np.uint8))
