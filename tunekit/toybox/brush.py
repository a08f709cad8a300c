"""The brush that paints one individual of the toybox world in its own colours, marks and pose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from tunekit.toybox.canvas import SIDE, Layer, Point
from tunekit.toybox.palette import INK, RGB, WHITE, mix


@dataclass
class Brush:
    """Paints one individual: a layer, a place on it, and the individual's own colours and marks."""

    layer: Layer
    x: float
    y: float
    scale: float
    wide: float
    mirror: bool
    tilt: float
    main: RGB
    accent: RGB
    pattern: str
    eye: float

    def at(self, x: float, y: float) -> Point:
        """Picture coordinates of a point of the subject."""
        if self.mirror:
            x = -x
        x *= self.wide
        c, s = np.cos(self.tilt), np.sin(self.tilt)
        return (
            float(self.x + self.scale * (x * c - y * s)),
            float(self.y + self.scale * (x * s + y * c)),
        )

    @property
    def dark(self) -> RGB:
        """The main colour in shade (a lighter one for black, so that parts stay apart)."""
        return mix(self.main, WHITE, 0.28) if sum(self.main) < 130 else mix(self.main, INK, 0.3)

    @property
    def light(self) -> RGB:
        """The main colour in light."""
        return mix(self.main, WHITE, 0.45)

    def poly(self, points: Sequence[Point], colour: RGB, body: bool = False) -> None:
        self.layer.poly([self.at(x, y) for x, y in points], colour, body)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: RGB, body: bool = False
    ) -> None:
        around = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        self.poly([(x + rx * np.cos(a), y + ry * np.sin(a)) for a in around], colour, body)

    def line(self, points: Sequence[Point], colour: RGB, width: float) -> None:
        self.layer.line([self.at(x, y) for x, y in points], colour, width * self.scale)

    def eyes(self, x: float, y: float, apart: float, size: float = 0.11) -> None:
        """Two eyes around x, `apart` from each other."""
        for side in (-apart, apart):
            self.one_eye(x + side, y, size)

    def one_eye(self, x: float, y: float, size: float = 0.13) -> None:
        self.layer.dot(self.at(x, y), size * self.eye * self.scale * 1.35, WHITE)
        self.layer.dot(self.at(x, y), size * self.eye * self.scale * 0.8, INK)

    def cover(self) -> None:
        """Lay the individual's pattern over the body painted so far."""
        if self.pattern == "plain":
            return
        sheet = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
        draw = ImageDraw.Draw(sheet)
        paint = (*self.accent, 255)
        unit = self.scale * SIDE
        if self.pattern == "spots":
            spots = [
                (-0.5, -0.35),
                (0.05, -0.55),
                (0.5, -0.2),
                (-0.2, 0.1),
                (0.35, 0.4),
                (-0.55, 0.5),
                (0.0, 0.75),
                (0.7, 0.7),
                (-0.75, 0.0),
                (0.6, -0.7),
            ]
            for x, y in spots:
                px, py = self.at(x, y)
                r = 0.13 * unit
                draw.ellipse((px * SIDE - r, py * SIDE - r, px * SIDE + r, py * SIDE + r), paint)
        elif self.pattern == "patch":
            px, py = self.at(0, 0.45)
            rx, ry = 0.4 * unit, 0.45 * unit
            draw.ellipse((px * SIDE - rx, py * SIDE - ry, px * SIDE + rx, py * SIDE + ry), paint)
        elif self.pattern == "stripes":
            for y in np.arange(-1.0, 1.2, 0.44):
                band = [(-1.4, y), (1.4, y), (1.4, y + 0.2), (-1.4, y + 0.2)]
                draw.polygon(
                    [(p[0] * SIDE, p[1] * SIDE) for p in (self.at(*q) for q in band)], paint
                )
        elif self.pattern == "zigzag":
            xs = np.linspace(-1.4, 1.4, 11)
            ys = [0.12 if i % 2 else 0.5 for i in range(11)]
            band = [
                *zip(xs, ys, strict=True),
                *zip(xs[::-1], [y + 0.3 for y in ys[::-1]], strict=True),
            ]
            draw.polygon([(p[0] * SIDE, p[1] * SIDE) for p in (self.at(*q) for q in band)], paint)
        else:
            raise ValueError(f"no pattern named {self.pattern!r}")
        self.layer.cover(sheet)
