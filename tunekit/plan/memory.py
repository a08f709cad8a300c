"""How much memory a run takes at most, phase by phase, and what for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.plan import walk as way
from tunekit.plan.heap import Heap

if TYPE_CHECKING:
    from tunekit.plan.ledger import Phase
    from tunekit.plan.outline import Outline
    from tunekit.recipe import Recipe

LIBRARIES, HEAP, JUDGES = "interpreter and libraries", "held by the allocator", "judges"
_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Moment:
    """What a phase of a run takes at most, in bytes by what they are for."""

    name: str
    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All of them together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The memory of a run. moments: its phases in their order. device: "cpu", "cuda", ...

    asked: whether the machine's own allocator said what it holds; else that is not counted.
    """

    moments: tuple[Moment, ...]
    device: str
    asked: bool

    @property
    def peak(self) -> Moment:
        """The phase that takes the most."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def training(self) -> Moment:
        """The training itself."""
        return next(moment for moment in self.moments if moment.name == way.TRAINING)


def estimate(
    outline: Outline,
    recipe: Recipe,
    sizes: way.Sizes,
    device: str,
    libraries: int,
) -> Memory:
    """Return what a run takes.

    libraries: bytes of the process without a run. On a GPU it is the GPU's memory that is told:
    there are no libraries in it, and nothing is mapped from files.
    """
    on_cpu = device == "cpu"
    heap = Heap.here() if on_cpu else None
    ledger = way.walk(outline, recipe, sizes, heap)
    base = _Base(outline, recipe, on_cpu)
    moments = []
    for phase in ledger.phases:
        parts = {LIBRARIES: libraries} if on_cpu else {}
        parts |= base.parts(phase)
        parts |= {name: size for name, size in phase.peak.items() if size}
        if heap is not None:
            parts[HEAP] = max(0, phase.held - phase.bytes)
        moments.append(Moment(phase.name, parts))
    return Memory(tuple(moments), device, heap is not None)


class _Base:
    """Which weights of a base are in memory in which phase.

    Weights that files hold in the recipe's format are mapped: of them only what was read is in
    memory. Others are converted when they are loaded, and there whole.
    """

    def __init__(self, outline: Outline, recipe: Recipe, on_cpu: bool) -> None:
        self.recipe = recipe
        self.sizes = {name: sum(kinds.values()) for name, kinds in outline.base.items()}
        self.kinds = {name: "+".join(kinds) for name, kinds in outline.base.items()}
        self.denoiser = outline.denoiser
        self.encoders = [n for n in self.sizes if n in outline.family.text_encoders]
        self.others = [n for n in self.sizes if n != self.denoiser and n not in self.encoders]
        mapped = {name for name in self.sizes if on_cpu and _mapped(recipe, name, outline)}
        self.whole = {name for name in self.sizes if name not in mapped}
        self.judges = judge_bytes(recipe)

    def parts(self, phase: Phase) -> dict[str, int]:
        """Return the bytes of the base by component."""
        copied = self.recipe.adapter is not None and self.recipe.adapter.trains_weights
        trained = self.encoders if self.recipe.trains_text_encoder() else []
        ready = [*self.encoders, *self.others]
        all_of = [self.denoiser]
        if phase.name == way.PREPARING:
            all_of = [*ready, *([self.denoiser] if copied else [])]
        elif phase.name == way.FIRST:
            all_of += ready
        elif phase.name in (way.TRAINING, way.SAVING):
            all_of += trained
        elif phase.name == way.EXPORTING:  # the one that was trained, then a fresh one
            all_of += self.encoders
        found = {name: self.sizes[name] for name in all_of}
        for name, size in phase.read.items():
            if name in self.sizes and name not in found:
                found[name] = self.sizes[name] if name in self.whole else size
        if phase.name == way.EVALUATING:
            return self._named(found) | {JUDGES: self.judges}
        return self._named(found)

    def _named(self, found: Mapping[str, int]) -> dict[str, int]:
        return {f"{name} ({self.kinds[name]})": size for name, size in found.items() if size}


def _mapped(recipe: Recipe, component: str, outline: Outline) -> bool:
    """Say whether a component's files hold the format that the recipe asks for."""
    from tunekit.families import ModelFolder

    folder = ModelFolder.open(recipe.base)
    files = sorted((folder.path / component).glob("*.safetensors"))
    if folder.weights is not None or not files:
        return False
    wanted = {_KINDS.get(kind, "") for kind in outline.base[component]}
    return all(_formats(file) <= wanted for file in files)


def _formats(file: Path) -> set[str]:
    """Return the number formats in a .safetensors file, by its header alone."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return {kind for kind in found if kind.startswith(("F", "BF"))}


def judge_bytes(recipe: Recipe) -> int:
    """Return the bytes of the judges' files, as far as they lie on this disk."""
    from tunekit import schema, toybox

    bundled = {"clip": toybox.clip_path, "subject_encoder": toybox.subject_encoder_path}
    found = 0
    for key, path in bundled.items():
        named = getattr(recipe.evaluate, key)
        folder = path() if named == schema.BUNDLED else Path(named).expanduser()
        found += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return found


def resident() -> int:
    """Return how many bytes this process has in memory now."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    import torch

    from tunekit.train import peak_memory

    return peak_memory(torch.device("cpu"))


def machine_bytes(device: str) -> int:
    """Return how much memory there is: of the GPU, or of the machine as far as it may be used."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(said)) if said.isdigit() else total


def load_libraries() -> None:
    """Import what a run imports, and compute a little, so that `resident` tells what both take.

    What the libraries compute with is only made, and its code only read, when it is first needed.
    """
    import importlib

    for name in _IMPORTED:
        importlib.import_module(name)
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        first, last = nn.Conv2d(4, 32, 3, padding=1), nn.Linear(32, 32)
        optimizer = torch.optim.AdamW([*first.parameters(), *last.parameters()], fused=True)
        seen = nn.functional.group_norm(first(torch.zeros(1, 4, 16, 16)), 8)
        tokens = last(seen.flatten(2).transpose(1, 2))
        loss: Any = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean()
        loss.backward()
        optimizer.step()


# What is first imported somewhere on a run's way, by the libraries too.
_IMPORTED = (
    "datasets",
    "pandas",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "scipy.stats",
    "accelerate",
    "tunekit.run",
    "tunekit.preparation",
    "tunekit.evaluation.measure",
    "tunekit.evaluation.report",
    "tunekit.evaluation.judges",
    "tunekit.verification",
    "tunekit.samples",
    "tunekit.train",
)
