"""From a folder of pictures and words to batches of latents and conditioning.

    source.py    a folder -> a stream of records (picture, caption, origin), or its faults
    images.py    any picture file -> RGB pixels, by one documented conversion
    captions.py  {trigger} and {class} in templates and captions
    sheet.py     preflight: every picture decoded once, every fault at once, and what to know
    cache.py     latents and conditioning on disk, found by content
    dataset.py   batches, each a function of (seed, step, micro) alone

Names are imported when they are first used: filling a template loads neither Pillow nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunekit.data.cache import Cache, fingerprint
    from tunekit.data.captions import fill
    from tunekit.data.dataset import Batch, EncodedDataset
    from tunekit.data.images import fit, open_rgb, to_pixels
    from tunekit.data.records import DataError
    from tunekit.data.sheet import DataSheet, Example, preflight

_HOME = {
    "Batch": "dataset",
    "Cache": "cache",
    "DataError": "records",
    "DataSheet": "sheet",
    "EncodedDataset": "dataset",
    "Example": "sheet",
    "fill": "captions",
    "fingerprint": "cache",
    "fit": "images",
    "open_rgb": "images",
    "preflight": "sheet",
    "to_pixels": "images",
}

__all__ = [
    "Batch",
    "Cache",
    "DataError",
    "DataSheet",
    "EncodedDataset",
    "Example",
    "fill",
    "fingerprint",
    "fit",
    "open_rgb",
    "preflight",
    "to_pixels",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
