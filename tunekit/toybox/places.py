"""The eight places of the toybox world: one small function each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tunekit.toybox.canvas import Layer
from tunekit.toybox.palette import RGB, WHITE

Rng = np.random.Generator


def _band(layer: Layer, top: float, bottom: float, colour: RGB) -> None:
    layer.poly([(-0.1, top), (1.1, top), (1.1, bottom), (-0.1, bottom)], colour)


def _hill(layer: Layer, x: float, y: float, width: float, height: float, colour: RGB) -> None:
    layer.oval((x, y), width, height, colour)


def beach(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 0.5, (150, 214, 246))
    layer.oval((rng.choice([0.14, 0.86]), 0.15), 0.09, 0.09, (255, 236, 120))
    _band(layer, 0.42, 0.66, (44, 150, 200))
    _band(layer, 0.62, 1.1, (242, 216, 158))


def forest(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 0.75, (196, 228, 200))
    for x in np.linspace(0.05, 0.95, 5) + rng.uniform(-0.04, 0.04, 5):
        top = rng.uniform(0.02, 0.16)
        layer.poly(
            [(x - 0.02, 0.5), (x + 0.02, 0.5), (x + 0.02, 0.8), (x - 0.02, 0.8)], (104, 76, 52)
        )
        layer.poly([(x, top), (x + 0.13, 0.6), (x - 0.13, 0.6)], (42, 110, 70))
    _band(layer, 0.7, 1.1, (112, 168, 92))


def city(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 1.1, (208, 212, 222))
    for x in np.linspace(-0.02, 0.82, 5):
        top = rng.uniform(0.06, 0.34)
        shade = int(rng.integers(112, 150))
        layer.poly(
            [(x, top), (x + 0.17, top), (x + 0.17, 0.8), (x, 0.8)], (shade, shade, shade + 12)
        )
        for wy in np.arange(top + 0.07, 0.7, 0.12):
            for wx in (x + 0.05, x + 0.12):
                layer.dot((wx, wy), 0.017, (255, 240, 170))
    _band(layer, 0.74, 1.1, (88, 88, 96))


def snow(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 1.1, (176, 206, 232))
    layer.poly([(0.1, 0.72), (0.36, 0.2), (0.62, 0.72)], (140, 164, 200))
    layer.poly([(0.48, 0.72), (0.74, 0.28), (1.0, 0.72)], (124, 148, 186))
    layer.poly([(0.29, 0.34), (0.36, 0.2), (0.43, 0.34)], WHITE)
    layer.poly([(0.67, 0.4), (0.74, 0.28), (0.81, 0.4)], WHITE)
    _band(layer, 0.68, 1.1, (244, 248, 252))
    for _ in range(12):
        layer.dot((rng.random(), rng.uniform(0.02, 0.6)), 0.017, WHITE)


def night(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 1.1, (34, 44, 104))
    side = rng.choice([0.16, 0.84])
    layer.oval((side, 0.16), 0.09, 0.09, (252, 244, 206))
    for _ in range(14):
        layer.dot((rng.random(), rng.uniform(0.02, 0.62)), 0.013, (250, 246, 214))
    _hill(layer, 0.25, 1.0, 0.6, 0.3, (48, 74, 92))
    _hill(layer, 0.8, 1.02, 0.6, 0.3, (40, 62, 84))


def desert(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 1.1, (252, 208, 150))
    layer.oval((rng.uniform(0.3, 0.7), 0.22), 0.12, 0.12, (246, 120, 70))
    _hill(layer, 0.2, 1.0, 0.6, 0.38, (222, 150, 84))
    _hill(layer, 0.85, 1.05, 0.6, 0.38, (204, 128, 68))
    x = rng.choice([0.1, 0.9])
    green = (70, 130, 84)
    layer.poly([(x - 0.03, 0.42), (x + 0.03, 0.42), (x + 0.03, 0.78), (x - 0.03, 0.78)], green)
    layer.line([(x, 0.62), (x + 0.07, 0.62), (x + 0.07, 0.52)], green, 0.035)
    layer.line([(x, 0.66), (x - 0.07, 0.66), (x - 0.07, 0.56)], green, 0.035)


def room(layer: Layer, rng: Rng) -> None:
    _band(layer, -0.1, 1.1, (240, 222, 204))
    x = rng.choice([0.22, 0.78])
    layer.poly(
        [(x - 0.15, 0.1), (x + 0.15, 0.1), (x + 0.15, 0.42), (x - 0.15, 0.42)], (170, 220, 244)
    )
    layer.line([(x, 0.1), (x, 0.42)], WHITE, 0.02)
    layer.line([(x - 0.15, 0.26), (x + 0.15, 0.26)], WHITE, 0.02)
    _band(layer, 0.72, 1.1, (170, 112, 78))
    layer.line([(0.0, 0.72), (1.0, 0.72)], WHITE, 0.025)


def underwater(layer: Layer, rng: Rng) -> None:
    for i in range(5):
        depth = i / 4
        _band(
            layer,
            i * 0.22 - 0.1,
            1.1,
            (round(90 - 62 * depth), round(200 - 90 * depth), round(220 - 62 * depth)),
        )
    for x in rng.uniform(0.02, 0.98, 5):
        height = rng.uniform(0.2, 0.4)
        layer.line(
            [(x, 1.0), (x + 0.04, 1 - height * 0.5), (x - 0.02, 1 - height)], (30, 150, 110), 0.035
        )
    for _ in range(8):
        layer.dot(
            (rng.random(), rng.uniform(0.05, 0.9)), rng.uniform(0.012, 0.026), (214, 244, 250)
        )


DRAW: dict[str, Callable[[Layer, Rng], None]] = {
    f.__name__: f for f in (beach, forest, city, snow, night, desert, room, underwater)
}
