"""Adapters on a base: put in, told how strong they are, and taken off again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import checkpoint, embeddings, tokens
from tunekit.errors import UserError
from tunekit.loading import VerificationError, load_file, peft_layers, remove_layers
from tunekit.runfolder import RECIPE, RunFolder
from tunekit.schema_tokens import RANDOM

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tunekit.families import Family
    from tunekit.loaded import SetScale

Weight = float | tuple[float, float]
"""An adapter's strength: everywhere, or in the denoiser and in the text encoders."""
_STATE = "adapter"  # the set of tensors in a checkpoint that the adapter's kind reads


@dataclass(frozen=True)
class Weighted:
    """An adapter file or checkpoint folder, and how strong it is: 1 as trained.

    text: in the text encoders; None: as elsewhere.
    """

    path: Path
    weight: float = 1.0
    text: float | None = None

    def __post_init__(self) -> None:
        for weight in (self.weight, self.text):
            if weight is not None and not math.isfinite(weight):
                raise UserError(f"{self.path}: the weight {weight} is not a number")

    def described(self) -> dict[str, JsonValue]:
        """Return what a picture says of it: enough to know the same one again, and no path."""
        name = self.path.name
        if is_checkpoint(self.path):
            name = f"{self.path.resolve().parent.parent.name}/{name}"
        told: dict[str, JsonValue] = {"name": name, "weight": self.weight}
        if self.text is not None:
            told["text_weight"] = self.text
        return {**told, "sha256": digest(self.path)}


@dataclass(frozen=True)
class _Held:
    """An adapter that is on: what sets its strength, and what takes it off again."""

    adapter: Weighted
    set_scale: SetScale
    remove: Callable[[], None]


AdapterSource = str | Path | tuple[str | Path, Weight] | Weighted


class Mounted:
    """Adapters at work in a family, all of them or none.

    described: what a picture says of each. Raises UserError for what is not safe to read or does
    not fit; the family is then as it was.
    """

    def __init__(self, family: Family, adapters: Sequence[Weighted]) -> None:
        self.adapters = sorted(adapters, key=lambda one: _turn(one.path))
        self.described: list[dict[str, JsonValue]] = []
        self._on: list[_Held] = []
        try:
            for number, adapter in enumerate(self.adapters):
                self._on.append(_put(family, number, adapter))
                self.described.append(adapter.described())
        except BaseException:
            self.remove()
            raise
        for component in (family.denoiser, *family.text_encoders.values()):
            component.requires_grad_(False)
        self.set_scale(1.0)
        for layer in peft_layers(family).values():
            layer.set_adapter(list(layer.scaling), inference_mode=True)

    def set_scale(self, scale: float, text: float | None = None) -> None:
        """Draw with `scale` times every adapter's own strength; text: in the text encoders.

        Raises UserError for a checkpoint that is told two strengths.
        """
        for held in self._on:
            own = held.adapter
            inner = scale if text is None else text
            held.set_scale(
                scale * own.weight, inner * (own.weight if own.text is None else own.text)
            )

    def remove(self) -> None:
        """Take all of them off: the family is as it was."""
        while self._on:
            self._on.pop().remove()


def weighted(adapters: AdapterSource | Iterable[AdapterSource]) -> list[Weighted]:
    """Return adapters as files and checkpoints; of a run's folder, what it exported.

    Raises UserError for what is not there, cannot be loaded together, or has no number as weight.
    """
    found = [one for source in sources(adapters) for one in _found(source)]
    _refuse_together([one.path for one in found])
    return found


def digest(path: Path) -> str | None:
    """Return the sha256 by which pictures know a file or a checkpoint; None for neither."""
    file = path / f"{_STATE}.safetensors" if is_checkpoint(path) else path
    return checkpoint.sha256(file) if file.is_file() else None


def sources(adapters: AdapterSource | Iterable[AdapterSource]) -> list[AdapterSource]:
    """Return adapters as a list, a single one too."""
    if isinstance(adapters, (str, Path, Weighted)):
        return [adapters]
    if isinstance(adapters, tuple) and len(adapters) == 2 and _is_weight(adapters[1]):
        return [adapters]  # type: ignore[list-item]
    return list(adapters)  # type: ignore[arg-type]


def path_of(source: AdapterSource) -> Path:
    """Return where an adapter lies."""
    if isinstance(source, Weighted):
        return source.path
    return Path(source[0] if isinstance(source, tuple) else source)


def _is_weight(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_weight, value))
    return isinstance(value, int | float)


def _found(source: AdapterSource) -> list[Weighted]:
    if isinstance(source, Weighted):
        return [source]
    path, weight = source if isinstance(source, tuple) else (source, 1.0)
    whole, text = weight if isinstance(weight, tuple) else (weight, None)
    found = Path(path)
    if not found.exists():
        raise UserError(f"{path}: there is no such file")
    if found.is_dir() and not is_checkpoint(found):
        return [Weighted(file, whole, text) for file in RunFolder.open(found).exported()]
    if found.is_file() and is_checkpoint(found.parent):
        found = found.parent
    return [Weighted(found, whole, text)]


def _turn(path: Path) -> int:
    """Return when a file or checkpoint is loaded, the lowest first.

    New words first: diffusers makes the vocabulary larger, which a checkpoint puts its own beside.
    Then the checkpoint: it looks for the base's own modules, which files' layers would hide.
    """
    if is_checkpoint(path):
        return 1
    return 0 if embeddings.contents(path)[0] else 2


def _refuse_together(paths: Sequence[Path]) -> None:
    """Raise UserError for what cannot be loaded into one base."""
    states = [path for path in paths if is_checkpoint(path)]
    if len(states) > 1:
        raise UserError(
            f"{states[1]}: only one checkpoint can be drawn with at a time; combine exported files"
        )
    for path in paths if states else ():
        if not is_checkpoint(path) and embeddings.contents(path) == (True, True):
            raise UserError(
                f"{path}: is a bundle, which cannot be drawn with beside a checkpoint: give the "
                "files of its words and its adapter"
            )


def is_checkpoint(path: Path) -> bool:
    """Say whether `path` is a checkpoint's folder; that it is whole is checked when it is read."""
    return (path / checkpoint.MANIFEST).is_file() and not (path / RECIPE).is_file()


def _put(family: Family, number: int, adapter: Weighted) -> _Held:
    """Put an adapter into `family`; where that fails, nothing of it stays."""
    if is_checkpoint(adapter.path):
        return _put_checkpoint(family, adapter)
    name = f"tunekit_file_{number}"
    try:
        loaded = load_file(family, adapter.path, name)
    except VerificationError as fault:
        remove_layers(family, name)
        raise UserError(f"{adapter.path}: {fault.said}") from fault
    return _Held(adapter, loaded.set_scale, loaded.remove)


def _put_checkpoint(family: Family, adapter: Weighted) -> _Held:
    path = adapter.path
    recipe = RunFolder.around(path).recipe
    state = checkpoint.read(path).tensors.get(_STATE)
    if state is None:
        raise UserError(f"{path}: holds no {_STATE}.safetensors")
    # Where a word started is in the checkpoint; a file that it started at may be gone.
    words = [
        token.model_copy(update={"init": RANDOM}) if token.init_file else token
        for token in recipe.tokens
    ]
    attached = tokens.attach(
        family, recipe.adapter, words, recipe.data.class_noun, recipe.train.seed
    )
    try:
        attached.load_state(state)
    except UserError:
        attached.detach()
        raise

    def set_scale(scale: float, text: float | None = None) -> None:
        if text is not None and text != scale:
            raise UserError(
                f"{path}: a checkpoint has one strength, in denoiser and text encoders alike; draw "
                "from the run's export to set them apart"
            )
        attached.set_scale(scale)

    return _Held(adapter, set_scale, attached.detach)
