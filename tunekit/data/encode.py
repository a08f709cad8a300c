"""Pictures and words to latents, mask weights and conditioning in the cache, one at a time.

Nothing is held but the names of the entries, so memory does not grow with the pictures. A picture
is decoded again only where something of it is not in the cache, and then it must be what the
preflight saw. What an entry is named by:

    latents       the decoded pixels, the crop, the size, the flip, the VAE's fingerprint
    masks         the mask's pixels, the crop, the latent grid, the flip, the background's weight
    places        (smart crops) the pixels, the mask, the window's size, the rule
    conditioning  the text, the text encoder's fingerprint
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.data import crops, masks
from tunekit.data.buckets import Fit, Size
from tunekit.data.cache import Cache, Entry, content_key
from tunekit.data.images import Picture, PictureError, apply_fit, decode, pixel_hash, to_pixels
from tunekit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from tunekit.data.records import Example
    from tunekit.schema_data import Data

TRANSFORM = "crop to the bucket, Lanczos, -1..1"  # part of the key: change it with the pixels' way

Tick = Callable[[], None]
Stage = Callable[[str, int], contextlib.AbstractContextManager[Tick]]
"""(what is done, how many) -> counts them; a reporter's `stage` fits."""
EncodeImage = Callable[["Tensor"], "Tensor"]
EncodePrompt = Callable[[list[str]], Mapping[str, "Tensor"]]


@dataclass(frozen=True)
class Item:
    """One picture at one resolution, and where its tensors are.

    key: what it is, whatever its file is called: order and draws hang on it. bucket: w, h in
    pixels. latents: {"latents": [C, h, w]} for each variant (crops, then the same mirrored).
    masks: {"weights": [1, h, w]} for each variant, None where the picture has no mask and all of
    it counts; empty where the recipe has none. sizes: what is told of each variant, as
    `Fit.told`.
    """

    example: Example
    key: str
    bucket: Size
    latents: tuple[Entry, ...]
    masks: tuple[Entry | None, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()


@contextlib.contextmanager
def no_stage(name: str, total: int) -> Iterator[Tick]:
    """Count nothing."""
    yield lambda: None


def encode_pictures(
    examples: Sequence[Example],
    data: Data,
    *,
    resolutions: Sequence[int],
    multiple: int,
    encode_image: EncodeImage,
    image_fingerprint: str,
    cache: Cache,
    stage: Stage = no_stage,
) -> list[Item]:
    """Encode every variant of every picture at every resolution, or find them in the cache.

    One at a time, so that no result depends on its neighbours in a batch. Pictures in the order of
    `examples`, each with its resolutions.

    resolutions: edges in pixels. multiple: as for `buckets.sizes`. encode_image: [1, 3, H, W]
    float32 in -1..1 on the CPU -> [1, C, h, w] on any device. image_fingerprint: changes with
    anything that decides its result. Raises UserError for a picture or mask that changed since its
    preflight, for a crop without any of its mask, and for latents that are not finite.
    """
    work = _Pictures(data, multiple, encode_image, image_fingerprint, cache)
    items = []
    with stage("encoding", len(examples)) as tick:
        for example in examples:
            opened = _Opened(example, data)
            for resolution in resolutions:
                key = f"{example.key} {resolution}" if len(resolutions) > 1 else example.key
                items.append(work.item(opened, key, resolution))
            tick()
    return items


def encode_texts(
    texts: Iterable[str],
    *,
    encode_prompt: EncodePrompt,
    text_fingerprint: str,
    cache: Cache,
    stage: Stage = no_stage,
) -> dict[str, Entry]:
    """Encode every text, or find it in the cache: {text: conditioning, each without batch axis}.

    encode_prompt: one text in a list -> conditioning, each [1, ...]. text_fingerprint: changes with
    anything that decides its result, the tokenizer too. Raises UserError for results that are not
    finite.
    """
    wanted = sorted(texts)
    found = {}
    with stage("captions", len(wanted)) as tick:
        for text in wanted:
            key = content_key(caption=text, text_encoder=text_fingerprint)

            def make(text: str = text) -> dict[str, Tensor]:
                return _single(lambda: encode_prompt([text]), f'conditioning of "{text}"')

            found[text] = cache.keep("conditioning", key, make)
            tick()
    return found


def training_view(example: Example, data: Data, resolution: int, multiple: int) -> Image.Image:
    """Return a picture as training sees it, in its bucket's size: the first of its crops.

    Decodes it again. Raises UserError as `encode_pictures` does.
    """
    opened = _Opened(example, data)
    return apply_fit(opened.image(), opened.fits(resolution, multiple)[0])


class _Opened:
    """A picture and its mask, decoded when they are first needed, and checked."""

    def __init__(self, example: Example, data: Data) -> None:
        self.example = example
        self.data = data
        self._picture: Picture | None = None
        self._mask: Image.Image | None = None

    def image(self) -> Image.Image:
        return self._decoded().image

    def mask(self) -> Image.Image | None:
        """Return the mask, None where the example has none."""
        example, settings = self.example, self.data.mask
        if settings is None or not example.mask_pixels:
            return None
        if self._mask is None:
            named = example.mask if settings.source == "files" else example.path
            assert named is not None
            try:
                # A file of its own is read without decoding its picture.
                alone = settings.source == "files"
                mask = masks.read(named) if alone else self._decoded().alpha
            except PictureError as error:
                raise UserError(f"{named}: was there at the start, now {error}") from error
            if mask is None or masks.digest(mask) != example.mask_pixels:
                raise UserError(f"{named}: changed since the run checked it; start again")
            self._mask = mask
        return self._mask

    def fits(
        self, resolution: int, multiple: int, best: Callable[[Fit], float] | None = None
    ) -> list[Fit]:
        """Return the crops; best: where the place of a smart one is asked for."""
        example = self.example
        return crops.fits(
            example.width,
            example.height,
            example.pixels,
            resolution,
            self.data,
            multiple,
            best or self.best_place,
        )

    def best_place(self, middle: Fit) -> float:
        return crops.best_place(self.image(), self.mask(), middle)

    def _decoded(self) -> Picture:
        example = self.example
        if self._picture is None:
            try:
                picture = decode(example.path, self.data.background)
            except PictureError as error:
                raise UserError(f"{example.path}: was there at the start, now {error}") from error
            if pixel_hash(picture.image) != example.pixels:
                raise UserError(f"{example.path}: changed since the run checked it; start again")
            self._picture = picture
        return self._picture


class _Pictures:
    """Makes items of pictures; what all of them share."""

    def __init__(
        self,
        data: Data,
        multiple: int,
        encode_image: EncodeImage,
        image_fingerprint: str,
        cache: Cache,
    ) -> None:
        self.data = data
        self.multiple = multiple
        self.encode_image = encode_image
        self.fingerprint = image_fingerprint
        self.cache = cache
        self._grids: dict[Size, Size] = {}

    def item(self, opened: _Opened, key: str, resolution: int) -> Item:
        fits = opened.fits(resolution, self.multiple, lambda fit: self._place(opened, fit))
        bucket = (fits[0].width, fits[0].height)
        flips = (False, True) if self.data.flip else (False,)
        variants = [(fit, flipped) for flipped in flips for fit in fits]
        latents = tuple(self._latents(opened, *variant) for variant in variants)
        whole = opened.example.width, opened.example.height
        sizes = tuple(fit.told(*whole, mirrored=flipped) for fit, flipped in variants)
        if self.data.mask is None:
            return Item(opened.example, key, bucket, latents, sizes=sizes)
        if not opened.example.mask_pixels:
            return Item(opened.example, key, bucket, latents, (None,) * len(variants), sizes)
        if bucket not in self._grids:
            height, width = latents[0].read()["latents"].shape[-2:]
            self._grids[bucket] = (width, height)
        weights = tuple(self._weights(opened, *variant) for variant in variants)
        return Item(opened.example, key, bucket, latents, weights, sizes)

    def _latents(self, opened: _Opened, fit: Fit, flipped: bool) -> Entry:
        def make() -> dict[str, Tensor]:
            pixels = to_pixels(apply_fit(opened.image(), fit)).unsqueeze(0)
            pixels = pixels.flip(-1) if flipped else pixels
            whose = f"latents of {opened.example.name}"
            return _single(lambda: {"latents": self.encode_image(pixels)}, whose)

        key = content_key(
            pixels=opened.example.pixels,
            transform=TRANSFORM,
            box=fit.box,
            size=[fit.width, fit.height],
            flipped=flipped,
            vae=self.fingerprint,
        )
        return self.cache.keep("latents", key, make)

    def _weights(self, opened: _Opened, fit: Fit, flipped: bool) -> Entry:
        settings, example = self.data.mask, opened.example
        assert settings is not None
        grid = self._grids[fit.width, fit.height]

        def make() -> dict[str, Tensor]:
            mask = opened.mask()
            assert mask is not None
            fault = masks.check(mask, example.width, example.height, settings, [fit])
            if fault is not None:
                raise UserError(f"{example.path}: {fault}")
            weights = masks.weights(mask, fit, grid, settings.background_weight)
            return {"weights": weights.flip(-1) if flipped else weights}

        key = content_key(
            mask=example.mask_pixels,
            box=fit.box,
            grid=grid,
            flipped=flipped,
            background=settings.background_weight,
        )
        return self.cache.keep("masks", key, make)

    def _place(self, opened: _Opened, middle: Fit) -> float:
        """Return the place of a smart crop without decoding a picture that was seen before."""
        import torch

        def make() -> dict[str, Tensor]:
            return {"place": torch.tensor([opened.best_place(middle)], dtype=torch.float64)}

        key = content_key(
            pixels=opened.example.pixels,
            mask=opened.example.mask_pixels if self.data.mask is not None else "",
            window=[middle.right - middle.left, middle.bottom - middle.top],
            rule=crops.SMART,
        )
        return float(self.cache.fetch("places", key, make)["place"])


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
