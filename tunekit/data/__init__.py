"""From sources of pictures and words to batches of latents and conditioning.

What all of them hand each other:
    records.py   Record, Finding, Example, and the error that tells all faults

Sources: what `data.source` names -> records, or what is wrong with it
    source.py    everything it can name, several sources as one, repeats and weights
    reading.py   how sources are read, and what all kinds of them say alike
    folder.py    a folder: pictures, captions, masks, repeats
    listing.py   its files, each put where its name says it belongs
    metadata.py  metadata.jsonl and metadata.csv, a line a picture
    sidecars.py  captions and masks in files called as their picture, repeats in folders' names
    tables.py    parquet files and Hub datasets, streamed
    columns.py   which column of a table is what
    tars.py      webdataset shards, streamed
    spool.py     pictures of streams kept as files in the cache, so that each has a path

Words
    captions.py  what fills captions, and what is made of them at each visit
    templates.py lists of caption templates

Pictures
    images.py    any picture file -> RGB pixels, by one documented conversion
    buckets.py   which shape a picture is trained in, and what is cut off
    crops.py     where it is cut
    masks.py     which part of it the loss counts: weights on the latent grid
    measures.py  a few hundred bytes about its looks, to compare and judge by

Preflight: every picture decoded once, every fault told at once
    sheet.py     records -> examples, and all there is to tell
    checks.py    what a careful colleague would say of them
    contact.py   the contact sheet as HTML

Cache: latents and conditioning on disk, found by content
    cache.py     what callers see: fetch, keep, read
    shelf.py     the entries of one kind
    shards.py    many entries in one safetensors file
    locks.py     who uses the cache now
    upkeep.py    what it holds, and how it is kept from growing without end

Order and batches
    visits.py    which pictures stand in which batch, from the seed and the place alone
    encode.py    pictures and words -> entries of the cache, one at a time
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
