"""What somebody asks to be drawn, and everything that is decided of it before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from tunekit import known, promptfile, recorded
from tunekit.data.captions import fill
from tunekit.drawing import DrawSettings, Wanted, settings_of
from tunekit.errors import UserError, did_you_mean
from tunekit.guides import Control, Start
from tunekit.known import Known
from tunekit.mounted import AdapterSource, Weighted, path_of, weighted
from tunekit.redraw import Redraw
from tunekit.runfolder import RunFolder
from tunekit.schema import Base, Quantized

_SETTINGS = "negative_prompt steps guidance_scale scheduler width height scale text_scale".split()

_SIZE = {"width", "height"}


@dataclass(frozen=True)
class Request:
    """What to draw and with what; None: as the run, file or picture has it.

    run: a run folder; checkpoint: the name of one of its checkpoints, instead of its exported file.
    adapters: adapter files or checkpoint folders, as of `inference.load`. base: needed where
    neither run, files nor picture say it. quantize: as the recipe's base.quantize; None: the full
    base. picture: one that was drawn before and is drawn again; whatever else is asked for goes
    over what it says.

    init: a picture to start from; mask, strength, extend: as of `guides.Start.read`. controlnet: a
    ControlNet's folder; control_image: what it is given; control_scale: how strongly.

    prompts: ``{trigger}`` and ``{class}`` are filled in where a recipe is known, and ``{{`` is a
    brace there. prompt_file: more of them, a line each, with settings of their own
    (`promptfile.read`), which go over all others. seed: of the first picture of each prompt; count:
    pictures per prompt, each with the next seed; batch: how many of them are drawn at a time. The
    others are those of `drawing.DrawSettings`.
    """

    run: Path | None = None
    checkpoint: str | None = None
    adapters: Sequence[AdapterSource] = ()
    base: str | None = None
    quantize: str | None = None
    picture: Path | None = None
    prompts: Sequence[str] = ()
    prompt_file: Path | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    count: int | None = None
    batch: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    scale: float | None = None
    text_scale: float | None = None
    width: int | None = None
    height: int | None = None
    init: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    extend: Mapping[str, int] = field(default_factory=dict)
    controlnet: Path | None = None
    control_image: Path | None = None
    control_scale: float | None = None

    def values(self) -> dict[str, Any]:
        """Return the settings that are asked for, by their names in `DrawSettings`."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def guides(self) -> dict[str, Any]:
        """Return the pictures that guide the drawing, read, by their names in `DrawSettings`."""
        read: dict[str, Any] = {}
        if self.init is not None:
            read["start"] = Start.read(self.init, self.strength, self.mask, self.extend)
        elif self.mask is not None or self.strength is not None or self.extend:
            raise UserError("init: mask, strength and extend need a picture to start from (--init)")
        if (self.control_image is None) != (self.controlnet is None):
            raise UserError(
                "controlnet: a ControlNet and the picture it is given go together (--controlnet, "
                "--control-image)"
            )
        if self.control_image is not None:
            read["control"] = Control.read(self.control_image, self.control_scale)
        elif self.control_scale is not None:
            raise UserError("control_scale: scales nothing without a ControlNet (--controlnet)")
        return read

    def seeds(self, first: int | None) -> tuple[int, ...]:
        """Return the seeds of a prompt; first: where it says one itself."""
        if self.count is not None and not 1 <= self.count <= 10_000:
            raise UserError(f"count: {self.count} is not in 1 to 10000")
        start = next((seed for seed in (first, self.seed) if seed is not None), 1)
        return tuple(range(start, start + (self.count or 1)))

    def resolved(self) -> tuple[Known, list[AdapterSource]]:
        """Return what run and files say, and every adapter to load."""
        adapters = list(self.adapters)
        if self.run is not None:
            run = RunFolder.open(self.run)
            said = known.of_run(run)
            adapters[:0] = [run.checkpoint(self.checkpoint)] if self.checkpoint else run.exported()
        elif self.checkpoint is not None:
            raise UserError(
                f"checkpoint: {self.checkpoint} is looked for in a run; name it (--run)"
            )
        else:
            said = known.said_by_all([path_of(source) for source in adapters])
        if self.base is not None:
            said = replace(said, base=said.named(self.base))
        return said, adapters


@dataclass(frozen=True)
class Plan:
    """What is loaded and drawn. name: what the pictures go under. again: the picture that is drawn
    once more; named: whether the user named its base; unchanged: whether all settings are its own.
    """

    base: Base
    adapters: list[Weighted]
    wanted: list[Wanted]
    name: str
    again: Redraw | None = None
    named: bool = True
    unchanged: bool = False
    controlnet: Path | None = None


def plan(request: Request) -> Plan:
    """Return what a request comes to.

    Raises UserError where something is missing, unsafe, unknown or contradictory.
    """
    if request.picture is not None:
        return _again(request, request.picture)
    said, adapters = request.resolved()
    base = _narrowed(said.required(), request.quantize)
    wanted = _wanted(request, said.values(), _filler(said))
    if not wanted:
        if said.evaluate is None:
            raise UserError("prompt: name at least one, as in --prompt 'a red robot'")
        plain = request.seed is None and request.count is None
        own = replace(request, prompts=said.evaluate.prompts)
        wanted = _wanted(own, said.values(), _filler(said))
        if plain:
            wanted = [replace(one, seeds=tuple(said.evaluate.seeds)) for one in wanted]
    return Plan(base, weighted(adapters), wanted, said.name, controlnet=request.controlnet)


def _again(request: Request, picture: Path) -> Plan:
    """Return how a picture is drawn again: as it says, and with what is asked for over that."""
    told = recorded.read(picture)
    again, said = Redraw(picture, told), Known()
    if request.run is not None or request.checkpoint is not None:
        said, given = request.resolved()
        base = said.required()
    else:
        base, given = again.base(request.base), list(request.adapters)
    quantize = request.quantize or told.base_settings.get("quantize")
    base = _narrowed(base, None if quantize is None else str(quantize))
    adapters = again.as_strong(given) if given else again.adapters()
    first = told.seed if request.seed is None else request.seed
    asked = replace(request, seed=first, **again.guides(request))
    wanted = _wanted(asked, told.values(), _filler(said))
    own = not wanted and all(value is None for value in request.values().values())
    guided = (request.strength, request.control_scale, *request.extend.values())
    others = (request.seed, request.count, request.batch, *guided)
    unchanged = own and all(value is None for value in others)
    if not wanted:
        settings = _settings(asked, told.values(), {}, asked.guides())
        wanted = [Wanted(told.prompt, asked.seeds(None), settings, request.batch or 1)]
        if unchanged and told.batch:
            only = (told.seed,)
            wanted = [Wanted(told.prompt, told.batch, settings, len(told.batch), only)]
    named = request.base is not None or request.run is not None
    net = asked.controlnet
    return Plan(base, adapters, wanted, picture.stem, again, named, unchanged, net)


def _wanted(
    request: Request, values: Mapping[str, Any], filled: Callable[[str], str]
) -> list[Wanted]:
    """Return what a request's prompts and the lines of its file come to; none of both: nothing.

    values: what goes under the settings that are asked for.
    """
    together = 1 if request.batch is None else request.batch
    guides = request.guides()
    settings = _settings(request, values, {}, guides)
    seeds = request.seeds(None)
    made = [Wanted(filled(prompt), seeds, settings, together) for prompt in request.prompts]
    faults = []
    for line in promptfile.read(request.prompt_file) if request.prompt_file is not None else ():
        said = dict(line.said)
        try:
            seeds = request.seeds(said.pop("seed", None))
            settings = _settings(request, values, said, guides)
            made.append(Wanted(filled(line.prompt), seeds, settings, together))
        except UserError as fault:
            faults.append(f"{line.where}: {fault}")
    if faults:
        raise UserError("\n".join(faults))
    return made


def _settings(
    request: Request, values: Mapping[str, Any], said: Mapping[str, Any], guides: Mapping[str, Any]
) -> DrawSettings:
    """Return what is said of a prompt over what is asked for over `values`, with the guides."""
    asked = {name: value for name, value in request.values().items() if value is not None}
    asked |= said
    start: Start | None = guides.get("start")
    if start is None or not start.extended:
        return settings_of(values, asked, guides)
    if asked.keys() & _SIZE:
        raise UserError(
            "extend: the size is that of the picture with what is added to it: leave out width and "
            "height"
        )
    own = {name: value for name, value in values.items() if name not in _SIZE}
    return settings_of(own, asked, guides)


def _filler(said: Known) -> Callable[[str], str]:
    data = said.data
    if data is None:
        return lambda prompt: prompt
    return lambda prompt: fill(prompt, data.trigger, data.class_noun)


def _narrowed(base: Base, kind: str | None) -> Base:
    """Return the base held in few bits, where that is asked for."""
    if kind is None:
        return base
    if kind not in (kinds := get_args(Quantized)):
        raise UserError(
            f'quantize: must be {" or ".join(kinds)}, not "{kind}"{did_you_mean(kind, kinds)}'
        )
    return base.model_copy(update={"quantize": kind})


def sides_of(texts: Sequence[str]) -> dict[str, int]:
    """Read ``SIDE=PIXELS``; UserError where one has no number or a side is there twice."""
    sides: dict[str, int] = {}
    for text in texts:
        side, _, pixels = text.partition("=")
        if not pixels.isdecimal() or side in sides:
            raise UserError(f'extend: "{text}" is no SIDE=PIXELS, each side once, such as right=64')
        sides[side] = int(pixels)
    return sides
