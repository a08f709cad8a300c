"""Adapter files in a client's layout, each verified through that client's own loading code.

A file gets its name only after it was loaded into a fresh pipeline and did there what the trained
model does. One that fails is kept beside it as ``*.rejected``, so that nobody takes it for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import embeddings, families, modelcard
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.data.captions import expand, fill
from tunekit.errors import UserError
from tunekit.loading import VerificationError, read_by_diffusers
from tunekit.pictures import save_png
from tunekit.schema_tokens import file_word
from tunekit.tokens import adapter_of, words_of
from tunekit.verification import Parity, compare, make_probe, measure
from tunekit.wholefile import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.recipe import Recipe

CARD = "README.md"
SHOWN = "pictures"
"""The folder of the card's pictures, beside it."""
_MOST_SHOWN = 6
_PENDING = ".unverified"
_REJECTED = ".rejected"
WORDS, BUNDLE = "words", "bundle"
BUNDLED_IN = "kohya"
"""The layout of the adapter in a bundle: that of the clients which read bundles."""


class ExportError(UserError):
    """An exported file failed a check; the message names the check and where the file is kept."""


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

    family: the base with `adapter` still attached; it draws and trains on as before. New words get
    a file each, and where there is an adapter in kohya's naming beside them, a bundle as well.
    lesson: what it was taught, for the metadata. The card has no scores and no pictures yet.

    Raises ExportError where a file fails its verification or a new word's vector never moved, and
    UserError where a layout cannot carry the adapter or the disk refuses. Files of an earlier
    export keep their names until theirs are replaced by verified ones.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    resolution = (*recipe.data.resolutions, family.default_resolution)[0]
    work = _Work(family, adapter, recipe, out_dir, resolution, lesson)
    words = work.words()
    done = [*work.adapters([file.path for file in words]), *words]
    if words and any(file.layout == BUNDLED_IN for file in done):
        done.append(work.bundle())
    write_card(recipe, done, resolution)
    return done


@dataclass(frozen=True)
class _Work:
    """One export."""

    family: Family
    adapter: Adapter
    recipe: Recipe
    folder: Path
    resolution: int
    lesson: modelcard.Lesson | None

    def words(self) -> list[ExportedFile]:
        """Write and verify a file for each new word; the adapter rests meanwhile."""
        words, beside = words_of(self.adapter), adapter_of(self.adapter)
        if words is None:
            return []
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
            parity = _write_verified(planned, lambda paths: self._verify(paths, words, "fp32"))
        finally:
            if beside is not None:
                beside.set_scale(1.0)
        return [
            self._done(path, WORDS, "fp32", planned[path][0], parity, word)
            for path, word in zip(planned, words.vectors(), strict=True)
        ]

    def adapters(self, words: Sequence[Path]) -> list[ExportedFile]:
        """Write and verify the adapter in each layout, with the files of new words beside it."""
        adapter, recipe = adapter_of(self.adapter), self.recipe
        if adapter is None or recipe.adapter is None:
            return []
        done, dtype = [], recipe.export.dtype
        for layout in recipe.adapter.layouts(recipe.export.layouts):
            tensors, described = adapter.export_state(layout)
            path = self._path(layout)
            cast = cast_tensors(tensors, dtype, path.name)
            parity = _write_verified(
                {path: (cast, self._metadata(described))},
                lambda paths: self._verify([*words, *paths], self.adapter, dtype),
            )
            done.append(self._done(path, layout, dtype, cast, parity))
        return done

    def bundle(self) -> ExportedFile:
        """Write and verify adapter and new words in one file."""
        tensors, described = self.adapter.export_state(BUNDLED_IN)
        path, dtype = self._path(BUNDLE), self.recipe.export.dtype
        cast = cast_tensors(tensors, dtype, path.name)
        parity = _write_verified(
            {path: (cast, self._metadata(described))},
            lambda paths: self._verify(paths, self.adapter, dtype),
        )
        return self._done(path, BUNDLE, dtype, cast, parity)

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

    def _verify(self, paths: Sequence[Path], adapter: Adapter, dtype: str) -> Parity:
        return verify(paths, self.recipe, self.family, adapter, dtype)

    def _done(
        self,
        path: Path,
        layout: str,
        dtype: str,
        tensors: Mapping[str, Tensor],
        parity: Parity,
        word: str | None = None,
    ) -> ExportedFile:
        return ExportedFile(
            path=path,
            layout=layout,
            dtype=dtype,
            tensors=len(tensors),
            bytes=path.stat().st_size,
            sha256=sha256(path),
            parity=parity,
            diffusers=self._by_diffusers(layout, tensors),
            word=word,
            plain=self._plain(),
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


def _write_verified(
    planned: Mapping[Path, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    check: Callable[[list[Path]], Parity],
) -> Parity:
    """Write files of (tensors, metadata) that `check` verifies together before they have names."""
    pending = {path: path.with_name(f"{path.stem}{_PENDING}{path.suffix}") for path in planned}
    try:
        for path, (tensors, metadata) in planned.items():
            write_safetensors(pending[path], tensors, metadata)
            said = {**metadata, **modelcard.hashes(pending[path])}
            write_safetensors(pending[path], tensors, said)
            _read_back(pending[path], tensors, said)
        parity = check(list(pending.values()))
    except VerificationError as fault:
        kept = []
        for path, written in pending.items():
            rejected = path.with_name(f"{path.name}{_REJECTED}")
            if written.exists():
                written.replace(rejected)
                kept.append(rejected.name)
        what = "the file is" if len(kept) == 1 else "the files are"
        raise ExportError(f"{path}: {fault}; {what} kept as {', '.join(kept)}") from fault
    except BaseException:
        for written in pending.values():
            written.unlink(missing_ok=True)
        raise
    for path, written in pending.items():
        written.replace(path)
        path.with_name(f"{path.name}{_REJECTED}").unlink(missing_ok=True)
    return parity


def _read_back(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise VerificationError where the disk holds anything else than what was written."""
    read, said = read_safetensors(path)
    if read.keys() != tensors.keys() or said != dict(metadata):
        raise VerificationError("read back", "names or metadata differ from what was written")
    for key, tensor in tensors.items():
        if read[key].dtype != tensor.dtype or not read[key].equal(tensor):
            raise VerificationError("read back", f"{key} differs from what was written")


def verify(
    paths: Path | Sequence[Path],
    recipe: Recipe,
    trained: Family,
    adapter: Adapter,
    dtype: str | None = None,
) -> Parity:
    """Load the files at `paths` into a fresh base, as `tunekit.loading` does, and compare.

    trained: the recipe's base with the trained `adapter` attached. dtype: number format of the
    file; None: the recipe's. Raises VerificationError, naming the first check that fails: every
    tensor of the file taken up, every module's weights changed as trained, the prediction equal
    within the formats' precision, and different from the base's.
    """
    fresh = families.load(recipe.base, trained.device)
    probe = make_probe(fresh, _probe_prompts(recipe), recipe.train.seed)
    reference = measure(trained, adapter, probe, new_words=words_of(adapter) is not None)
    together = [paths] if isinstance(paths, Path) else list(paths)
    return compare(
        together, fresh, probe, reference, dtype or recipe.export.dtype, recipe.base.dtype
    )


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
