"""Every name that a file may have for a base's module, and the name that a client reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tunekit.changes.joined import Joint, by_module, by_name
from tunekit.errors import UserError, did_you_mean, some
from tunekit.schema import LAYOUTS

if TYPE_CHECKING:
    from torch import nn

    from tunekit.families import Family

Place = tuple[str, str]
"""Component ("denoiser" or a text encoder's name) and the dotted name of a module in it."""

_PEFT = "base_model.model."
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
SOME = 12  # names that a refusal lists


class Names:
    """The modules of a base that have a weight or a bias, by whatever files call them.

    family: of the base, also on the device "meta".
    """

    def __init__(self, family: Family) -> None:
        import torch

        self._family = family
        self.label, self.family = family.label, family.name
        self.modules: dict[Place, nn.Module] = {}
        whole: dict[str, nn.Module] = {"denoiser": family.denoiser, **family.text_encoders}
        self.folders = {name: self._folder(name) for name in whole}
        """Component -> its folder in a diffusers model."""
        self._known: dict[str, Place | None] = {}
        self._joints = by_name(family.joints)
        self._joined = by_module(family.joints)
        for component, model in whole.items():
            for name, module in model.named_modules():
                held: Any = getattr(module, "weight", None)
                if name and isinstance(held, torch.Tensor):
                    self.modules[component, name] = module
        for place in self.modules:
            for layout in LAYOUTS:
                if name := self._written(layout, place):
                    self._known[name] = place
        own = set(self._known)
        for place in self.modules:
            for name in self._aliases(place):
                if name not in own:  # two modules of one name: which is meant, nobody can tell
                    self._known[name] = place if self._known.get(name, place) == place else None

    def _folder(self, component: str) -> str:
        return self._family.client_name(LAYOUTS[0], component, "x").partition(".")[0]

    def written(self, layout: str, place: Place) -> str:
        """Return what the client of a layout calls a module; UserError for one that has no name."""
        return self._family.client_name(layout, *place)

    def _written(self, layout: str, place: Place) -> str | None:
        try:
            return self.written(layout, place)
        except UserError:  # this client has no name for it, so that no file can have one either
            return None

    def joint(self, name: str) -> Joint | None:
        """Return what a file calls `name` where it joins the denoiser's modules, or renames one."""
        return self._joints.get(name.removeprefix(_PEFT))

    def joined(self, place: Place) -> Joint | None:
        """Return what holds a module's rows in the files of sd-scripts; None: it holds its own."""
        return self._joined.get(place[1]) if place[0] == "denoiser" else None

    def shape(self, place: Place) -> tuple[int, ...]:
        """Return the shape of a module's weight."""
        weight: Any = self.modules[place].weight
        return tuple(weight.shape)

    def wide(self, place: Place) -> str:
        """Return the module's name in its component as files of the wider world have it."""
        return self.written("diffusers", place).partition(".")[2]

    def _aliases(self, place: Place) -> Iterator[str]:
        """Yield the other names: of PEFT, LyCORIS, other releases of the libraries."""
        component, name = place
        folder = self.folders[component]
        if kohya := self._written("kohya", place):
            yield kohya.replace("_text_model_", "_", 1)
        for bare in dict.fromkeys((name, self.wide(place))):
            under = bare.replace(".", "_")
            yield from (bare, f"{folder}.{bare}", f"lycoris_{under}")
            yield f"lora_{folder}_{under}"
            if component == "denoiser":
                yield from (f"lora_unet_{under}", f"lora_transformer_{under}")

    def find(self, name: str) -> Place | None:
        """Return the module that a file calls `name`; None where it is none of the base's.

        Raises UserError for a name of two modules.
        """
        for spelled in _spellings(name):
            if spelled in self._known:
                place = self._known[spelled]
                if place is None:
                    raise UserError(f"{name} is a module of more than one part of {self.label}")
                return place
        return None

    def unknown(self, names: list[str]) -> str:
        """Return the sentence that refuses names which are no modules of the base."""
        near = did_you_mean(names[0], [*self._known, *self._joints])
        return f"{len(names)} names are no modules of {self.label}: {some(names, SOME)}{near}"


def _spellings(name: str) -> Iterator[str]:
    """Yield a name, then what PEFT's and diffusers' older releases would have meant by it."""
    bare = name.removeprefix(_PEFT)
    yield bare
    plain = bare.replace(".processor.", ".")
    yield plain
    if match := re.fullmatch(r"(.+\.)to_(q|k|v|out)", plain):
        if match[2] == "out":
            yield f"{plain}.0"
        yield match[1] + _PROJECTIONS[match[2]]
