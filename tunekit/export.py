"""Adapter files in a client's layout, each verified through that client's own loading code.

A file gets its name only after it was loaded into a fresh pipeline and did there what the trained
model does. What that did is measured before, so that only one of the two is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import embeddings, families, modelcard
from tunekit.data.captions import expand, fill
from tunekit.drafts import Draft as Draft
from tunekit.drafts import ExportError as ExportError
from tunekit.loading import read_by_diffusers
from tunekit.pictures import save_png
from tunekit.schema_tokens import file_word
from tunekit.tokens import adapter_of, words_of
from tunekit.verification import Parity, Reference, compare, make_probe, measure
from tunekit.wholefile import write_whole

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.recipe import Recipe
    from tunekit.tokens import Tokens

CARD = "README.md"
SHOWN = "pictures"
"""The folder of the card's pictures, beside it."""
_MOST_SHOWN = 6
WORDS, BUNDLE = "words", "bundle"
BUNDLED_IN = "kohya"
"""The layout of the adapter in a bundle: that of the clients which read bundles."""


@dataclass(frozen=True)
class ExportedFile:
    """A verified adapter file, or one of new words.

    layout: the client's of an adapter, WORDS of a new word, BUNDLE of both in one file. parity:
    what verification measured on it. diffusers: whether diffusers' own loader reads it; where not,
    `tunekit.load` does. plain: what plain diffusers needs to be told.
    """

    path: Path
    layout: str
    dtype: str
    tensors: int
    bytes: int
    sha256: str
    parity: Parity
    diffusers: bool
    word: str | None = None
    plain: modelcard.Plain = field(default_factory=modelcard.Plain)

    @property
    def what(self) -> str:
        """What it is, in words."""
        if self.word is not None:
            return f"the word `{self.word}`"
        return "adapter and words in one" if self.layout == BUNDLE else f"{self.layout} layout"


def needed(files: Sequence[ExportedFile]) -> list[Path]:
    """Return the files that together hold all that was taught: the first adapter, and all words."""
    first = [file for file in files if file.layout not in (WORDS, BUNDLE)][:1]
    return [file.path for file in (*first, *(file for file in files if file.layout == WORDS))]


def export_adapter(
    family: Family,
    adapter: Adapter,
    recipe: Recipe,
    out_dir: Path,
    *,
    lesson: modelcard.Lesson | None = None,
) -> list[ExportedFile]:
    """Write what `adapter` learned in every layout of `recipe.export`, verified, and a model card.

    As `write` and then `Written.verified`, with a second base beside `family`, which draws and
    trains on as before.
    """
    return write(family, adapter, recipe, out_dir, lesson=lesson).verified()


def write(
    family: Family,
    adapter: Adapter,
    recipe: Recipe,
    out_dir: Path,
    *,
    lesson: modelcard.Lesson | None = None,
) -> Written:
    """Write what `adapter` learned in every layout of `recipe.export`, to be verified next.

    family: the base with `adapter` attached; it may go afterwards. New words get a file each, and
    where there is an adapter in kohya's naming beside them, a bundle as well. lesson: what it was
    taught, for the metadata.

    Raises ExportError where a new word's vector never moved or a number does not fit the format,
    and UserError where a layout cannot carry the adapter or the disk refuses.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    resolution = (*recipe.data.resolutions, family.default_resolution)[0]
    work = _Work(family, adapter, recipe, out_dir, resolution, lesson)
    parts: list[_Part] = []
    try:
        for part in work.parts():
            parts.append(part)
    except BaseException:
        for part in parts:
            part.draft.discard()
        raise
    return Written(recipe, resolution, family.device, parts)


@dataclass(frozen=True)
class _Part:
    """Files that are verified together. made: gives each, once parity is known."""

    layout: str
    dtype: str
    draft: Draft
    trained: Reference
    made: Sequence[Callable[..., ExportedFile]]


@dataclass(frozen=True)
class Written:
    """Files that wait for their verification; nothing of them holds the base that was trained."""

    recipe: Recipe
    resolution: int
    device: torch.device
    parts: Sequence[_Part]

    def verified(self) -> list[ExportedFile]:
        """Verify each file in a fresh base, and write the model card, yet without scores.

        Raises ExportError where one fails. Files of an earlier export keep their names until theirs
        are replaced by verified ones.
        """
        done: list[ExportedFile] = []
        try:
            for part in self.parts:
                words = [file.path for file in done if file.layout == WORDS]
                beside = [] if part.layout in (WORDS, BUNDLE) else words
                parity = part.draft.verified(partial(self._check, part, beside))
                done += [made(parity=parity) for made in part.made]
        finally:
            for part in self.parts:
                part.draft.discard()
        last = [WORDS, BUNDLE]  # what people take first comes first
        done.sort(key=lambda file: last.index(file.layout) if file.layout in last else -1)
        write_card(self.recipe, done, self.resolution)
        return done

    def _check(self, part: _Part, beside: Sequence[Path], paths: Sequence[Path]) -> Parity:
        return check([*beside, *paths], self.recipe, part.trained, self.device, part.dtype)


@dataclass(frozen=True)
class _Work:
    """One export."""

    family: Family
    adapter: Adapter
    recipe: Recipe
    folder: Path
    resolution: int
    lesson: modelcard.Lesson | None

    def parts(self) -> Iterator[_Part]:
        """Yield what is verified together, as soon as it is written: new words first."""
        words, beside, asked = words_of(self.adapter), adapter_of(self.adapter), self.recipe.export
        if words is not None:
            yield self._words(words, beside)
        if beside is None or self.recipe.adapter is None:
            return
        trained = measured(self.family, self.adapter, self.recipe)
        layouts = self.recipe.adapter.layouts(asked.layouts)
        for layout in layouts:
            yield self._adapter(layout, asked.dtype, beside, trained)
        if words is not None and BUNDLED_IN in layouts:
            yield self._adapter(BUNDLE, asked.dtype, self.adapter, trained)

    def _words(self, words: Tokens, beside: Adapter | None) -> _Part:
        """Write a file for each new word; the adapter rests meanwhile."""
        if still := words.unmoved():
            raise ExportError(
                f"{', '.join(still[:4])}{' and more' if len(still) > 4 else ''}: never moved, so "
                "nothing was learned there: is the word in captions that the text encoder reads to "
                "the end, and the learning rate above 0?"
            )
        planned = {}
        for word, rows in words.vectors().items():
            path = self._path(file_word(word))
            tensors = cast_tensors(embeddings.single(word, rows), "fp32", path.name)
            facts = {**words.facts(), embeddings.WORD: word}
            planned[path] = tensors, self._metadata(facts, method="/textual-inversion")
        if beside is not None:
            beside.set_scale(0.0)
        try:
            trained = measured(self.family, words, self.recipe)
        finally:
            if beside is not None:
                beside.set_scale(1.0)
        return self._part(WORDS, "fp32", planned, trained, [*words.vectors()])

    def _adapter(self, layout: str, dtype: str, adapter: Adapter, trained: Reference) -> _Part:
        """Write the adapter in a layout, or with the new words in a bundle."""
        tensors, described = adapter.export_state(BUNDLED_IN if layout == BUNDLE else layout)
        path = self._path(layout)
        cast = cast_tensors(tensors, dtype, path.name)
        return self._part(layout, dtype, {path: (cast, self._metadata(described))}, trained, [None])

    def _part(
        self,
        layout: str,
        dtype: str,
        planned: Mapping[Path, tuple[Mapping[str, Tensor], Mapping[str, str]]],
        trained: Reference,
        words: Sequence[str | None],
    ) -> _Part:
        draft = Draft.of(planned)
        made = [
            partial(
                ExportedFile,
                path=path,
                layout=layout,
                dtype=dtype,
                tensors=len(planned[path][0]),
                bytes=written.stat().st_size,
                sha256=sha256(written),
                diffusers=self._by_diffusers(layout, planned[path][0]),
                word=word,
                plain=self._plain(),
            )
            for (path, written), word in zip(draft.pending.items(), words, strict=True)
        ]
        return _Part(layout, dtype, draft, trained, made)

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.recipe.name}-{ending}.safetensors"

    def _metadata(self, described: Mapping[str, str], **method: str) -> dict[str, str]:
        return modelcard.file_metadata(
            self.recipe,
            self.family.facts(),
            described,
            self.resolution,
            lesson=self.lesson,
            **method,
        )

    def _by_diffusers(self, layout: str, tensors: Mapping[str, Tensor]) -> bool:
        if layout in (WORDS, BUNDLE):
            return layout == WORDS and hasattr(self.family.pipeline(), "load_textual_inversion")
        return read_by_diffusers(tensors, kohya=self.family.kohya_by_diffusers)

    def _plain(self) -> modelcard.Plain:
        pipeline = self.family.pipeline()
        lacks = [
            name
            for name, component in pipeline.components.items()
            if component is None and name not in pipeline._optional_components
        ]
        keys = dict(self.family.embedding_keys)
        return modelcard.Plain(type(pipeline).__name__, keys, lacks)


def write_card(
    recipe: Recipe,
    files: Sequence[ExportedFile],
    resolution: int,
    scores: Mapping[str, str] | None = None,
    pictures: Sequence[tuple[str, Image]] = (),
) -> Path:
    """Write the model card beside exported files and return its path; an older one is replaced.

    resolution: edge of the pictures in pixels. scores: names and values to print, once known.
    pictures: prompts and what was drawn of them, to be shown in the card; kept in a folder beside.
    """
    shown = []
    for number, (prompt, picture) in enumerate(pictures[:_MOST_SHOWN], 1):
        shown.append((prompt, f"{SHOWN}/{number}.png"))
        file = files[0].path.parent / SHOWN / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        save_png(picture, file, {"prompt": prompt})
    described = [(f.path.name, f"{f.what}, {f.dtype}, verified") for f in files]
    words = [(f.word, f.path.name) for f in files if f.word is not None]
    path = files[0].path.parent / CARD
    readable = all(file.diffusers for file in (files[0], *(f for f in files if f.word is not None)))
    card = modelcard.model_card(
        recipe,
        described,
        resolution,
        scores,
        readable,
        words=words,
        plain=files[0].plain,
        pictures=shown,
    )
    write_whole(path, card)
    return path


def cast_tensors(tensors: Mapping[str, Tensor], dtype: str, name: str) -> dict[str, Tensor]:
    """Return `tensors` in `dtype` ("fp32", "fp16" or "bf16").

    Raises ExportError, naming the tensor, for NaN and for numbers the format cannot hold.
    """
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cast = {}
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ExportError(
                f"{name}: {key} holds NaN or infinite numbers: the training broke down; "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )
        # Numbers that stand for the strength of many others, and a magnitude, of which a small part
        # was learned: both are few, and rounding them would move a whole module.
        # The vectors of a word are few as well, and A1111 and ComfyUI read them in any format.
        whole = key.endswith(".alpha") or "magnitude_vector" in key or key.startswith("bundle_emb.")
        cast[key] = tensor.to(torch.float32 if whole else kind)
        if not bool(cast[key].isfinite().all()):
            raise ExportError(
                f"{name}: {key} reaches {float(tensor.abs().max()):g}, more than {dtype} can hold; "
                "set export.dtype: fp32 or bf16"
            )
    return cast


def measured(family: Family, adapter: Adapter, recipe: Recipe) -> Reference:
    """Return what files of `adapter`, attached to the trained `family`, are held to."""
    probe = make_probe(family, _probe_prompts(recipe), recipe.train.seed)
    return measure(family, adapter, probe, new_words=words_of(adapter) is not None)


def check(
    paths: Sequence[Path], recipe: Recipe, trained: Reference, device: torch.device, dtype: str
) -> Parity:
    """Load the files at `paths` into a fresh base, as `tunekit.loading` does, and compare.

    trained: what the recipe's base made of a probe with what was taught. dtype: number format of
    the files. Raises VerificationError, naming the first check that fails: every tensor of the
    files taken up, every module's weights changed as trained, the prediction equal within the
    formats' precision, and different from the base's.
    """
    gc.collect()  # of the base before, whose modules know each other
    fresh = families.load(recipe.base, device)
    return compare(paths, fresh, trained, dtype, recipe.base.dtype)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe_prompts(recipe: Recipe) -> list[str]:
    """Return what the pictures are called by default, and a prompt that is drawn for the report."""
    data = recipe.data
    return [
        expand((), data)[0],
        fill(recipe.evaluate.prompts[-1], data.trigger, data.class_noun),
    ]
