"""Which shape a picture is trained in, and what of it is cut off: whole numbers, no pixels.

Buckets. With `data.buckets` a picture keeps its shape as nearly as a grid allows. The shapes of a
resolution R are all w x h whose edges are multiples of lcm(step, multiple) from `min` to `max`, one
of them as long as w * h <= R * R lets it be: so no picture takes more memory than a square of R.

Which one. The bucket whose aspect is nearest, measured as |log(w / h) - log(W / H)|; of two equally
near ones the larger, then the wider. A picture that would have to be enlarged for it (and
`data.upscale` is off) gets a smaller bucket: of those inside the picture and within one step of its
edges the one with the nearest aspect. Without `data.buckets` there is one shape, the square.

The crop. The largest box of the bucket's aspect in whole pixels of the picture; `place` says where
along the side that has something to spare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.schema_data import Buckets, Data

MOST_ENLARGED = 8
Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """What is cut from a picture, and the size it is scaled to.

    left, top, right, bottom: pixels of the picture, inside it. width, height: pixels of the
    result, which is the bucket.
    """

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    @property
    def scale(self) -> float:
        """Size in the result over size in the picture; above 1 the picture is enlarged."""
        # Whole pixels make the two axes differ by less than one of them.
        return max(self.width / (self.right - self.left), self.height / (self.bottom - self.top))

    def told(self, width: int, height: int, mirrored: bool = False) -> tuple[int, ...]:
        """Return what denoisers that mind sizes are told of this crop of width x height pixels.

        The picture's height and width; the crop's top and left edge in the picture as it is scaled
        to the result; the result's height and width (Podell et al. 2023, "SDXL", section 2.2).
        mirrored: the edge in the mirrored picture.
        """
        left = width - self.right if mirrored else self.left
        down, across = self.height / (self.bottom - self.top), self.width / (self.right - self.left)
        return height, width, round(self.top * down), round(left * across), self.height, self.width

    def cut(self, width: int, height: int) -> float:
        """Return the share of a picture of width x height that is cut off: 0 to below 1."""
        return 1 - (self.right - self.left) * (self.bottom - self.top) / (width * height)


def cover(width: int, height: int, bucket: Size, place: float = 0.5) -> Fit:
    """Return the largest box of the bucket's aspect in a picture of width x height.

    place: 0..1, where along the side with something to spare: 0 left or top, 0.5 the middle, 1
    right or bottom.
    """
    assert 0 <= place <= 1
    across, down = bucket
    if width * down >= height * across:
        wide, high = max(1, min(width, _round(height * across, down))), height
    else:
        wide, high = width, max(1, min(height, _round(width * down, across)))
    left, top = round(place * (width - wide)), round(place * (height - high))
    return Fit(left, top, left + wide, top + high, across, down)


def sizes(resolution: int, buckets: Buckets | None, multiple: int) -> tuple[Size, ...]:
    """Return every bucket's (width, height) in pixels, narrow ones first; see this module's page.

    resolution: edge in pixels. multiple: what edges must be multiples of for the family. Smaller
    pictures may get smaller buckets than these. Raises UserError where no bucket is left.
    """
    if buckets is None:
        return ((resolution, resolution),)
    unit, least, most = _bounds(resolution, buckets, multiple)
    found: set[Size] = set()
    for edge in range(least, most + 1, unit):
        other = min(resolution**2 // edge // unit * unit, most)
        if other >= least:
            found |= {(edge, other), (other, edge)}
    if not found:
        raise UserError(_impossible(resolution, buckets, multiple))
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def plan(
    width: int, height: int, resolution: int, data: Data, multiple: int, place: float = 0.5
) -> Fit:
    """Return the bucket of a picture of width x height pixels, and its crop.

    resolution, multiple: as for `sizes`. place: as for `cover`. Raises UserError where `faults`
    has something to say.
    """
    if fault := faults(width, height, resolution, data, multiple):
        raise UserError(fault)
    bucket = _bucket(width, height, resolution, data, multiple)
    assert bucket is not None
    return cover(width, height, bucket, place)


def faults(width: int, height: int, resolution: int, data: Data, multiple: int) -> str | None:
    """Return why a picture of width x height cannot be used, and what to do; None if it can.

    Raises UserError where the buckets themselves are impossible.
    """
    bucket = _bucket(width, height, resolution, data, multiple)
    if bucket is None:
        return _too_small(width, height, resolution, data, multiple)
    if cover(width, height, bucket).scale > MOST_ENLARGED:
        return (
            f"{width}x{height} would be enlarged more than {MOST_ENLARGED} times for a resolution "
            f"of {resolution}; take a larger picture or lower data.resolution"
        )
    return None


def usable(width: int, height: int, resolution: int, data: Data, multiple: int) -> bool:
    """Return whether `plan` gives something: buckets that are impossible are not an exception."""
    try:
        return faults(width, height, resolution, data, multiple) is None
    except UserError:  # told once, as a finding about all pictures
        return False


def _bucket(width: int, height: int, resolution: int, data: Data, multiple: int) -> Size | None:
    """Return the bucket a picture belongs to, None where it is too small for each of them."""
    near = _nearest(width, height, _all(resolution, data.buckets, multiple))
    if data.upscale or (width >= near[0] and height >= near[1]):
        return near
    if data.buckets is None:
        return None
    unit, least, most = _bounds(resolution, data.buckets, multiple)
    inside = [
        (across, down)
        for across in _below(width, unit, least, most)
        for down in _below(height, unit, least, most)
        if across * down <= resolution**2
    ]
    if inside:
        return _nearest(width, height, inside)
    # As large as the picture would be more than the resolution allows: one that it fills.
    filled = [s for s in _all(resolution, data.buckets, multiple) if s[0] <= width]
    filled = [s for s in filled if s[1] <= height]
    return _nearest(width, height, filled) if filled else None


def _too_small(width: int, height: int, resolution: int, data: Data, multiple: int) -> str:
    what = f"{width}x{height} is smaller than "
    if data.buckets is None:
        what += f"the resolution of {resolution} and would be enlarged"
        remedy = "lower data.resolution, set data.buckets"
    else:
        _, least, _ = _bounds(resolution, data.buckets, multiple)
        what += f"the smallest bucket, whose edges are {least} pixels, and would be enlarged"
        remedy = "lower data.buckets.min or data.buckets.step"
    return f"{what}; take a larger picture, {remedy}, or allow it with data.upscale: true"


def _impossible(resolution: int, buckets: Buckets, multiple: int) -> str:
    """Return why no bucket is left, and what to change."""
    least, most = buckets.min or max(1, resolution // 2), buckets.max or resolution * 2
    if least > most:
        own = "" if buckets.max else f", twice the resolution of {resolution}"
        other = "" if buckets.min else f", half the resolution of {resolution}"
        return (
            f"data.buckets: the shortest edge ({least} pixels{other}) is longer than the longest "
            f"({most}{own}): lower data.buckets.min or raise data.buckets.max"
        )
    unit = math.lcm(buckets.step, multiple)
    steps = str(unit)
    if unit != buckets.step:
        steps += f" (data.buckets.step: {buckets.step}; edges are multiples of {multiple} as well)"
    return (
        f"data.buckets: no bucket has edges of {least} to {most} pixels in steps of {steps} and no "
        f"more pixels than {resolution}x{resolution}: lower data.buckets.step or data.buckets.min"
    )


@lru_cache(maxsize=64)
def _all(resolution: int, buckets: Buckets | None, multiple: int) -> tuple[Size, ...]:
    return sizes(resolution, buckets, multiple)


def _bounds(resolution: int, buckets: Buckets, multiple: int) -> tuple[int, int, int]:
    """Return the unit of edges, the least and the greatest edge, both multiples of the unit."""
    unit = math.lcm(buckets.step, multiple)
    least = -(-(buckets.min or max(1, resolution // 2)) // unit) * unit
    most = (buckets.max or resolution * 2) // unit * unit
    return unit, least, most


def _below(edge: int, unit: int, least: int, most: int) -> Iterable[int]:
    """Return the largest edge of a bucket inside `edge` pixels, and the next smaller one."""
    top = min(edge // unit * unit, most)
    return [value for value in (top, top - unit) if value >= least]


def _nearest(width: int, height: int, buckets: Iterable[Size]) -> Size:
    def distance(size: Size) -> tuple[float, int, int]:
        # Rounded, so that a tie is not decided by the last bit of a logarithm.
        off = abs(math.log(size[0] / size[1]) - math.log(width / height))
        return round(off, 9), -size[0] * size[1], -size[0]

    return min(buckets, key=distance)


def _round(a: int, b: int) -> int:
    """Return a / b rounded half up, exactly."""
    return (2 * a + b) // (2 * b)
