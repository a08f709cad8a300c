"""A few hundred bytes about how a picture looks, by which pictures are compared and judged.

**Detail** tells blurred pictures. The grey picture is laid out in 16 x 16 tiles. In each tile with
some contrast the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) is divided by the
variance of the grey values, so that neither contrast nor brightness counts; the mean of the
sharpest tenth of the tiles is the picture's detail, so that a blurred background does not count
either. It is measured with the short edge at 64, 128, 256 and 512 pixels, since what is blurred at
1024 pixels may be sharp at 256. Sharp photographs and drawings reach 1 to 20, the more the smaller
they are; a Gaussian blur of two pixels leaves 0.03 to 0.13 at 512 pixels, 0.05 to 0.2 at 256 and
0.2 to 0.5 at 64.

**Likeness** finds copies. The perceptual hash has 63 bits: which of the 8 x 8 lowest frequencies
(of the cosine transform of 32 x 32 grey values) are above their median; the mirrored picture's hash
comes from the same frequencies. Saving again, resizing, brightness and a cut of two in a hundred
change up to 10 bits; other photographs of the same subject differ by 14 and more. Drawings on an
even ground have few frequencies that mean anything, so the correlation of 16 x 16 grey values
decides as well.

**Border** is the mean colour of the 44 fields around a 12 x 12 grid: what the background is like.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

EDGES = (64, 128, 256, 512)
BLURRED = 0.25
SAME_BITS = 10
SAME_GREYS = 0.985
_TILES, _CONTRAST, _LITTLE_CONTRAST = 16, 100.0, 25.0  # variances of grey values in 0..255
_FIELDS = 12
_BLANK = 4  # grey levels between the darkest and the lightest pixel, of 255


@dataclass(frozen=True, slots=True)
class Measures:
    """What is known of a picture's looks without its pixels.

    detail: at each of EDGES, None where no part has contrast. hash, mirrored: perceptual hashes of
    the picture and of its mirror image, 63 bits. greys: 16 x 16 grey values, row by row. border:
    RGB of the 44 fields around it. blank: whether it shows nothing but one colour. coverage: the
    share of it that its mask leaves, 0..1; None without a mask.
    """

    detail: tuple[float | None, ...]
    hash: int
    mirrored: int
    greys: bytes
    border: bytes
    blank: bool
    coverage: float | None = None

    def detail_at(self, resolution: int) -> float | None:
        """Return the detail at the largest of EDGES that is not above `resolution` pixels."""
        known = [d for edge, d in zip(EDGES, self.detail, strict=True) if edge <= resolution]
        return known[-1] if known else self.detail[0]


def measure(image: Image.Image, coverage: float | None = None) -> Measures:
    """Measure an RGB picture; a few milliseconds. coverage: what is known of its mask."""
    from PIL import Image

    assert image.mode == "RGB"
    box = Image.Resampling.BOX
    grey = _at_edge(image.convert("L"), EDGES[-1])
    details = [_detail(grey)]
    small = grey
    for edge in reversed(EDGES[:-1]):
        small = _at_edge(small, edge)
        details.insert(0, details[0] if small.size == grey.size else _detail(small))
    low, high = grey.getextrema()
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    plain, mirrored = _hashes(small)
    return Measures(
        detail=tuple(details),
        hash=plain,
        mirrored=mirrored,
        greys=grey.resize((16, 16), box, reducing_gap=4).tobytes(),
        border=_border(image.resize((_FIELDS, _FIELDS), box, reducing_gap=4)),
        blank=high - low < _BLANK,
        coverage=coverage,
    )


def _at_edge(grey: Image.Image, edge: int) -> Image.Image:
    """Return the picture with its short edge reduced to `edge`; never enlarged."""
    from PIL import Image

    short = min(grey.size)
    if short <= edge:
        return grey
    width, height = (max(edge, round(side * edge / short)) for side in grey.size)
    return grey.resize((width, height), Image.Resampling.HAMMING, reducing_gap=3)


def _detail(grey: Image.Image) -> float | None:
    import numpy as np

    values = np.asarray(grey, dtype=np.int16)
    if min(values.shape) < 3:
        return None
    inner = values[1:-1, 1:-1]
    laplacian = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1]
    laplacian -= 4 * inner
    edge = max(4, min(values.shape) // _TILES)
    contrast = _tiles(inner.astype(np.float32), edge)
    if not contrast.size:
        return None
    change = _tiles(laplacian.astype(np.float32), edge)
    for least in (_CONTRAST, _LITTLE_CONTRAST):
        told = contrast >= least
        if told.any():
            ratios = np.sort(change[told] / contrast[told])
            return float(ratios[-max(1, len(ratios) // 10) :].mean())
    return None


def _tiles(values: np.ndarray[Any, Any], edge: int) -> np.ndarray[Any, Any]:
    """Return the variance in each whole tile of `edge` pixels."""
    rows, columns = values.shape[0] // edge, values.shape[1] // edge
    whole = values[: rows * edge, : columns * edge]
    # Sums over tiles as products with a matrix of ones and zeros: several times faster.
    down, across = _ones(rows, edge).T, _ones(columns, edge)
    mean = down @ whole @ across
    variance: np.ndarray[Any, Any] = down @ (whole * whole) @ across - mean * mean
    return variance.ravel()


@lru_cache(maxsize=32)
def _ones(tiles: int, edge: int) -> np.ndarray[Any, Any]:
    """Return what averages over tiles: [tiles * edge, tiles], 1 / edge where a pixel is inside."""
    import numpy as np

    return np.repeat(np.eye(tiles, dtype=np.float32) / edge, edge, axis=0)


@cache
def _cosines() -> np.ndarray[Any, Any]:
    """Return the first 8 rows of the orthonormal 32-point DCT-II."""
    import numpy as np

    places = np.arange(32)
    rows = np.cos(np.pi * (2 * places[None, :] + 1) * places[:8, None] / 64) / 4
    rows[0] /= np.sqrt(2)
    return rows


def _hashes(grey: Image.Image) -> tuple[int, int]:
    import numpy as np
    from PIL import Image

    values = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    waves = _cosines() @ (values - values.mean()) @ _cosines().T
    # A mirrored picture has the opposite sign in every odd frequency from left to right.
    mirror = waves * np.where(np.arange(8) % 2, -1, 1)
    return _bits(waves), _bits(mirror)


def _bits(waves: np.ndarray[Any, Any]) -> int:
    import numpy as np

    flat = waves.ravel()[1:]
    packed = np.packbits(np.concatenate([[False], flat > np.median(flat)]))
    return int.from_bytes(packed.tobytes(), "big")


def _border(small: Image.Image) -> bytes:
    import numpy as np

    fields = np.asarray(small)
    sides = (fields[0], fields[-1], fields[1:-1, 0], fields[1:-1, -1])
    return np.concatenate(sides).tobytes()
