"""Encoded pictures and words, and batches of them that depend on (seed, step, micro) alone.

Which pictures stand in which batch is said in `visits.py`, what the words of a visit are in
`captions.py`. The order is one of contents: renaming files or listing them otherwise changes
nothing.

The variants. What the VAE sees is encoded once, so crops and flips are a few fixed variants, each
cached (`crops.py`); flips double them. A picture goes through all its variants, in an order drawn
from (seed, key), before it sees one again: exactly half of its visits are mirrored. Its mask has
the same variants, so the two cannot come apart.

Tensors stay in the cache on disk; the most recently used are kept in memory, up to 64 MB.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.data import captions
from tunekit.data.cache import Cache, Entry
from tunekit.data.encode import (
    EncodeImage,
    EncodePrompt,
    Item,
    Stage,
    encode_pictures,
    encode_texts,
    no_stage,
)
from tunekit.data.visits import Visit, Visits, variant
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.data.records import Example
    from tunekit.schema_data import Data
    from tunekit.schema_source import Captions

IN_MEMORY = 64_000_000


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees; row i of each part belongs to the same picture.

    latents: [B, C, h, w] as `encode_image` gave them. conditioning: each [B, ...] as
    `encode_prompt` gave it, empty where the text encoder trains and reads `captions` itself.
    names: files, for messages. captions: as trained, "" where dropped. weights: [B] float32 above
    0, factors of the pictures' losses; None: all 1. mask: [B, 1, h, w] float32 in 0..1, weights of
    the loss on the latent grid, of which no picture's are all 0; None: all 1. prior: whether these
    are pictures of the class, trained beside those of the subject. sizes: [B, 6] int64, each
    picture's height and width, the top and left edge of its crop after scaling, and the height and
    width it was scaled to, in pixels; None: not known.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    weights: Tensor | None = None
    mask: Tensor | None = None
    prior: bool = False
    sizes: Tensor | None = None


class EncodedDataset:
    """Pictures and words whose tensors are in the cache. Made by `encode`; can be pickled."""

    def __init__(
        self,
        items: Sequence[Item],
        conditioning: Mapping[str, Entry] | None,
        *,
        seed: int,
        settings: Captions,
    ) -> None:
        """Take items in any order; conditioning by text, None where batches carry captions only."""
        assert items
        self.items = tuple(sorted(items, key=lambda item: (item.key, item.example.name)))
        self._conditioning = conditioning
        self._seed = seed
        self._settings = settings
        self._visits: dict[int, Visits] = {}
        self._recent = _Recent(IN_MEMORY)

    @classmethod
    def encode(
        cls,
        examples: Sequence[Example],
        data: Data,
        *,
        resolution: int | Sequence[int],
        seed: int,
        encode_image: EncodeImage,
        image_fingerprint: str,
        encode_prompt: EncodePrompt | None,
        text_fingerprint: str = "",
        multiple: int = 8,
        batch_size: int = 1,
        batches: int = 0,
        cache: Cache | None = None,
        stage: Stage = no_stage,
    ) -> EncodedDataset:
        """Encode every variant of every picture, and every text, or find them in the cache.

        resolution: one edge in pixels, or several: each picture at each of them. encode_image,
        image_fingerprint, multiple: as for `encode_pictures`. encode_prompt, text_fingerprint: as
        for `encode_texts`; None where the text encoder trains, and batches then carry captions
        only. batches, batch_size: how far the run goes and in batches of which size; where
        captions are shuffled there is no end of texts, and those of these batches are encoded.
        stage: opens "encoding" and then "captions". Raises UserError as these two do.
        """
        cache = cache or Cache()
        items = encode_pictures(
            examples,
            data,
            resolutions=(resolution,) if isinstance(resolution, int) else tuple(resolution),
            multiple=multiple,
            encode_image=encode_image,
            image_fingerprint=image_fingerprint,
            cache=cache,
            stage=stage,
        )
        cache.flush()  # what is held of pictures is not held beside the texts
        made = cls(items, None, seed=seed, settings=data.captions)
        if encode_prompt is not None:
            made._conditioning = encode_texts(
                made.texts(batch_size, batches),
                encode_prompt=encode_prompt,
                text_fingerprint=text_fingerprint,
                cache=cache,
                stage=stage,
            )
        cache.flush()
        return made

    def __len__(self) -> int:
        """Return the number of items: of pictures, times the resolutions."""
        return len(self.items)

    def visits(self, batch_size: int) -> Visits:
        """Return the row of batches of this size."""
        if batch_size not in self._visits:
            self._visits[batch_size] = Visits(
                [item.bucket for item in self.items],
                [item.example.repeats for item in self.items],
                seed=self._seed,
                batch_size=batch_size,
            )
        return self._visits[batch_size]

    def texts(self, batch_size: int, batches: int) -> set[str]:
        """Return every text that the first `batches` of this size can be trained with.

        Where they do not hang on the visits it is all there can be, whatever the batches.
        """
        found: set[str] = set()
        open_ended = set()
        for number, item in enumerate(self.items):
            texts = captions.all_texts(item.example.captions, self._settings)
            found |= texts or frozenset()
            if texts is None:
                open_ended.add(number)
        row = self.visits(batch_size)
        for place in range(batches if open_ended else 0):
            found |= {self._caption(v) for v in row.at(place) if v.item in open_ended}
        return found

    def batch(
        self,
        step: int,
        micro: int,
        batch_size: int,
        micros: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> Batch:
        """Return the pictures of one forward pass: the same for the same arguments and seed.

        step: from 0. micro: which of the step's `micros` forward passes (gradient accumulation),
        from 0. batch_size: may exceed the number of pictures. rank: which of `ranks` processes that
        share the batch out, from 0; B is what each gets, the same number. Raises UserError where
        the cache lost an entry.
        """
        import torch

        assert 0 <= rank < ranks
        share, rest = divmod(batch_size, ranks)
        assert not rest, "no even shares"
        visits = self.visits(batch_size).at(step * micros + micro)[share * rank :][:share]
        items = [self.items[visit.item] for visit in visits]
        shown = [
            variant(self._seed, item.key, visit.number, len(item.latents))
            for item, visit in zip(items, visits, strict=True)
        ]
        latents = torch.stack(
            [
                self._read(item, item.latents[number])["latents"]
                for item, number in zip(items, shown, strict=True)
            ]
        )
        words = tuple(self._caption(visit) for visit in visits)
        return Batch(
            latents=latents,
            conditioning=self._conditions(words),
            names=tuple(item.example.name for item in items),
            captions=words,
            weights=torch.tensor([item.example.weight for item in items], dtype=torch.float32),
            mask=self._mask(items, shown, latents),
            sizes=torch.tensor(
                [item.sizes[number] for item, number in zip(items, shown, strict=True)]
            ),
        )

    def batches(
        self, batch_size: int, micros: int = 1, rank: int = 0, ranks: int = 1
    ) -> Callable[[int, int], Batch]:
        """Return ``(step, micro) -> Batch`` for a training loop of `micros` passes a step."""
        return lambda step, micro: self.batch(step, micro, batch_size, micros, rank, ranks)

    def _caption(self, visit: Visit) -> str:
        item = self.items[visit.item]
        return captions.at_visit(
            item.example.captions, self._settings, self._seed, item.key, visit.number
        )

    def _read(self, item: Item, entry: Entry) -> dict[str, Tensor]:
        """Read what belongs to a picture; an error names it."""
        try:
            return self._recent.read(entry)
        except UserError as error:
            raise UserError(f"{item.example.name}: {error}") from error

    def _conditions(self, words: Sequence[str]) -> dict[str, Tensor]:
        import torch

        if self._conditioning is None:
            return {}
        known = self._conditioning
        unknown = [text for text in words if text not in known]
        assert not unknown, f"{unknown[0]!r} was not encoded: a batch beyond those named to encode"
        read = [self._recent.read(known[text]) for text in words]
        return {part: torch.stack([one[part] for one in read]) for part in read[0]}

    def _mask(self, items: Sequence[Item], shown: Sequence[int], latents: Tensor) -> Tensor | None:
        import torch

        if not any(item.masks for item in items):
            return None
        rows = []
        for item, number in zip(items, shown, strict=True):
            entry = item.masks[number]
            # Without a mask all of a picture counts; the preflight has said so.
            full = torch.ones(1, *latents.shape[-2:])
            rows.append(full if entry is None else self._read(item, entry)["weights"])
        return torch.stack(rows)


class _Recent:
    """The tensors read last, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Recent], tuple[int]]:
        """Let a worker process start with none of them."""
        return _Recent, (self._most,)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        if entry.key in self._held:
            self._held.move_to_end(entry.key)
            return self._held[entry.key]
        tensors = entry.read()
        self._held[entry.key] = tensors
        self._bytes += _size(tensors)
        while self._bytes > self._most and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return tensors


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
