"""Going on with a run that was stopped: from which checkpoint, and under the same recipe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.optim import rate_factor
from tunekit.recipe import Recipe
from tunekit.runfolder import CHECKPOINTS, PICTURES, RunFolder

# What may differ from the run that was stopped, since nothing that is learned depends on it.
FREE = frozenset(
    f"train.{key}"
    for key in (
        *("steps", "log_every", "sample_every", "checkpoint_every", "keep_last", "keep_every"),
        *("on_nonfinite", "max_skips"),  # a step that is saved was finite, or skipped and said so
    )
)
# What the saved tensors belong to: another value makes them meaningless.
FIXED = ("base", "adapter", "tokens", "train.optimizer")
# Without these a run would go on, and be another one.
NEEDED = frozenset({"adapter", "optimizer", "guards"})


@dataclass(frozen=True)
class Point:
    """Where a run goes on: a checkpoint, read and verified, after `step` finished steps."""

    folder: Path
    step: int
    saved: checkpoint.Checkpoint


def find(
    run: Path, wanted: Path | None, recipe: Recipe, allow_changed: bool, finished: bool
) -> Point:
    """Return the checkpoint of `run` to go on from: `wanted`, or the last one.

    wanted: a checkpoint folder, or its name such as step-000200. finished: whether the run has its
    report; one that was stopped after its last step still lacks it. Raises UserError where there is
    none, where it is damaged (naming the file and the checkpoint before it), where the recipe
    differs from the run's and `allow_changed` is not set (naming every key), where it differs in
    what the saved tensors belong to, and where the checkpoint is past the last step.
    """
    former = RunFolder.open(run)
    folder = _folder(former, wanted)
    _compare(former.recipe, recipe, checkpoint.step_of(folder), allow_changed)
    try:
        saved = checkpoint.read(folder)
    except UserError as error:
        whole = _whole_before(folder)
        offer = f"; the one before is --resume {whole}" if whole else "; none before it is whole"
        raise UserError(f"{error}{offer}") from None
    sets = saved.meta.get("sets", [])  # what was saved, told apart from the files
    if not (isinstance(sets, list) and all(isinstance(name, str) for name in sets)):
        raise UserError(f"{folder}: does not say what was saved in it")
    needed = NEEDED.union(sets)
    if former.recipe.train.ema is not None:  # without these an average would begin anew, unsaid
        needed |= {"ema", "trained"} if former.recipe.train.ema_export else {"ema"}
    if former.recipe.train.optimizer == "schedulefree_adamw":  # it draws with others than it trains
        needed |= {"trained"}
    if former.recipe.train.precision == "fp16":  # its scale would begin anew, and skip steps again
        needed |= {"scaler"}
    if missing := sorted(needed - saved.tensors.keys()):
        raise UserError(
            f"{folder}: has no {' and no '.join(missing)} state, so nothing can go on from here as "
            "if it had not been stopped; take another checkpoint"
        )
    step = saved.meta.get("step")
    if type(step) is not int or step != checkpoint.step_of(folder):
        raise UserError(f"{folder}: does not say that it was saved after the step of its name")
    steps = recipe.train.steps
    if step > steps or (step == steps and finished):
        raise UserError(
            f"{folder}: was saved after step {step}, and train.steps is {steps}: nothing is left "
            "to train; raise train.steps to go on"
        )
    return Point(folder, step, saved)


def compare_pictures(run: Path, now: Mapping[str, Mapping[str, str]], allow_changed: bool) -> None:
    """Hold the pictures a run goes on with to those it was started with (pictures.json).

    Raises UserError that names what came, went and changed, unless `allow_changed`.
    """
    path = run / PICTURES
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(before, dict) and all(isinstance(p, dict) for p in before.values())):
            raise ValueError("it lists no pictures")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read, so nobody knows what was trained: {error}"
        ) from None
    lines = []
    for part in sorted({*before, *now}):
        old, new = before.get(part, {}), now.get(part, {})
        for what, names in (
            ("new", new.keys() - old.keys()),
            ("gone", old.keys() - new.keys()),
            ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
        ):
            if names:
                lines.append(f"  {part}, {what}: {', '.join(sorted(names))}")
    if lines and not allow_changed:
        raise UserError(
            "the pictures are not those this run was started with; --allow-changed goes on with "
            "them all the same (the result is then that of neither):\n" + "\n".join(lines)
        )


def _folder(run: RunFolder, wanted: Path | None) -> Path:
    known = checkpoint.steps(run.path / CHECKPOINTS)
    if wanted is None:
        if not known:
            raise UserError(
                f"{run.path}: has no checkpoint to go on from; --overwrite starts it afresh"
            )
        return known[-1]
    if wanted.is_dir():
        inside = wanted.resolve().parent == (run.path / CHECKPOINTS).resolve()
        if not inside:
            raise UserError(f"{wanted}: is no checkpoint of {run.path}")
        return wanted
    return run.checkpoint(wanted.name)


def _whole_before(folder: Path) -> Path | None:
    """Return the last checkpoint before `folder` that is whole."""
    for path in reversed(checkpoint.steps(folder.parent)):
        if checkpoint.step_of(path) >= checkpoint.step_of(folder):
            continue
        with contextlib.suppress(UserError):  # that one is damaged too
            checkpoint.verify(path)
            return path
    return None


def _compare(former: Recipe, recipe: Recipe, step: int, allow_changed: bool) -> None:
    changed = {
        key: values
        for key, values in _differences(
            former.model_dump(mode="json"), recipe.model_dump(mode="json")
        )
        if key not in FREE or (key == "train.steps" and not _same_until(step, former, recipe))
    }
    lines = [f"  {key}: {old} -> {new}" for key, (old, new) in changed.items()]
    if "train.steps" in changed:
        why = "the learning rate, or when a word rests, hangs on how many there are in all"
        lines.append(f"  (the {step} steps that were taken would have been others: {why})")
    fixed = [key for key in changed if any(key == f or key.startswith(f"{f}.") for f in FIXED)]
    if fixed:
        raise UserError(
            f"a run cannot go on with another {', '.join(fixed)}: start a new one (--out)\n"
            + "\n".join(lines)
        )
    if changed and not allow_changed:
        raise UserError(
            "the recipe is not the one this run was started with; --allow-changed goes on with it "
            "all the same (the result is then that of neither):\n" + "\n".join(lines)
        )


def _same_until(step: int, former: Recipe, recipe: Recipe) -> bool:
    """Return whether steps before `step` are the same, whichever recipe's number of them holds."""
    old, new = former.train, former.train.model_copy(update={"steps": recipe.train.steps})
    for token in former.tokens:
        rests = {min(step, max(1, round(token.stop_at * train.steps))) for train in (old, new)}
        if len(rests) > 1:
            return False
    return old.schedule == "constant" or all(
        rate_factor(old, at) == rate_factor(new, at) for at in range(step)
    )


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{at}{key}.")
        elif was != now:
            yield f"{at}{key}", (was, now)
