"""Which base a file is for, and the weights of a base where they lie, read one by one."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import families, hub
from tunekit.adapters.base import match_modules
from tunekit.errors import UserError, did_you_mean
from tunekit.files.names import Names, Place
from tunekit.files.stream import Form, TensorFile
from tunekit.modelfolder import ModelFolder, names_file
from tunekit.schema import BUNDLED, Base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.families import Family

_SAID = ("tunekit.base", "ss_sd_model_name")
_MADE_FOR = ("modelspec.architecture", "ss_base_model_version")
_INDEX = ".safetensors.index.json"


def base_called(model: str, config: str | None = None, variant: str | None = None) -> Base:
    """Return the base of a name. config: what describes it, where it is one file."""
    return Base(model=model, variant=variant, config=config if names_file(model) else None)


def check_config(config: str | None, *models: str | None) -> None:
    """Raise UserError for a description that describes nothing: none of the models is one file."""
    if config is not None and not any(model is not None and names_file(model) for model in models):
        raise UserError(f"--config: {config} would describe a base that is one file, and none is")


def find_base(
    asked: str | None, metadata: Mapping[str, str], path: Path, config: str | None = None
) -> Base:
    """Return the base that is `asked` for, or else the one that the file at `path` names.

    A folder, a Hub id, `toybox`, or one file, which the folder `config` describes. What a file says
    brings nothing from the Hub, since anybody may have written it: then, and where it names nothing
    that is here, UserError asks for a base.
    """
    check_config(config, asked)
    if asked is not None:
        return base_called(asked, config)
    named = next((metadata[key] for key in _SAID if metadata.get(key)), None)
    if named is not None and (named == BUNDLED or hub.as_path(named).is_dir()):
        return Base(model=named)
    if named is not None and hub.means_id(named):
        raise UserError(
            f"{path}: says it is for {named}, and what a file says of itself brings nothing from "
            f"the Hub: --base {named} does, or name a folder of the same kind (or toybox)"
        )
    made_for = next((metadata[key] for key in _MADE_FOR if metadata.get(key)), None)
    said = [f'is made for "{named}", which is no folder here'] if named else []
    said += [f"says it is for {made_for}"] if made_for else []
    raise UserError(
        f"{path}: {' and '.join(said) or 'does not say which base it is for'}: name a base of its "
        "kind with --base (toybox, a folder or a Hub id); what its modules are called is taken "
        "from it"
    )


def outline(base: Base) -> Family:
    """Return a base without its weights: names, shapes and facts."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of number formats, which weights alone have
    try:
        return families.load(base, "meta")
    finally:
        logging.set_verbosity(level)


def targets(family: Family, preset: str) -> set[Place]:
    """Return the modules of a preset that have a weight of two dimensions or more."""
    from torch import nn

    if preset not in family.lora_presets:
        known = family.lora_presets
        raise UserError(
            f"--targets: {preset} is none of {', '.join(known)}{did_you_mean(preset, known)}"
        )
    kinds = (nn.Linear, nn.Conv2d)
    found = {
        ("denoiser", name)
        for name in match_modules(family.denoiser, family.presets[preset], kinds, "--targets")
    }
    for encoder, module in family.teachable.items():
        patterns = family.text_lora_presets[preset]
        found |= {(encoder, n) for n in match_modules(module, patterns, kinds, "--targets")}
    return found


@dataclass(frozen=True)
class Entry:
    """A tensor of a base's files. name: as in the file. wide: as the wider world writes it.

    place: the module it belongs to, where an adapter can name one; which: "weight" or "bias".
    """

    name: str
    wide: str
    place: Place | None
    which: str


class Apart:
    """The components of a base in one file, taken apart when they are read: one is in memory."""

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self._family, self._dtype = family, dtype
        self._now, self._state = "", dict[str, Any]()

    def state(self, name: str) -> Mapping[str, Tensor]:
        """Return a component's tensors, which stay until those of another are asked for."""
        if self._now != name:
            self._state = {}
            self._state, self._now = self._family.alone(name, self._dtype).state_dict(), name
        return self._state

    def outline(self, name: str) -> Mapping[str, Tensor]:
        """Return them without their numbers, in the format that they are read in."""
        return {
            key: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for key, tensor in self._family.components()[name].state_dict().items()
        }


class Held:
    """A component of such a base, read as if it lay in a file at `path`."""

    def __init__(self, path: Path, apart: Apart, name: str) -> None:
        self.path, self._apart, self._name = path, apart, name
        self.forms = {key: Form.of(tensor) for key, tensor in apart.outline(name).items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own."""
        # What a library wants in float32 whatever it is told came from the file's own format.
        held = self._apart.state(self._name)[name]
        return held.to(self.forms[name].kind, copy=True)


Source = TensorFile | Held


class Weights:
    """The weights of a base's denoiser and text encoders: in a diffusers folder, or in one file.

    One file is taken apart for it, a component at a time; all others are read tensor by tensor.
    entries: component -> what holds its tensors, and an entry for each. others: the other
    components of one file, by their diffusers names. Raises UserError where something is missing.
    """

    def __init__(self, base: Base, family: Family, names: Names) -> None:
        self.base, self.label, self._names = base, family.label, names
        self.folder = ModelFolder.open(base)
        self.others: dict[str, Held] = {}
        self.remarks: list[str] = []
        parts = family.components()
        rest = [
            name
            for name, value in self.folder.model_index.items()
            if isinstance(value, list) and value[:1] != [None] and name not in parts
        ]
        self.folder.bring(
            [*parts, *(n for n in rest if n.startswith(("tokenizer", "scheduler")))],
            parts,
            base.variant,
        )
        self._where: dict[tuple[Place, str], tuple[Source, str]] = {}
        self.entries: dict[str, list[tuple[Source, list[Entry]]]] = {}
        taken = self._taken_apart(family) if self.folder.weights is not None else {}
        for component, where in names.folders.items():
            held: list[Source] = [taken.pop(where)] if where in taken else []
            files = [] if held else weight_files(self.folder.path / where, base.variant)
            held += [TensorFile(path) for path in files]
            self.entries[component] = [self._entries(component, source) for source in held]
        self.others = taken

    def _taken_apart(self, family: Family) -> dict[str, Held]:
        """Return every component of one file, by its diffusers name, in the file's own format."""
        import torch

        assert self.folder.weights is not None
        kinds = Counter(form.dtype for form in TensorFile(self.folder.weights).forms.values())
        most = kinds.most_common(1)[0][0]
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(most, torch.float32)
        self.remarks.append(
            f"{self.label}: is one file: its parts are taken out one after the other, in "
            f"{str(dtype).removeprefix('torch.')}"
        )
        apart, texts = Apart(family, dtype), family.text_encoders
        return {
            name: Held(self.folder.path / name / _stem(name in texts), apart, name)
            for name in family.components()
        }

    def _entries(self, component: str, file: Source) -> tuple[Source, list[Entry]]:
        own = {place[1]: place for place in self._names.modules if place[0] == component}
        tops = {name.partition(".")[0] for name in own}
        wide = {self._names.wide(place): place for place in own.values()}
        found = []
        for name in file.forms:
            module, _, which = name.rpartition(".")
            place = own.get(module) or wide.get(module)
            outer = name
            if place is not None:
                known = self._names.wide(place)
                # Only a level that this release of a library leaves out of all modules is restored.
                outer = name if known.partition(".")[0] in tops else f"{known}.{which}"
                self._where[place, which] = file, name
            found.append(Entry(name, outer, place, which))
        return file, found

    def read(self, place: Place, which: str = "weight") -> Tensor:
        """Return a module's weight or bias, as it lies in the file."""
        if (place, which) not in self._where:
            raise UserError(f"{self.label}: has no {which} of {'.'.join(place)} in its files")
        file, name = self._where[place, which]
        return file.read(name)

    def holds(self, place: Place, which: str) -> bool:
        """Say whether the files have a module's weight or bias."""
        return (place, which) in self._where

    @functools.cached_property
    def tables(self) -> dict[str, dict[str, tuple[Source, Entry]]]:
        """Component -> every tensor's file and entry by its wide name."""
        return {
            component: {entry.wide: (file, entry) for file, entries in held for entry in entries}
            for component, held in self.entries.items()
        }


def _stem(text: bool) -> str:
    return f"{'model' if text else 'diffusion_pytorch_model'}.safetensors"


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return a component's weights: one file, or the parts that its index names."""
    kind = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        for whole in (folder / f"{stem}{kind}.safetensors",):
            if whole.is_file():
                return [whole]
        for index in (folder / f"{stem}{_INDEX[:-5]}{kind}.json", folder / f"{stem}{kind}{_INDEX}"):
            if index.is_file():
                return _parts(index)
    raise UserError(f"{folder}: holds no weights that this reads")


def _parts(index: Path) -> list[Path]:
    try:
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(held.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: is damaged: it names no files of weights") from None
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not index.with_name(name).is_file():
            raise UserError(f"{index}: names {name!r}, which is no file of weights beside it")
    return [index.with_name(name) for name in names]
