"""Curves and bars as inline SVG and plain numbers: no script, no font, no second file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, NARROW, HEIGHT = 640, 420, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30
MOST_POINTS = 800

Points = Sequence[tuple[float, float]]


def smooth(values: Sequence[float], weight: float | None = None) -> list[float]:
    """Return the bias-corrected exponential mean of `values` (Adam's: Kingma and Ba, ICLR 2015).

    `weight` of the past, 0 to below 1; None: about a twentieth of the run, as a step's loss says
    more about its random timestep than about the model.
    """
    smoother = Smoother.over(len(values)) if weight is None else Smoother(weight)
    return [smoother(value) for value in values]


@dataclass
class Smoother:
    """`smooth`, a value at a time."""

    weight: float
    total: float = 0.0
    norm: float = 0.0

    @classmethod
    def over(cls, steps: int) -> Smoother:
        """Return the usual smoothing for a run of so many steps."""
        return cls(1 - 1 / max(5.0, steps / 20))

    def __call__(self, value: float) -> float:
        """Take up a value and return the mean so far."""
        self.total = self.weight * self.total + (1 - self.weight) * value
        self.norm = self.weight * self.norm + (1 - self.weight)
        return self.total / self.norm


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points and the last one, evenly chosen."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that cover low..high, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def label(value: float) -> str:
    """Return a short axis label: 0.05, 400, 1e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Line:
    """A curve: (x, y) points and the CSS class that draws it."""

    points: Points
    css: str


def chart(lines: Sequence[Line], title: str, top: float | None = None, width: int = WIDTH) -> str:
    """Return an SVG of `lines` over steps; y starts at 0 and ends at `top` or the highest point.

    Points above `top` are drawn at the edge.
    """
    every = [point for line in lines for point in line.points]
    if not every:
        return ""
    right = max(x for x, _ in every)
    left = min(x for x, _ in every)
    high = top if top is not None else max(y for _, y in every)
    high = high or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = min(1.0, max(0.0, y / high))
        return (
            round(LEFT + across * (width - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{title}" class="chart">',
        f"<title>{title}</title>",
    ]
    for value in ticks(0, high):
        _, y = at(left, value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4}">{label(value)}</text>')
    for value in ticks(left, right, width // 100):
        x, _ = at(value, 0)
        parts.append(f'<text class="x" x="{x}" y="{HEIGHT - 8}">{label(value)}</text>')
    for line in lines:
        path = " ".join("{},{}".format(*at(x, y)) for x, y in thin(line.points))
        parts.append(f'<polyline class="{line.css}" points="{path}"/>')
    parts.append("</svg>")
    return "".join(parts)


def loss_chart(points: Points) -> str:
    """Return the loss curve: each step faint, the smoothed loss on top.

    The axis ends at the 98th percentile: one wild step shall not flatten the curve.
    """
    if not points:
        return ""
    running = smooth([y for _, y in points])
    values = sorted(y for _, y in points)
    top = 1.05 * values[min(len(values) - 1, int(0.98 * len(values)))]
    smoothed = [(x, y) for (x, _), y in zip(points, running, strict=True)]
    return chart([Line(points, "raw"), Line(smoothed, "line")], "Loss by step", top)


def rate_chart(points: Points) -> str:
    """Return the learning-rate curve."""
    return chart([Line(points, "line")], "Learning rate by step", width=NARROW) if points else ""


@dataclass(frozen=True)
class Bar:
    """Where a share stands on a track that holds 0, 1 and the share; percentages of its width."""

    zero: float
    one: float
    value: float

    @property
    def start(self) -> float:
        """Where the filled part begins."""
        return min(self.zero, self.value)

    @property
    def length(self) -> float:
        """How long the filled part is."""
        return abs(self.value - self.zero)


def bar(share: float | None) -> Bar | None:
    """Return the bar of a share; a share below 0 or above 1 widens the track, it is not cut."""
    if share is None:
        return None
    low, high = min(0.0, share), max(1.0, share)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return Bar(place(0.0), place(1.0), place(share))
