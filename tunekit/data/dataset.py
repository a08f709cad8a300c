"""Encoded pictures and words, and batches of them that depend on (seed, step, micro) alone.

The visits. All positions of a run stand in one row: step after step, micro-batch after
micro-batch, picture after picture. Cut into pieces as long as the data, each piece is an epoch: a
seeded permutation of the pictures. So at any moment no picture was seen more than once oftener
than another, a batch may lie across two epochs, and a resumed run needs no saved position.

The order is one of contents: renaming files or listing them otherwise changes nothing.

The variants. What the VAE sees is encoded once, so crops and flips are a few fixed variants, each
cached: the middle, or with random crops four places (one in each quarter of what the long side
has to spare, drawn from the picture's content), times two with flips. A picture goes through all
its variants, in an order drawn from (seed, key), before it sees one again: exactly half of its
visits are mirrored. Caption dropout is drawn from (seed, visit, key).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tunekit.data.cache import Cache, content_key
from tunekit.data.images import (
    Fit,
    PictureError,
    apply_fit,
    decode,
    pixel_hash,
    plan_fit,
    to_pixels,
)
from tunekit.errors import UserError
from tunekit.seeding import derive, generator

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from tunekit.data.sheet import Example
    from tunekit.schema import Data

RANDOM_CROPS = 4
_TRANSFORM = "crop square, Lanczos, -1..1"  # part of the key: change it with the pixels' way


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees; row i of each part belongs to the same picture.

    latents: [B, C, h, w] as `encode_image` gave them. conditioning: each [B, ...] as
    `encode_prompt` gave it, empty where the text encoder trains and reads `captions` itself.
    names: files, for messages. captions: as trained, "" where dropped.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    names: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Encoded:
    """An example bound to its own latents, a [C, h, w] for each variant."""

    example: Example
    latents: tuple[Tensor, ...]


class EncodedDataset:
    """Examples with their latents and conditioning, held in memory. Made by `encode`."""

    def __init__(
        self,
        encoded: Sequence[_Encoded],
        conditioning: Mapping[str, Mapping[str, Tensor]],
        *,
        seed: int,
        caption_dropout: float,
    ) -> None:
        assert encoded
        self._encoded = sorted(encoded, key=lambda e: (e.example.key, e.example.name))
        self._conditioning = conditioning
        self._seed = seed
        self._dropout = caption_dropout

    @classmethod
    def encode(
        cls,
        examples: Sequence[Example],
        data: Data,
        *,
        resolution: int,
        seed: int,
        encode_image: Callable[[Tensor], Tensor],
        image_fingerprint: str,
        encode_prompt: Callable[[list[str]], Mapping[str, Tensor]] | None,
        text_fingerprint: str = "",
        cache: Cache | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> EncodedDataset:
        """Encode every variant of every picture, and every caption, or find them in the cache.

        One at a time, so that no result depends on its neighbours in a batch.

        resolution: edge in pixels. encode_image: [1, 3, H, W] float32 in -1..1 on the CPU ->
        [1, C, h, w] on any device. encode_prompt: one caption in a list -> conditioning, each
        [1, ...]; None where the text encoder trains, and batches then carry captions only.
        Fingerprints: a text that changes with anything that decides the function's result
        (`cache.fingerprint` of the weights). progress: told (pictures done, pictures in all).
        Raises UserError for a picture that changed since its preflight and for results that are
        not finite.
        """
        cache = cache or Cache()
        encoded = []
        for done, example in enumerate(examples, 1):
            latents = _latents(example, data, resolution, encode_image, image_fingerprint, cache)
            encoded.append(_Encoded(example, latents))
            if progress:
                progress(done, len(examples))
        conditioning = {}
        if encode_prompt:
            captions = {example.caption for example in examples}
            for caption in sorted(captions | ({""} if data.caption_dropout else set())):
                conditioning[caption] = _words(caption, encode_prompt, text_fingerprint, cache)
        return cls(encoded, conditioning, seed=seed, caption_dropout=data.caption_dropout)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._encoded)

    def batch(self, step: int, micro: int, batch_size: int, micros: int = 1) -> Batch:
        """Return the pictures of one forward pass: the same for the same arguments and seed.

        step: from 0. micro: which of the step's `micros` forward passes (gradient accumulation),
        from 0. batch_size: B, may exceed the number of pictures.
        """
        import torch

        assert step >= 0
        assert 0 <= micro < micros
        first = (step * micros + micro) * batch_size
        orders: dict[int, list[int]] = {}
        rows, captions, latents = [], [], []
        for position in range(first, first + batch_size):
            visit, place = divmod(position, len(self._encoded))
            if visit not in orders:
                orders[visit] = self._order(visit)
            row = self._encoded[orders[visit][place]]
            rows.append(row)
            latents.append(row.latents[self._variant(row, visit)])
            captions.append(self._caption(row.example, visit))
        words = [self._conditioning[caption] for caption in captions] if self._conditioning else []
        parts = words[0].keys() if words else ()
        return Batch(
            latents=torch.stack(latents),
            conditioning={part: torch.stack([word[part] for word in words]) for part in parts},
            names=tuple(row.example.name for row in rows),
            captions=tuple(captions),
        )

    def batches(self, batch_size: int, micros: int = 1) -> Callable[[int, int], Batch]:
        """Return ``(step, micro) -> Batch`` for a training loop of `micros` passes a step."""
        return lambda step, micro: self.batch(step, micro, batch_size, micros)

    def _order(self, epoch: int) -> list[int]:
        import torch

        draw = generator(self._seed, "data order", epoch)
        order: list[int] = torch.randperm(len(self._encoded), generator=draw).tolist()
        return order

    def _variant(self, row: _Encoded, visit: int) -> int:
        cycle, place = divmod(visit, len(row.latents))
        order = list(range(len(row.latents)))
        random.Random(derive(self._seed, f"data variant {row.example.key}", cycle)).shuffle(order)
        return order[place]

    def _caption(self, example: Example, visit: int) -> str:
        drawn = derive(self._seed, f"data caption dropout {example.key}", visit) / 2**63
        return "" if drawn < self._dropout else example.caption


def crops(example: Example, resolution: int, crop: str) -> list[Fit]:
    """Return the squares of a picture that are trained on, each once; see this module's page."""
    if crop == "center":
        return [plan_fit(example.width, example.height, resolution)]
    assert crop == "random"
    places = [
        (variant + derive(0, f"crop {example.pixels}", variant) / 2**63) / RANDOM_CROPS
        for variant in range(RANDOM_CROPS)
    ]
    plans = [plan_fit(example.width, example.height, resolution, place) for place in places]
    return list(dict.fromkeys(plans))  # a nearly square picture has fewer than four


def _latents(
    example: Example,
    data: Data,
    resolution: int,
    encode_image: Callable[[Tensor], Tensor],
    image_fingerprint: str,
    cache: Cache,
) -> tuple[Tensor, ...]:
    opened: list[Image.Image] = []  # decoded only if some variant is not in the cache, and once

    def make(plan: Fit, flipped: bool) -> dict[str, Tensor]:
        if not opened:
            opened.append(_unchanged(example))
        pixels = to_pixels(apply_fit(opened[0], plan)).unsqueeze(0)
        pixels = pixels.flip(-1) if flipped else pixels
        return _single(lambda: {"latents": encode_image(pixels)}, f"latents of {example.name}")

    variants = []
    for flipped in (False, True) if data.flip else (False,):
        for plan in crops(example, resolution, data.crop):
            key = content_key(
                pixels=example.pixels,
                transform=_TRANSFORM,
                box=[plan.left, plan.top, plan.right, plan.bottom],
                size=plan.size,
                flipped=flipped,
                vae=image_fingerprint,
            )
            entry = cache.fetch("latents", key, partial(make, plan, flipped))
            variants.append(entry["latents"])
    return tuple(variants)


def _words(
    caption: str,
    encode_prompt: Callable[[list[str]], Mapping[str, Tensor]],
    text_fingerprint: str,
    cache: Cache,
) -> dict[str, Tensor]:
    key = content_key(caption=caption, text_encoder=text_fingerprint)
    whose = f'conditioning of "{caption}"'
    return cache.fetch(
        "conditioning", key, lambda: _single(lambda: encode_prompt([caption]), whose)
    )


def _unchanged(example: Example) -> Image.Image:
    """Decode an example again; its cache key says what it must be."""
    try:
        image = decode(example.path).image
    except PictureError as error:
        raise UserError(f"{example.path}: was there at the start, now {error}") from error
    if pixel_hash(image) != example.pixels:
        raise UserError(f"{example.path}: changed since the run checked it; start again")
    return image


def _single(encode: Callable[[], Mapping[str, Tensor]], whose: str) -> dict[str, Tensor]:
    """Return what `encode` makes of one input, each [1, ...], without that first axis."""
    import torch

    with torch.no_grad():
        made = dict(encode())
    assert made
    for name, tensor in made.items():
        assert tensor.shape[0] == 1, f"{whose}: {name} is {tuple(tensor.shape)}"
        # Kept in the cache, a NaN would come back in every later run.
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"the {whose} are not finite (NaN or Inf): the model overflows in its number "
                "format; set base.dtype to fp32 or bf16"
            )
    return {name: tensor[0] for name, tensor in made.items()}
