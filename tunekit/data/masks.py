"""Which part of a picture the loss counts: from a mask's pixels to weights on the latent grid.

A mask is grey, of its picture's size, white on the subject and black on what is not learned; it
is a file of its own, or the picture's alpha channel. It takes its picture's crop and flip. Each
cell of the latent grid then gets the exact mean of the mask over the area it stands for (parts of
pixels count as parts, nothing is rounded to 8 bits), m in 0..1, and the weight

    background_weight + (1 - background_weight) * m
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.images import Picture, decode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from tunekit.data.buckets import Fit
    from tunekit.schema_data import Mask


def read(path: Path) -> Image.Image:
    """Return the mask in the file at `path`, mode L, white where the subject is.

    Any picture file, converted to grey; transparent parts are black, so that a cut-out subject
    saved as white on nothing means what it shows. Raises PictureError.
    """
    return decode(path, "black").image.convert("L")


def of(settings: Mask, picture: Picture, mask: Path | None) -> Image.Image | None:
    """Return a picture's mask as the recipe wants it, mode L; None where it has none.

    picture: as decoded. mask: its mask's file, where it has one. Raises PictureError for a mask
    file that cannot be used.
    """
    if settings.source == "alpha":
        return picture.alpha
    return read(mask) if mask is not None else None


def digest(mask: Image.Image) -> str:
    """Return the sha256 (hex) of a mask's size and pixels."""
    assert mask.mode == "L"
    head = f"L {mask.width}x{mask.height}\n".encode()
    return hashlib.sha256(head + mask.tobytes()).hexdigest()


def coverage(mask: Image.Image) -> float:
    """Return the share of the picture that is subject, 0..1: the mean of the mask."""
    import numpy as np

    return float(np.asarray(mask).mean()) / 255


def check(
    mask: Image.Image, width: int, height: int, settings: Mask, fits: Sequence[Fit] = ()
) -> str | None:
    """Return why a mask cannot be used for a picture of width x height, and what to do, or None.

    fits: the crops that are trained; a crop without any subject has nothing to learn from, unless
    the background has a weight.
    """
    if mask.size != (width, height):
        return (
            f"its mask is {mask.width}x{mask.height}, the picture {width}x{height}: save the mask "
            "at the picture's size"
        )
    if mask.getextrema()[1] == 0:
        what = (
            "its alpha channel is transparent"
            if settings.source == "alpha"
            else ("its mask is black")
        )
        return f"{what} everywhere, so nothing would be learned: make the subject white"
    for fit in fits:
        if not settings.background_weight and mask.crop(fit.box).getextrema()[1] == 0:
            return (
                "its crop leaves out all of the masked subject, so nothing would be learned: set "
                "data.crop: smart, data.buckets, or data.mask.background_weight above 0"
            )
    return None


def weights(mask: Image.Image, fit: Fit, grid: tuple[int, int], background: float) -> Tensor:
    """Return the loss weights of one crop of a mask on the latent grid: [1, h, w] float32, 0..1.

    mask: mode L, of the picture's size. fit: the picture's crop. grid: w, h of the latents.
    background: weight where the mask is black, 0..1.
    """
    import numpy as np
    import torch

    assert mask.mode == "L"
    across, down = grid
    rows = np.stack([_row(mask, fit, number, down) for number in range(down)])
    shares = _overlaps(fit.left, fit.right, across)
    cells = np.stack([rows[:, lo:hi] @ part for lo, hi, part in shares], axis=1) / 255
    assert cells.shape == (down, across)
    found = torch.from_numpy(background + (1 - background) * cells)
    return found.to(torch.float32).clamp(0, 1)[None]


def _row(mask: Image.Image, fit: Fit, number: int, down: int) -> NDArray[np.float64]:
    """Return the mean over the pixel rows of one row of cells: [mask's width]."""
    import numpy as np

    lo, hi, part = _overlaps(fit.top, fit.bottom, down)[number]
    strip = np.asarray(mask.crop((0, lo, mask.width, hi)), dtype=np.float64)
    row: NDArray[np.float64] = part @ strip
    return row


def _overlaps(start: int, stop: int, cells: int) -> list[tuple[int, int, NDArray[np.float64]]]:
    """Return for each cell the pixels it touches, from..to, and each one's share of it (sum 1)."""
    import numpy as np

    length = stop - start
    found = []
    for cell in range(cells):
        # In units of 1 / cells of a pixel everything is a whole number.
        left, right = start * cells + cell * length, start * cells + (cell + 1) * length
        lo, hi = left // cells, -(-right // cells)
        edges = np.arange(lo, hi) * cells
        part = np.minimum(edges + cells, right) - np.maximum(edges, left)
        found.append((lo, hi, part / length))
    return found
