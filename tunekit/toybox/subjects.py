"""The twenty subjects of the toybox world: one small function each, in coordinates of -1..1.

Every subject paints its body first, lets the individual's pattern cover it, then adds details.
The head's crown and neck (where a hat or a scarf sits) stand in `ANCHORS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tunekit.toybox.brush import Brush
from tunekit.toybox.palette import INK, RGB, WHITE


def star(b: Brush) -> None:
    around = [-np.pi / 2 + i * np.pi / 5 for i in range(10)]
    radius = [1.0 if i % 2 == 0 else 0.45 for i in range(10)]
    b.poly(
        [(r * np.cos(a), r * np.sin(a) + 0.05) for a, r in zip(around, radius, strict=True)],
        b.main,
        True,
    )
    b.cover()


def heart(b: Brush) -> None:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    b.poly(list(zip(x.tolist(), y.tolist(), strict=True)), b.main, True)
    b.cover()


def house(b: Brush) -> None:
    b.poly([(-0.75, -0.15), (0.75, -0.15), (0.75, 1), (-0.75, 1)], b.main, True)
    b.cover()
    b.poly([(-1, -0.1), (0, -1), (1, -0.1)], b.dark)
    b.poly([(-0.2, 0.35), (0.2, 0.35), (0.2, 1), (-0.2, 1)], b.light)
    for x in (-0.48, 0.48):
        b.poly([(x - 0.15, 0.1), (x + 0.15, 0.1), (x + 0.15, 0.4), (x - 0.15, 0.4)], WHITE)


def car(b: Brush) -> None:
    b.poly(
        [
            (-1, 0.05),
            (-0.6, 0.0),
            (-0.35, -0.5),
            (0.4, -0.5),
            (0.65, 0.0),
            (1, 0.1),
            (1, 0.6),
            (-1, 0.6),
        ],
        b.main,
        True,
    )
    b.cover()
    b.poly([(-0.43, -0.05), (-0.25, -0.38), (-0.02, -0.38), (-0.02, -0.05)], WHITE)
    b.poly([(0.08, -0.05), (0.08, -0.38), (0.3, -0.38), (0.45, -0.05)], WHITE)
    for x in (-0.55, 0.55):
        b.oval(x, 0.62, 0.3, 0.3, INK)
        b.oval(x, 0.62, 0.13, 0.13, (190, 190, 196))


def boat(b: Brush) -> None:
    b.line([(0, 0.4), (0, -1)], (110, 80, 60), 0.1)
    b.poly([(0.08, -0.95), (0.85, 0.2), (0.08, 0.2)], WHITE)
    b.poly([(-0.08, -0.7), (-0.65, 0.2), (-0.08, 0.2)], b.light)
    b.poly([(-1, 0.35), (1, 0.35), (0.65, 0.95), (-0.65, 0.95)], b.main, True)
    b.cover()


def rocket(b: Brush) -> None:
    b.poly([(-0.3, 0.6), (0, 1.05), (0.3, 0.6)], (250, 160, 40))
    b.poly([(-0.35, 0.1), (-0.8, 0.75), (-0.35, 0.6)], b.dark)
    b.poly([(0.35, 0.1), (0.8, 0.75), (0.35, 0.6)], b.dark)
    b.poly(
        [
            (0, -1.05),
            (0.28, -0.65),
            (0.4, -0.1),
            (0.36, 0.65),
            (-0.36, 0.65),
            (-0.4, -0.1),
            (-0.28, -0.65),
        ],
        b.main,
        True,
    )
    b.cover()
    b.oval(0, -0.2, 0.19, 0.19, WHITE)


def mushroom(b: Brush) -> None:
    b.poly([(-0.28, 0.0), (0.28, 0.0), (0.36, 1), (-0.36, 1)], (244, 230, 208))
    t = np.linspace(np.pi, 2 * np.pi, 24)
    b.poly([(np.cos(a), 0.12 + 1.0 * np.sin(a)) for a in t], b.main, True)
    b.cover()
    if b.pattern == "plain":
        for x, y, r in ((-0.45, -0.25, 0.15), (0.1, -0.55, 0.16), (0.5, -0.15, 0.13)):
            b.oval(x, y, r, r, WHITE)


def cup(b: Brush) -> None:
    b.oval(0.72, 0.2, 0.34, 0.36, b.dark)
    b.oval(0.72, 0.2, 0.16, 0.18, WHITE)
    b.poly([(-0.8, -0.5), (0.7, -0.5), (0.55, 0.9), (-0.65, 0.9)], b.main, True)
    b.cover()
    b.oval(-0.05, -0.5, 0.75, 0.18, b.light)


def umbrella(b: Brush) -> None:
    b.line([(0, -0.2), (0, 0.85), (0.25, 0.95), (0.32, 0.7)], INK, 0.1)
    t = np.linspace(np.pi, 2 * np.pi, 24)
    b.poly([(np.cos(a), 0.15 + 1.05 * np.sin(a)) for a in t], b.main, True)
    b.cover()
    for x in (-0.66, 0.0, 0.66):
        b.oval(x, 0.17, 0.3, 0.14, b.dark)


def flower(b: Brush) -> None:
    b.line([(0, 0), (0, 1)], (52, 130, 70), 0.14)
    b.oval(0.32, 0.65, 0.3, 0.13, (52, 130, 70))
    for i in range(6):
        a = i * np.pi / 3
        b.oval(0.46 * np.cos(a), -0.35 + 0.46 * np.sin(a), 0.32, 0.32, b.main, True)
    b.cover()
    b.oval(0, -0.35, 0.26, 0.26, (250, 214, 60) if b.main[2] > 90 or b.main[1] < 100 else WHITE)


def cat(b: Brush) -> None:
    b.line([(0.5, 0.8), (0.95, 0.6), (0.9, 0.1)], b.dark, 0.2)
    b.oval(0, 0.6, 0.6, 0.45, b.main, True)
    b.poly([(-0.62, -0.3), (-0.6, -1.0), (-0.12, -0.62)], b.main, True)
    b.poly([(0.62, -0.3), (0.6, -1.0), (0.12, -0.62)], b.main, True)
    b.oval(0, -0.22, 0.66, 0.52, b.main, True)
    b.cover()
    b.eyes(0, -0.28, 0.27)
    b.oval(0, 0.0, 0.1, 0.07, (240, 150, 160))
    b.line([(-0.25, 0.05), (-0.8, 0.0)], INK, 0.04)
    b.line([(0.25, 0.05), (0.8, 0.0)], INK, 0.04)


def bird(b: Brush) -> None:
    b.line([(-0.1, 0.7), (-0.1, 1.0)], (240, 150, 40), 0.08)
    b.line([(0.2, 0.7), (0.2, 1.0)], (240, 150, 40), 0.08)
    b.poly([(-0.6, 0.2), (-1.1, -0.15), (-1.0, 0.45)], b.dark)
    b.oval(0, 0.25, 0.72, 0.55, b.main, True)
    b.oval(0.45, -0.42, 0.42, 0.4, b.main, True)
    b.cover()
    b.poly([(0.8, -0.5), (1.2, -0.35), (0.8, -0.22)], (248, 164, 40))
    b.oval(-0.12, 0.25, 0.38, 0.26, b.dark)
    b.one_eye(0.55, -0.5)


def fish(b: Brush) -> None:
    b.poly([(-0.5, 0.0), (-1.1, -0.5), (-1.1, 0.5)], b.dark)
    b.poly([(-0.2, -0.4), (0.2, -0.85), (0.4, -0.35)], b.dark)
    b.oval(0.15, 0.0, 0.85, 0.55, b.main, True)
    b.cover()
    b.poly([(-0.05, 0.1), (-0.4, 0.5), (0.15, 0.35)], b.dark)
    b.one_eye(0.6, -0.12, 0.14)


def rabbit(b: Brush) -> None:
    for x in (-0.28, 0.28):
        b.oval(x, -0.78, 0.17, 0.42, b.main, True)
    b.oval(0, 0.6, 0.52, 0.45, b.main, True)
    b.oval(0, -0.1, 0.52, 0.45, b.main, True)
    b.cover()
    for x in (-0.28, 0.28):
        b.oval(x, -0.74, 0.08, 0.3, (246, 178, 190))
    b.eyes(0, -0.15, 0.22)
    b.oval(0, 0.08, 0.08, 0.06, (240, 130, 150))
    b.oval(0.55, 0.75, 0.16, 0.16, WHITE)


def bear(b: Brush) -> None:
    for x in (-0.48, 0.48):
        b.oval(x, -0.72, 0.25, 0.25, b.main, True)
    b.oval(0, 0.55, 0.72, 0.5, b.main, True)
    b.oval(0, -0.3, 0.62, 0.52, b.main, True)
    b.cover()
    b.oval(0, -0.1, 0.28, 0.22, b.light)
    b.oval(0, -0.17, 0.11, 0.08, INK)
    b.eyes(0, -0.42, 0.26, 0.09)


def robot(b: Brush) -> None:
    b.line([(0, -0.8), (0, -1.05)], INK, 0.08)
    b.oval(0, -1.05, 0.11, 0.11, (240, 200, 60))
    for x in (-0.35, 0.35):
        b.poly([(x - 0.14, 0.7), (x + 0.14, 0.7), (x + 0.14, 1.05), (x - 0.14, 1.05)], b.dark)
    for x in (-0.75, 0.75):
        b.poly([(x - 0.14, 0.05), (x + 0.14, 0.05), (x + 0.14, 0.6), (x - 0.14, 0.6)], b.dark)
    b.poly([(-0.6, -0.02), (0.6, -0.02), (0.6, 0.75), (-0.6, 0.75)], b.main, True)
    b.poly([(-0.55, -0.8), (0.55, -0.8), (0.55, -0.1), (-0.55, -0.1)], b.main, True)
    b.cover()
    b.eyes(0, -0.5, 0.25, 0.13)
    b.line([(-0.25, -0.22), (0.25, -0.22)], INK, 0.08)


def ghost(b: Brush) -> None:
    t = np.linspace(np.pi, 2 * np.pi, 24)
    top = [(0.75 * np.cos(a), -0.2 + 0.8 * np.sin(a)) for a in t]
    hem = [
        (0.75, 1.0),
        (0.5, 0.72),
        (0.25, 1.0),
        (0, 0.72),
        (-0.25, 1.0),
        (-0.5, 0.72),
        (-0.75, 1.0),
    ]
    b.poly([*top, *hem], b.main, True)
    b.cover()
    b.eyes(0, -0.3, 0.27, 0.14)
    b.oval(0, 0.12, 0.13, 0.17, INK)


def snail(b: Brush) -> None:
    b.line([(0.75, 0.3), (0.7, -0.25)], b.light, 0.09)
    b.line([(0.9, 0.3), (1.02, -0.2)], b.light, 0.09)
    b.oval(0.0, 0.75, 1.0, 0.2, b.light)
    b.oval(0.8, 0.5, 0.24, 0.3, b.light)
    b.oval(-0.15, 0.05, 0.7, 0.68, b.main, True)
    b.cover()
    t = np.linspace(0, 4 * np.pi, 40)
    b.line([(-0.15 + 0.04 * a * np.cos(a), 0.05 + 0.04 * a * np.sin(a)) for a in t], b.dark, 0.12)
    b.one_eye(0.7, -0.28, 0.1)
    b.one_eye(1.02, -0.23, 0.1)


def butterfly(b: Brush) -> None:
    for side in (-1, 1):
        b.oval(0.52 * side, -0.38, 0.48, 0.48, b.main, True)
        b.oval(0.42 * side, 0.45, 0.38, 0.42, b.main, True)
    b.cover()
    for side in (-1, 1):
        b.oval(0.55 * side, -0.38, 0.2, 0.2, b.light)
        b.line([(0, -0.6), (0.28 * side, -1.0)], INK, 0.06)
    b.oval(0, 0.0, 0.12, 0.75, INK)


def octopus(b: Brush) -> None:
    for x, bend in ((-0.7, -0.25), (-0.35, -0.1), (0.0, 0.08), (0.35, 0.1), (0.7, 0.25)):
        b.line([(x * 0.7, 0.1), (x, 0.6), (x + bend, 1.0)], b.dark, 0.22)
    b.oval(0, -0.25, 0.7, 0.68, b.main, True)
    b.cover()
    b.eyes(0, -0.2, 0.26, 0.13)
    b.line([(-0.15, 0.14), (0.15, 0.14)], INK, 0.07)


DRAW: dict[str, Callable[[Brush], None]] = {
    f.__name__: f
    for f in (
        star, house, car, rocket, mushroom, cat, fish, bird, robot, ghost,
        rabbit, umbrella, heart, boat, cup, flower, bear, snail, butterfly, octopus,
    )
}  # fmt: skip

CREATURES: tuple[str, ...] = (
    "cat", "fish", "bird", "robot", "ghost", "rabbit", "bear", "snail", "butterfly", "octopus",
)  # fmt: skip

# Crown (where a hat sits) and neck (where a scarf goes) with the half width there.
ANCHORS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cat": ((0, -0.66, 0.42), (0, 0.26, 0.5)),
    "rabbit": ((0, -0.48, 0.36), (0, 0.3, 0.42)),
    "bear": ((0, -0.76, 0.4), (0, 0.18, 0.52)),
    "robot": ((0, -0.8, 0.48), (0, -0.06, 0.52)),
    "ghost": ((0, -0.92, 0.4), (0, 0.42, 0.72)),
    "bird": ((0.42, -0.76, 0.32), (0.35, -0.08, 0.44)),
    "octopus": ((0, -0.85, 0.42), (0, 0.36, 0.52)),
}


def hat(b: Brush, where: tuple[float, float, float], colour: RGB) -> None:
    x, y, half = where
    b.poly(
        [(x - half, y + 0.06), (x + half, y + 0.06), (x + half, y - 0.08), (x - half, y - 0.08)],
        colour,
    )
    b.poly(
        [
            (x - half * 0.62, y - 0.06),
            (x + half * 0.62, y - 0.06),
            (x + half * 0.55, y - 0.5),
            (x - half * 0.55, y - 0.5),
        ],
        colour,
    )


def scarf(b: Brush, where: tuple[float, float, float], colour: RGB) -> None:
    x, y, half = where
    b.poly(
        [(x - half, y - 0.1), (x + half, y - 0.1), (x + half, y + 0.12), (x - half, y + 0.12)],
        colour,
    )
    b.poly(
        [
            (x + half * 0.3, y),
            (x + half * 0.75, y),
            (x + half * 0.75, y + 0.5),
            (x + half * 0.3, y + 0.5),
        ],
        colour,
    )


WEAR: dict[str, Callable[[Brush, tuple[float, float, float], RGB], None]] = {
    "hat": hat,
    "scarf": scarf,
}
