"""What `tunekit plan` tells: what trains, how long, and how much memory it takes, before it does.

No weight is read: the base is built from its configuration in tensors without content, and a run
is walked through with them (`outline`, `walk`, `ledger`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.advice import Advice, lower_memory
from tunekit.inspection import Inspection, inspect
from tunekit.progress import Reporter, Silent
from tunekit.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from tunekit.plan.memory import Memory, Moment
    from tunekit.plan.probe import Times
    from tunekit.plan.walk import Size, Sizes

# What is less than this share of the peak is not worth a setting.
_WORTH = 0.03
_NEVER_MEASURED = (
    "of a GPU these numbers were never measured: they count tensors alone, not the pieces that "
    "its allocator holds, nor the libraries' own memory there"
)


@dataclass(frozen=True)
class Counted:
    """A sort of pictures in a run: how many, and how often an epoch shows them."""

    pictures: int
    repeated: int


@dataclass(frozen=True)
class Plan:
    """A run, told beforehand. All but `inspection` is None where its pictures are refused.

    trained: how many numbers train, by component. base: bytes of the base by component and number
    format. subject, prior: pictures to train on, and of the class (None without). times: None
    unless probed. room: bytes of the machine's memory, or of its GPU.
    """

    recipe: Recipe
    inspection: Inspection
    trained: dict[str, int] | None = None
    base: dict[str, dict[str, int]] | None = None
    size: Size | None = None
    subject: Counted | None = None
    prior: Counted | None = None
    memory: Memory | None = None
    room: int = 0
    advice: tuple[tuple[Advice, int], ...] = ()
    times: Times | None = None

    @property
    def ok(self) -> bool:
        """Whether training would begin."""
        return self.inspection.ok

    def as_dict(self) -> dict[str, Any]:
        """Return everything for scripts; memory in bytes, times in seconds."""
        if self.memory is None or self.subject is None:
            return {"ok": False, "findings": [asdict(one) for one in self.inspection.findings]}
        train, planned = self.recipe.train, self.inspection.plan
        assert planned is not None
        memory = self.memory
        return {
            "ok": True,
            "findings": [asdict(one) for one in self.inspection.findings],
            "trained": {"numbers": sum((self.trained or {}).values()), "by": self.trained},
            "base": self.base,
            "steps": {
                "steps": train.steps,
                "batch_size": train.batch_size,
                "gradient_accumulation": train.gradient_accumulation,
                "pictures": asdict(self.subject),
                "prior_pictures": asdict(self.prior) if self.prior else None,
                "epochs": round(planned.epochs, 4),
                "size": list(self.size or ()),
            },
            "memory": {
                "device": memory.device,
                "peak": memory.peak.bytes,
                "peak_while": memory.peak.name,
                "phases": {one.name: dict(one.parts) for one in memory.moments},
                "machine": self.room,
                "enough": memory.peak.bytes <= self.room,
                "allocator_asked": memory.asked,
            },
            "advice": [asdict(one) | {"of": size} for one, size in self.advice],
            "times": self.times.as_dict() if self.times else None,
        }

    def lines(self) -> list[str]:
        """Return the plan for people."""
        if self.memory is None:
            found = self.inspection
            return [*(f"  {one}" for one in found.findings), "", found.verdict()]
        return [
            *self._what(),
            "",
            *_table(self.memory),
            *([f"note: {_NEVER_MEASURED}"] if self.memory.device != "cpu" else []),
            *self._warning(),
            "",
            *self._advised(),
            *(["", *self.times.lines()] if self.times else []),
        ]

    def _what(self) -> list[str]:
        assert self.trained is not None
        assert self.base is not None
        assert self.subject is not None
        planned, train = self.inspection.plan, self.recipe.train
        assert planned is not None
        by = ", ".join(f"{name} {count:,}" for name, count in self.trained.items())
        kinds = [
            f"{name} {told(size)} in {kind}"
            for name, formats in self.base.items()
            for kind, size in formats.items()
        ]
        shown = f"{self.subject.pictures} pictures"
        if self.subject.repeated != self.subject.pictures:
            shown += f", {self.subject.repeated} an epoch with their repeats"
        if self.prior is not None:
            shown += f", beside {self.prior.pictures} of the class"
        passes = train.gradient_accumulation
        parts = f" in {passes} parts" if passes > 1 else ""
        width, height = self.size or (0, 0)
        return [
            f"trains    {sum(self.trained.values()):,} numbers: {by}",
            f"base      {', '.join(kinds)}",
            f"pictures  {shown}; the largest trained at {width}x{height}",
            f"steps     {planned.told()}{parts}",
        ]

    def _warning(self) -> list[str]:
        assert self.memory is not None
        peak = self.memory.peak.bytes
        if peak <= self.room:
            return []
        where = "this GPU" if self.memory.device != "cpu" else "this machine"
        return [
            f"warning: {where} has {told(self.room)}, {told(peak - self.room)} less than that: "
            "lower it as below"
        ]

    def _advised(self) -> list[str]:
        if not self.advice:
            return ["nothing in the recipe would lower it by much"]
        rows = [(" ".join(a.settings), f"{a.lowers}, {told(n)}", a.price) for a, n in self.advice]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return [
            "what would lower it, the cheapest first (what gets smaller, and what it costs):",
            *(f"  {one:<{widths[0]}}  {two:<{widths[1]}}  {price}" for one, two, price in rows),
        ]


def plan(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    probe: bool = False,
    reporter: Reporter | None = None,
) -> Plan:
    """Say what a recipe's run will take: what trains, steps, memory, and with `probe` the time.

    The pictures are looked at as `inspect` does it; no weight is read. probe: prepare the run for
    real, encoding what is not in the cache, and take five steps of it.

    Raises UserError for a recipe that training refuses before it looks at the pictures.
    """
    from tunekit.plan.memory import estimate, load_libraries, machine_bytes, resident
    from tunekit.plan.outline import Outline

    reporter = reporter or Silent()
    loaded = load_recipe(recipe, overrides)
    found = inspect(recipe, overrides, reporter=reporter)
    made = Plan(loaded, found)
    if not found.ok:
        return made
    device = _device()
    sizes, counts = _sizes(found), _counted(loaded, found)
    with reporter.stage("outlining", 2) as tick:
        load_libraries()
        outline = Outline.of(loaded)
        tick()
        memory = estimate(outline, loaded, sizes, device, resident())
        tick()
    resolution = found.sheet.resolutions[0] if found.sheet.resolutions else None
    made = replace(
        made,
        trained=outline.counts(),
        base={name: dict(kinds) for name, kinds in outline.base.items()},
        size=sizes.largest,
        subject=counts[0],
        prior=counts[1],
        memory=memory,
        room=machine_bytes(device),
        advice=tuple(_worth(lower_memory(loaded, resolution), memory)),
    )
    if not probe:
        return made
    from tunekit.plan.probe import probe_times

    return replace(made, times=probe_times(loaded, reporter))


def told(size: float) -> str:
    """Return a number of bytes as people say it, in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _device() -> str:
    from tunekit.inference import default_device

    return default_device().type


def _sizes(found: Inspection) -> Sizes:
    from tunekit.plan.walk import Sizes

    sheet = found.sheet
    sizes = {
        (fit.width, fit.height)
        for resolution in sheet.resolutions
        for example in sheet.examples
        for fit in sheet.crops(example, resolution)
    }
    largest = max(sizes, key=lambda size: size[0] * size[1])
    if sheet.data.prior is None:
        return Sizes(largest)
    edge = sheet.resolutions[0]
    return Sizes(largest, (edge, edge), (edge, edge) in sizes)


def _counted(recipe: Recipe, found: Inspection) -> tuple[Counted, Counted | None]:
    examples = found.sheet.examples
    repeated = sum(example.repeats for example in examples)
    subject = Counted(len(examples), repeated * max(1, len(found.sheet.resolutions)))
    if recipe.data.prior is None:
        return subject, None
    count = recipe.data.prior.count
    there = min(count, len(found.prior.examples)) if found.prior else count
    return subject, Counted(there, there)


def _worth(advice: Sequence[Advice], memory: Memory) -> list[tuple[Advice, int]]:
    """Return advice with the bytes of what it lowers, where that is worth it."""
    least = _WORTH * memory.peak.bytes
    sized = [(one, _lowered(one.lowers, memory.training)) for one in advice]
    return [(one, size) for one, size in sized if size >= least]


def _lowered(what: str, moment: Moment) -> int:
    """Return the bytes in training of what an advice lowers."""
    from tunekit.plan import ledger, memory, walk

    names = {
        "activations": (ledger.SAVED, ledger.PASSING, memory.HEAP),
        "gradients": (ledger.GRADIENTS,),
        "optimizer state": (walk.STATE,),
        "average": (walk.AVERAGE,),
        # its gradients and the optimizer's state go with it
        "what trains": (walk.TRAINS, ledger.GRADIENTS, walk.STATE, walk.AVERAGE),
    }
    if what in names:
        return sum(moment.parts.get(name, 0) for name in names[what])
    assert what == "base", what
    return sum(size for name, size in moment.parts.items() if name.endswith(")"))


def _table(memory: Memory) -> list[str]:
    """Return the phases of a run, and of the largest and of training what they are made of."""
    peak, training = memory.peak, memory.training
    of = "of memory" if memory.device == "cpu" else f"of the {memory.device} device's memory"
    lines = [f"about {told(peak.bytes)} {of} at most, while {_WHILE[peak.name]}:"]
    lines += [f"  {name:<34} {told(size):>10}" for name, size in _parts(peak)]
    if training is not peak:
        lines += ["", f"about {told(training.bytes)} while {_WHILE[training.name]}:"]
        lines += [f"  {name:<34} {told(size):>10}" for name, size in _parts(training)]
    others = [one for one in memory.moments if one not in (peak, training)]
    lines += ["", "and while " + ", ".join(f"{_WHILE[o.name]} {told(o.bytes)}" for o in others)]
    if not memory.asked and memory.device == "cpu":
        lines.append("note: what the allocator holds beyond that is not known on this system")
    return lines


_WHILE = {
    "preparing": "preparing",
    "first samples": "drawing the first samples",
    "training": "training",
    "saving": "saving a checkpoint",
    "samples": "drawing samples",
    "exporting": "exporting",
    "evaluating": "evaluating",
}


def _parts(moment: Moment) -> list[tuple[str, int]]:
    return [(name, size) for name, size in moment.parts.items() if size >= 1 << 20]
