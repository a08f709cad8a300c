"""Captions ranked by CLIP out of lists of phrases: no words are invented, so none can run wild.

In the manner of CLIP-Interrogator: phrases are compared with the picture one by one first, and the
nearest of each slot stay. Then whole captions are compared, since a CLIP tells "a red robot at
night" from "a red ghost at night" better than "robot" from "ghost": neighbouring slots together,
the others held, again and again until nothing changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tunekit.captioners import _phrases
from tunekit.captioners.base import Captioner, Said, Wishes
from tunekit.errors import UserError
from tunekit.schema import BUNDLED
from tunekit.section import Section

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tunekit.evaluation.embedders import Clip

AT_ONCE = 256  # captions compared at once: slots are ranked together as far as this reaches
MOST_KNOWN = 20_000  # embedded texts that are kept: 60 MB with 768 numbers each
ROUNDS = 4  # mostly the second changes nothing any more


class Ranking(Captioner):
    """Chooses a phrase for each slot of a caption by CLIP."""

    class Options(Section):
        """What can be set as KEY=VALUE."""

        clip: str = Field(
            BUNDLED,
            min_length=1,
            description="CLIP or SigLIP model that ranks: `toybox` (knows its own world only), a "
            "folder, or a Hub id such as openai/clip-vit-large-patch14.",
        )
        phrases: str | None = Field(
            None,
            min_length=1,
            description="YAML file of phrases; null: the words of the toybox world for its CLIP, "
            "general lists for every other.",
        )
        shortlist: int = Field(
            24, ge=1, le=1000, description="Phrases of a slot that are compared within captions."
        )

    def __init__(self, clip: Clip, book: _phrases.PhraseBook, shortlist: int) -> None:
        self.clip = clip
        self.book = book
        self.shortlist = shortlist
        self._known: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, options: Options, wishes: Wishes, device: torch.device) -> Ranking:
        """Load the CLIP; UserError where it cannot be, or cannot read the phrases."""
        from tunekit.evaluation.embedders import Clip

        bundled = options.clip == BUNDLED
        if options.phrases is not None:
            book = _phrases.read(Path(options.phrases).expanduser())
        else:
            book = _phrases.toybox() if bundled else _phrases.general()
        if wishes.class_noun:
            book = book.calling(wishes.class_noun)
        ranking = cls(Clip.load(options.clip, device), book, options.shortlist)
        ranking._check_length()
        if bundled:
            ranking.notes = (
                "clip=toybox knows the toybox world only: for photographs name another CLIP, such "
                "as clip=openai/clip-vit-large-patch14",
            )
        return ranking

    def describe(self, image: Image.Image) -> Said:
        """Return the nearest caption found."""
        return Said(self.book.caption(self.choose(image)))

    def choose(self, image: Image.Image) -> dict[str, str]:
        """Return the phrase chosen for each slot."""
        picture = self.clip.embed_images([image])[0]
        near = {slot: self._nearest(picture, phrases) for slot, phrases in self.book.slots.items()}
        chosen = {slot: phrases[0] for slot, phrases in near.items()}
        groups = _groups({slot: len(phrases) for slot, phrases in near.items()})
        for _ in range(ROUNDS):
            before = dict(chosen)
            for group in groups:
                chosen |= self._best(picture, chosen, {slot: near[slot] for slot in group})
            if chosen == before:
                break
        return chosen

    def _nearest(self, picture: torch.Tensor, phrases: Sequence[str]) -> list[str]:
        """Return the shortlist, nearest first; to say nothing stays possible, as the last."""
        said = [phrase for phrase in phrases if phrase]
        if said:
            order = (self._texts(said) @ picture).argsort(descending=True, stable=True).tolist()
            said = [said[place] for place in order][: self.shortlist]
        return said + [phrase for phrase in phrases if not phrase]

    def _best(
        self, picture: torch.Tensor, chosen: Mapping[str, str], among: Mapping[str, Sequence[str]]
    ) -> dict[str, str]:
        ways = [dict(zip(among, way, strict=True)) for way in itertools.product(*among.values())]
        if len(ways) == 1:
            return ways[0]
        captions = [self.book.caption({**chosen, **way}) for way in ways]
        return ways[int((self._texts(captions) @ picture).argmax())]

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit rows for texts; each is embedded once, whatever the number of pictures."""
        import torch

        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            if len(self._known) > MOST_KNOWN:
                self._known = {text: self._known[text] for text in texts if text in self._known}
            self._known |= zip(new, self.clip.embed_texts(new), strict=True)
        return torch.stack([self._known[text] for text in texts])

    def _check_length(self) -> None:
        longest = {
            slot: max(phrases, key=lambda p: (len(self.clip.tokenizer(p)["input_ids"]), p))
            for slot, phrases in self.book.slots.items()
        }
        text = self.book.caption(longest)
        if not self.clip.fits(text):
            raise UserError(
                f'captions such as "{text}" are longer than the {self.clip.longest} tokens that '
                f"clip {self.clip.source!r} reads: shorten the phrases, or leave slots out"
            )


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return neighbouring slots together, as long as their products stay within AT_ONCE."""
    groups: list[list[str]] = []
    product = 0
    for slot, size in sizes.items():
        if groups and product * size <= AT_ONCE:
            groups[-1].append(slot)
            product *= size
        else:
            groups.append([slot])
            product = size
    return groups
