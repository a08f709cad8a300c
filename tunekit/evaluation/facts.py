"""What the report says of a run besides its scores: what taught it, with what, how long."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import tunekit
from tunekit.evaluation.report import duration, size
from tunekit.evaluation.verdict import percent, points

if TYPE_CHECKING:
    import torch

    from tunekit.data import DataSheet
    from tunekit.export import ExportedFile
    from tunekit.recipe import Recipe

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")

Table = list[tuple[str, str]]


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    return {
        "tunekit": tunekit.__version__,
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> str:
    """Return the processor in words: "CPU, 2 cores" or the GPU's name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} core{'s' * (cores != 1)}"


def taught(recipe: Recipe, parameters: int) -> Table:
    """Return what was trained, and how."""
    train = recipe.train
    goal = train.objective.model_dump(mode="json", exclude_defaults=True)
    batch = f"{train.batch_size}"
    if train.gradient_accumulation > 1:
        batch += f" x {train.gradient_accumulation}"
    return [
        ("base", recipe.base.model),
        *_changed(recipe),
        ("trained numbers", f"{parameters:,}"),
        ("steps", f"{train.steps:,} of {batch} pictures"),
        ("optimizer", f"{train.optimizer}, learning rate {train.learning_rate:g}"),
        ("schedule", train.schedule),
        ("objective", ", ".join(f"{key} {value}" for key, value in goal.items()) or "the base's"),
        ("average of the weights", f"decay {train.ema:g}" if train.ema is not None else "none"),
        ("precision", train.precision),
        ("seed", str(train.seed)),
    ]


def _changed(recipe: Recipe) -> Table:
    rows = []
    if recipe.adapter is not None:
        settings = recipe.adapter.model_dump(mode="json", exclude={"kind"}, exclude_none=True)
        own = ", ".join(f"{key} {value}" for key, value in settings.items() if value)
        rows.append(("adapter", f"{recipe.adapter.kind}{f' ({own})' if own else ''}"))
    for token in recipe.tokens:
        settings = token.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        own = ", ".join(f"{key} {value}" for key, value in settings.items() if value)
        rows.append(("new word", f"{token.name} ({own})"))
    return rows


def data_table(recipe: Recipe, sheet: DataSheet, held_out: DataSheet | None) -> Table:
    """Return the data sheet: pictures, sizes, words."""
    sizes = Counter(f"{e.width} x {e.height}" for e in sheet.examples)
    listed = ", ".join(f"{count} of {name}" for name, count in sizes.most_common(3))
    if len(sizes) > 3:
        listed += f" and {len(sizes) - 3} other sizes"
    visits = recipe.train.steps * recipe.train.batch_size * recipe.train.gradient_accumulation
    origins = Counter(e.origin.partition(":")[0] for e in sheet.examples)
    held = "none" if held_out is None else str(len(held_out.examples))
    return [
        ("pictures", listed),
        ("seen", f"{visits / len(sheet.examples):.0f} times each"),
        ("resolution", f"{sheet.resolution} pixels"),
        ("captions", ", ".join(f"{count} from {name}" for name, count in origins.items())),
        ("held out", held),
        ("trigger", recipe.data.trigger),
        ("class", recipe.data.class_noun),
    ]


def cost_table(seconds: Mapping[str, float], memory: int, device: torch.device) -> Table:
    """Return where the time went, the peak memory and the machine."""
    rows = [("in all", duration(sum(seconds.values())))]
    rows += [(name, duration(spent)) for name, spent in seconds.items()]
    where = "of the GPU" if device.type == "cuda" else "of the process"
    return [*rows, ("peak memory", f"{size(memory)} {where}"), ("machine", machine(device))]


def tables(
    recipe: Recipe,
    sheet: DataSheet,
    held_out: DataSheet | None,
    parameters: int,
    costs: tuple[Mapping[str, float], int, torch.device],
) -> dict[str, Sequence[tuple[str, str]]]:
    """Return the report's tables under their titles."""
    return {
        "Data": data_table(recipe, sheet, held_out),
        "Training": taught(recipe, parameters),
        "Time and memory": cost_table(*costs),
        "Made with": list(versions().items()),
    }


def verified(file: ExportedFile) -> str:
    """Return what an adapter file was held to."""
    return (
        f"{file.what}, {file.dtype}; verified in a fresh pipeline: all "
        f"{file.parity.tensors} tensors taken up, {file.parity.error:.2%} off what was learned"
    )


def for_card(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the scores as the model card prints them."""
    sums = result["scores"]
    told = {f"{result['kind']} likeness": f"{sums['likeness']['score']:.3f}"}
    if sums["likeness"]["closed"] is not None:
        told["share of the gap to real pictures closed"] = percent(sums["likeness"]["closed"])
    told["prompt fidelity against the base"] = f"{points(sums['fidelity']['change'])} points"
    if sums["leak"]["closed"] is not None:
        told["leaked without the trigger"] = percent(sums["leak"]["closed"])
    return told
