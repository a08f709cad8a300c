"""A picture drawn again: the files that it names are found, and known by their hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import hub, recorded
from tunekit.errors import UserError
from tunekit.mounted import AdapterSource, Weighted, digest, weighted
from tunekit.recorded import File, Recorded
from tunekit.runfolder import CHECKPOINTS, EXPORT
from tunekit.schema import BUNDLED, Base

if TYPE_CHECKING:
    from PIL import Image

    from tunekit.drawing import DrawSettings

_RUNS = "runs"
_STEP = "/step-"


@dataclass(frozen=True)
class Redraw:
    """A picture, and what it says of how it was drawn."""

    picture: Path
    recorded: Recorded

    def base(self, named: str | None = None) -> Base:
        """Return the base that drew it: the bundled one, a folder nearby, or one of the Hub that
        was brought here before.

        named: another, which is read as that one was. Raises UserError where it is none of these.
        """
        settings, told = dict(self.recorded.base_settings), self.recorded
        for key in settings.keys() & set(recorded.FILES):
            settings[key] = str(self._only(str(settings[key]), f"its {key}", "--run"))
        near = self._nearby(told.base) if named is None and told.base != BUNDLED else []
        model = named or (str(near[0]) if near else told.base)
        base = recorded.base_of(self.picture, model, settings)
        if named is not None or near or model == BUNDLED:
            return base
        if not hub.is_id(model):
            raise self._missing(model, "its base", "--base")
        if not hub.here(model, base.revision):
            raise UserError(
                f"{self.picture}: was drawn with {model}, which is not on this disk, and what a "
                f"picture says brings nothing from the Hub: --base {model} does"
            )
        return base

    def adapters(self) -> list[Weighted]:
        """Return the adapters that drew it, each with its strength.

        Raises UserError where one is not nearby, or is not the one that drew it.
        """
        found = []
        for told in self.recorded.adapters:
            near = [path for path in self._nearby(told.name) if digest(path) is not None]
            right = [path for path in near if told.sha256 in (None, digest(path))]
            if near and not right:
                raise UserError(
                    f"{near[0]}: is not the {told.name} that drew {self.picture}: its sha256 is "
                    "another one; name the right one, or this one all the same, with --adapter"
                )
            if not right:
                raise self._missing(told.name, "an adapter", "--adapter")
            found.append(Weighted(right[0], told.weight, told.text_weight))
        return found

    def guides(self, request: Any) -> dict[str, Any]:
        """Return where the pictures lie that guided the drawing, and how strongly they did.

        By the names of `request.Request`, of which what is asked for goes first. Raises UserError
        for a picture that is not nearby, or is not the one that guided it.
        """
        start, control, net = self.recorded.start, self.recorded.control, self.recorded.controlnet
        told: dict[str, Any] = {}
        if start is not None:
            told |= {"init": start, "mask": start.mask, "strength": start.strength}
            told["extend"] = start.extend
        if control is not None:
            told |= {"control_image": control, "control_scale": control.scale}
        if net is not None:
            told["controlnet"] = File(name=net.name)  # known by its weights, once they are read
        found = {}
        for key, value in told.items():
            if value is not None and not getattr(request, key):
                option = f"--{key.replace('_', '-')}"
                found[key] = self._same(value, option) if isinstance(value, File) else value
        return found

    def _same(self, told: File, option: str) -> Path:
        """Return the file that a picture names; UserError where it is another one or none."""
        near = self._nearby(told.name)
        right = [path for path in near if told.sha256 in (None, digest(path))]
        if near and not right:
            raise UserError(
                f"{near[0]}: is not the {told.name} of which {self.picture} was drawn: its sha256 "
                f"is another one; name the right one, or this one all the same, with {option}"
            )
        if not right:
            raise self._missing(told.name, "a file", option)
        return right[0]

    def guides_differ(self, settings: DrawSettings, controlnet: object) -> Iterator[str]:
        """Yield, in words, which guides are not those that the picture was drawn with.

        controlnet: what pictures now say of the ControlNet.
        """
        told = self.recorded
        now = {"start": settings.start, "control": settings.control}
        for key, guide in now.items():
            was: File | None = getattr(told, key)
            if was is not None and guide is not None and guide.told["sha256"] != was.sha256:
                yield f"{self.picture}: was drawn with another picture than {guide.told['name']}"
        net = told.controlnet
        if net is not None and isinstance(controlnet, dict) and controlnet["sha256"] != net.sha256:
            yield f"{self.picture}: was drawn with another ControlNet than {controlnet['name']}"

    def as_strong(self, given: Sequence[AdapterSource]) -> list[Weighted]:
        """Return the adapters given, as strong as they were where no strength is asked for."""
        known = {told.sha256: told for told in self.recorded.adapters}
        made = []
        for source in given:
            for adapter in weighted(source):
                told = known.get(digest(adapter.path))
                if told is not None and told.sha256 and not isinstance(source, tuple):
                    adapter = Weighted(adapter.path, told.weight, told.text_weight)
                made.append(adapter)
        return made

    def base_differs(self, fingerprint: str) -> str | None:
        """Return in words that a base is not the one that drew the picture; None where it is."""
        told = self.recorded
        if told.base_sha256 in (None, fingerprint):
            return None
        return (
            f"{self.picture}: its base {told.base} had other weights or settings than the one that "
            "is here (its sha256 differs)"
        )

    def differences(self, adapters: Sequence[Weighted]) -> Iterator[str]:
        """Yield, in words, how these adapters are not those that drew the picture."""
        told = self.recorded
        if told.base_sha256 is None:
            yield f"{self.picture}: does not say the hash of its base, {told.base}"
        now = [digest(adapter.path) for adapter in adapters]
        for adapter in told.adapters:
            if adapter.sha256 is None:
                yield f"{self.picture}: does not say the hash of its adapter, {adapter.name}"
            elif adapter.sha256 not in now:
                yield f"{self.picture}: was drawn with {adapter.name}, which is not drawn with here"
        before = {adapter.sha256 for adapter in told.adapters}
        for mounted, held in zip(adapters, now, strict=True):
            if held not in before and None not in before:
                yield f"{self.picture}: was drawn without {mounted.path.name}"

    def compared(self, image: Image.Image) -> str:
        """Return in words whether a picture is, pixel for pixel, the one that was drawn before."""
        from tunekit.data.images import open_rgb

        if self.picture.suffix.lower() in (".jpg", ".jpeg"):
            return f"{self.picture}: drawn again; a JPEG keeps pixels nearly, so none are compared"
        before = open_rgb(self.picture)
        if before.size == image.size and before.tobytes() == image.tobytes():
            return f"{self.picture}: drawn again, equal pixel for pixel"
        return (
            f"{self.picture}: drawn again, and not equal: another machine, device or version of a "
            "library reckons otherwise, or the picture was changed since"
        )

    def _only(self, name: str, what: str, option: str) -> Path:
        near = self._nearby(name)
        if not near:
            raise self._missing(name, what, option)
        return near[0]

    def _nearby(self, name: str) -> list[Path]:
        """Return what is there of this name: here, beside the picture, or in a run.

        name: a last name, or that of a checkpoint with its run's.
        """
        here, beside = Path(), self.picture.parent
        if _STEP in name:
            run, step = name.split("/")
            inside = Path(run) / CHECKPOINTS / step
            places = [place / inside for place in (here, here / _RUNS, beside, beside / "../..")]
        else:
            runs = sorted((here / _RUNS).glob(f"*/{EXPORT}"))
            places = [place / name for place in (here, beside, beside / ".." / EXPORT, *runs)]
        return [place for place in places if place.exists()]

    def _missing(self, name: str, what: str, option: str) -> UserError:
        return UserError(
            f"{self.picture}: was drawn with {what}, {name}, which is not in this folder, in a run "
            f"of {_RUNS}/ or beside the picture; name it with {option}"
        )
