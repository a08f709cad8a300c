"""Prior preservation: pictures of the class, as the untouched base draws them, trained beside.

Ruiz et al. 2023, "DreamBooth": what is taught with a handful of pictures spreads to the whole
class, unless the class's own pictures are trained with it. They are drawn once and kept in the
cache by what decides them - base, prompt, seed and drawing settings - so a run that was stopped
goes on where it was, a larger `count` draws only what is missing, and other runs share them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.cache import content_key
from tunekit.data.captions import fill
from tunekit.data.images import PictureError, decode, pixel_hash
from tunekit.data.records import Example
from tunekit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tunekit.data.cache import Cache
    from tunekit.data.dataset import Batch
    from tunekit.data.sheet import DataSheet
    from tunekit.families import Family
    from tunekit.inference import DrawSettings, Painter
    from tunekit.progress import Reporter
    from tunekit.schema_data import Data

KIND = "prior"  # folder of the cache
_DIGEST = "pixels"  # what a kept PNG says of its own pixels


@dataclass(frozen=True)
class Wanted:
    """A picture of the class: its prompt, the seed it is drawn from, and where it is kept."""

    prompt: str
    seed: int
    path: Path


def wanted(data: Data, base: str, resolution: int, root: Path) -> Iterator[Wanted]:
    """Yield the pictures `data.prior` asks for; the prompts take turns, with seeds 0, 1, 2...

    base: a fingerprint of the untouched base. resolution: edge in pixels. root: the cache's folder.
    """
    prior = data.prior
    assert prior is not None
    prompts = [fill(prompt, "", data.class_noun) for prompt in prior.prompts]
    for number in range(prior.count):
        prompt, seed = prompts[number % len(prompts)], number // len(prompts)
        key = content_key(
            base=base,
            prompt=prompt,
            seed=seed,
            steps=prior.steps,
            guidance_scale=prior.guidance_scale,
            resolution=resolution,
        )
        yield Wanted(prompt, seed, root / KIND / key[:2] / f"{key}.png")


def taken(sheet: DataSheet, data: Data) -> DataSheet:
    """Return the sheet of `data.prior`'s folder with as many pictures as it asks for."""
    assert data.prior is not None
    both = zip(sheet.examples, sheet.looks, strict=True)
    used = sorted(both, key=lambda one: one[0].key)[: data.prior.count]
    examples, looks = zip(*used, strict=True)
    return replace(sheet, examples=examples, looks=looks)


def section(data: Data) -> Data:
    """Return the data section of the class's own pictures: shapes as the subject's, words plain."""
    from tunekit.schema_source import Captions

    assert data.prior is not None
    return data.model_copy(
        update={
            "source": data.prior.source or KIND,
            "holdout": None,
            "captions": Captions(template=data.prior.prompts),
            "mask": None,
            "prior": None,
        }
    )


def weighted(batches: Callable[[int, int], Batch], weight: float) -> Callable[[int, int], Batch]:
    """Return the batches of the class's pictures, marked as such, their losses times `weight`."""

    def batch(step: int, micro: int) -> Batch:
        import torch

        plain = batches(step, micro)
        own = torch.ones(len(plain.names)) if plain.weights is None else plain.weights
        return replace(plain, weights=own * weight, prior=True)

    return batch


def drawn(
    data: Data, family: Family, resolution: int, cache: Cache, reporter: Reporter
) -> DataSheet:
    """Return what the untouched base draws for `data.prior`, drawing what is not there yet.

    resolution: edge in pixels. What is in the cache and is not what was drawn is drawn again, and
    said.
    """
    from tunekit import identity
    from tunekit.data.measures import measure
    from tunekit.data.sheet import DataSheet
    from tunekit.inference import DrawSettings, Painter

    prior = data.prior
    assert prior is not None
    settings = DrawSettings(
        steps=prior.steps,
        guidance_scale=prior.guidance_scale,
        width=resolution,
        height=resolution,
    )
    asked = list(wanted(data, identity.of_drawing(family), resolution, cache.root))
    missing = sum(not picture.path.exists() for picture in asked)
    if missing:
        reporter.note(
            f"prior: {missing} of {len(asked)} pictures of the class are drawn by the untouched "
            f"base and kept in {cache.root / KIND}"
        )
    painter = Painter.of(family)
    found, looks = [], []
    with reporter.stage("drawing the class", len(asked)) as tick:
        for picture in asked:
            image = _kept(picture, reporter) or _draw(picture, painter, settings)
            found.append(_example(picture, image))
            looks.append(measure(image))
            tick(picture.prompt)
    where = f"drawn by {family.label}"
    own = section(data)
    return DataSheet(
        where, own, family.size_multiple, (resolution,), tuple(found), tuple(looks), ()
    )


def _kept(picture: Wanted, reporter: Reporter) -> Image.Image | None:
    """Return a picture from the cache, None where it is not there or not as it was drawn."""
    from tunekit.pictures import read_settings

    if not picture.path.exists():
        return None
    try:
        image = decode(picture.path).image
        if read_settings(picture.path).get(_DIGEST) != pixel_hash(image):
            raise PictureError("is not what was drawn")
    except UserError as error:
        reporter.note(f"{picture.path}: {error}; it is drawn again")
        return None
    os.utime(picture.path)  # used now: the last to be pruned
    return image


def _draw(picture: Wanted, painter: Painter, settings: DrawSettings) -> Image.Image:
    from tunekit.pictures import save_png

    made = next(painter.draw_many([picture.prompt], [picture.seed], settings))
    save_png(made.image, picture.path, {**made.settings, _DIGEST: pixel_hash(made.image)})
    return made.image


def _example(picture: Wanted, image: Image.Image) -> Example:
    pixels = pixel_hash(image)
    return Example(
        path=picture.path,
        name=f"prior/{picture.prompt}/{picture.seed}",
        captions=(picture.prompt,),
        origin="data.prior.prompts",
        width=image.width,
        height=image.height,
        pixels=pixels,
        # The seed counts: two seeds may draw the same picture, and each is then an example.
        key=hashlib.sha256(f"{pixels}\n{picture.prompt}\n{picture.seed}".encode()).hexdigest(),
    )
