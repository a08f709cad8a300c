"""Prior preservation: pictures of the class, as the untouched base draws them, trained beside.

Ruiz et al. 2023, "DreamBooth": what is taught with a handful of pictures spreads to the whole
class, unless the class's own pictures are trained with it. They are drawn once and kept in the
cache by what decides them - base, prompt, seed and drawing settings - so a run that was stopped
goes on where it was, a larger `count` draws only what is missing, and other runs share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.cache import cache_root, content_key
from tunekit.data.captions import fill, holds
from tunekit.data.images import PictureError, decode, pixel_hash
from tunekit.data.records import Example, Finding
from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.data.dataset import Batch
    from tunekit.data.sheet import DataSheet
    from tunekit.families import Family
    from tunekit.inference import DrawSettings, Painter
    from tunekit.progress import Reporter
    from tunekit.schema_data import Data, Prior

KIND = "prior"  # folder of the cache


@dataclass(frozen=True)
class Wanted:
    """A picture of the class: its prompt, the seed it is drawn from, and where it is kept."""

    prompt: str
    seed: int
    path: Path


def wanted(data: Data, prior: Prior, base: str, resolution: int) -> Iterator[Wanted]:
    """Yield the pictures that `prior` asks for; the prompts take turns, each with seeds 0, 1, 2...

    base: a fingerprint of the untouched base. resolution: edge in pixels.
    """
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
        yield Wanted(prompt, seed, cache_root() / KIND / key[:2] / f"{key}.png")


def fingerprint_of(family: Family) -> str:
    """Return the sha256 (hex) of everything that decides what a base draws."""
    from tunekit.data.cache import fingerprint

    digest = hashlib.sha256(repr(sorted(family.pipeline().scheduler.config.items())).encode())
    components = {"denoiser": family.denoiser, "vae": family.vae, **family.text_encoders}
    for name, module in components.items():
        digest.update(f"{name} {fingerprint(module.state_dict())}\n".encode())
    return digest.hexdigest()


def examples(data: Data, family: Family, resolution: int, reporter: Reporter) -> list[Example]:
    """Return the pictures of `data.prior` as examples: taken from its folder, or drawn.

    family: the base, untouched. resolution: edge in pixels of what is drawn. Raises UserError for
    a folder without usable pictures; what is in the cache and broken is drawn again, and said.
    """
    prior = data.prior
    assert prior is not None
    if prior.source is not None:
        return _taken(data, prior, reporter)
    return _drawn(data, prior, family, resolution, reporter)


def section(data: Data) -> Data:
    """Return the data section of the class's own pictures: shapes as the subject's, words plain."""
    from tunekit.schema_source import Captions

    assert data.prior is not None
    return data.model_copy(
        update={
            "source": data.prior.source or str(cache_root() / KIND),
            "captions": Captions(template=data.prior.prompts),
            "mask": None,
            "prior": None,
        }
    )


def look(
    data: Data,
    resolution: int | None,
    multiple: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DataSheet | None, list[Finding]]:
    """Look at the folder of `data.prior` without refusing it, or tell what will be drawn instead.

    For the arguments see `data.sheet.examine`. Without a prior there is nothing to tell.
    """
    from tunekit.data.sheet import examine

    if data.prior is None:
        return None, []
    if data.prior.source is None:
        prompts = ", ".join(f'"{prompt}"' for prompt in data.prior.prompts)
        text = f"the untouched base will draw {data.prior.count} pictures of the class: {prompts}"
        return None, [Finding("note", "prior", text)]
    sheet = examine(section(data), resolution, multiple=multiple, progress=progress)
    return sheet, [
        replace(fault, code=f"prior-{fault.code}", text=f"pictures of the class: {fault.text}")
        for fault in sheet.errors
    ]


def weighted(batches: Callable[[int, int], Batch], weight: float) -> Callable[[int, int], Batch]:
    """Return the batches of the class's pictures, marked as such, their losses times `weight`."""

    def batch(step: int, micro: int) -> Batch:
        import torch

        plain = batches(step, micro)
        own = torch.ones(len(plain.names)) if plain.weights is None else plain.weights
        return replace(plain, weights=own * weight, prior=True)

    return batch


def _taken(data: Data, prior: Prior, reporter: Reporter) -> list[Example]:
    from tunekit.data.sheet import preflight

    sheet = preflight(section(data))
    taught = [e.name for e in sheet.examples if any(holds(c, data.trigger) for c in e.captions)]
    if taught:
        raise UserError(
            f"data.prior.source: {prior.source}: the captions of {', '.join(taught[:5])} say "
            f'"{data.trigger}", which these pictures are to keep apart from the class'
        )
    found = sorted(sheet.examples, key=lambda example: example.key)
    count = len(found[: prior.count])
    fewer = f"; data.prior.count asks for {prior.count}" if len(found) < prior.count else ""
    reporter.note(f"prior: {count} of the {len(found)} pictures in {prior.source} are used{fewer}")
    return found[: prior.count]


def _drawn(
    data: Data, prior: Prior, family: Family, resolution: int, reporter: Reporter
) -> list[Example]:
    from tunekit.inference import DrawSettings, Painter

    settings = DrawSettings(
        steps=prior.steps,
        guidance_scale=prior.guidance_scale,
        width=resolution,
        height=resolution,
    )
    asked = list(wanted(data, prior, fingerprint_of(family), resolution))
    found = []
    missing = sum(not picture.path.exists() for picture in asked)
    if missing:
        reporter.note(
            f"prior: {missing} of {len(asked)} pictures of the class are drawn by the untouched "
            f"base and kept in {cache_root() / KIND}"
        )
    painter = Painter.of(family)
    with reporter.stage("drawing the class", len(asked)) as tick:
        for picture in asked:
            found.append(_example(picture, painter, settings, reporter))
            tick(picture.prompt)
    return found


def _example(
    picture: Wanted, painter: Painter, settings: DrawSettings, reporter: Reporter
) -> Example:
    from tunekit.pictures import save_png

    if picture.path.exists():
        try:
            return _described(picture)
        except PictureError as error:
            reporter.note(f"{picture.path}: {error}; it is drawn again")
    drawn = next(painter.draw_many([picture.prompt], [picture.seed], settings))
    save_png(drawn.image, picture.path, drawn.settings)
    return _described(picture)


def _described(picture: Wanted) -> Example:
    image = decode(picture.path).image
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
