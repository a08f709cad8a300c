"""Where a picture that does not have its bucket's shape is cut.

`center`: in the middle. `random`: at four places, one in each quarter of what the long side has to
spare, drawn from the picture's content; since what the VAE sees is encoded once, they are fixed.
`smart`: one place, where the middle of its mask is, else where the window holds most detail: the
greatest sum of squared differences between neighbouring pixels (grey, the long side at most 512
pixels); of equal ones the nearest to the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tunekit.data.buckets import Fit, plan
from tunekit.seeding import derive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from tunekit.schema_data import Data

RANDOM_CROPS = 4
SMART = "mask's middle, else gradient energy at 512"  # part of cache keys: change it with the rule
_DETAIL_EDGE = 512


def fits(
    width: int,
    height: int,
    pixels: str,
    resolution: int,
    data: Data,
    multiple: int,
    best: Callable[[Fit], float],
) -> list[Fit]:
    """Return the crops of a picture that are trained on, each once.

    width, height: of the picture. pixels: its hash. resolution, multiple: as for `buckets.sizes`.
    best: asked for the place of a smart crop, with the crop in the middle; `best_place` finds it.
    Raises UserError as `buckets.plan` does.
    """
    middle = plan(width, height, resolution, data, multiple)
    spare = (middle.left, middle.top) != (0, 0) or middle.cut(width, height) > 0
    if data.crop == "center" or not spare:
        return [middle]
    if data.crop == "smart":
        places = [best(middle)]
    else:
        places = [
            (number + derive(0, f"crop {pixels}", number) / 2**63) / RANDOM_CROPS
            for number in range(RANDOM_CROPS)
        ]
    found = [plan(width, height, resolution, data, multiple, place) for place in places]
    return list(dict.fromkeys(found))  # a picture of nearly the bucket's shape has fewer than four


def best_place(image: Image.Image, mask: Image.Image | None, middle: Fit) -> float:
    """Return the place (0..1) of a crop as large as `middle` that shows the subject best.

    image: mode RGB. mask: mode L, of its size, white where the subject is. See this module's page.
    """
    import numpy as np

    wide, high = middle.right - middle.left, middle.bottom - middle.top
    across = image.width - wide >= image.height - high
    edge, window = (image.width, wide) if across else (image.height, high)
    spare = edge - window
    if spare <= 0:
        return 0.5
    if mask is not None:
        profile = _profile(mask, across)
        if profile.any():
            centre = float(profile @ (np.arange(edge) + 0.5) / profile.sum())
            return min(max(centre - window / 2, 0), spare) / spare
    return _most_detail(image, across, window, spare)


def _most_detail(image: Image.Image, across: bool, window: int, spare: int) -> float:
    import numpy as np

    grey = image.convert("L")
    grey.thumbnail((_DETAIL_EDGE, _DETAIL_EDGE))
    values = np.asarray(grey, dtype=np.float64)
    energy = np.zeros_like(values)
    energy[:, 1:] += np.diff(values, axis=1) ** 2
    energy[1:, :] += np.diff(values, axis=0) ** 2
    profile = energy.sum(axis=0 if across else 1)
    if not profile.any():
        return 0.5
    small = len(profile)
    length = min(max(1, round(window * small / (window + spare))), small)
    sums = np.concatenate([[0.0], profile.cumsum()])
    sums = sums[length:] - sums[:-length]
    off = np.abs(np.arange(len(sums)) - (len(sums) - 1) / 2)
    # Rounding in the sums must not decide between equal windows.
    equal = np.flatnonzero(sums >= sums.max() * (1 - 1e-9))
    best = int(equal[off[equal].argmin()])
    return best / (len(sums) - 1) if len(sums) > 1 else 0.5


def _profile(mask: Image.Image, across: bool) -> NDArray[np.float64]:
    import numpy as np

    profile: NDArray[np.float64] = np.asarray(mask).sum(axis=0 if across else 1, dtype=np.float64)
    return profile
