"""The runs in a folder: how each stands and scored, and whether what it left is still whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tunekit import checkpoint, runlock, runstate
from tunekit.errors import UserError
from tunekit.keeping import best, judged
from tunekit.runfolder import CHECKPOINTS, RECIPE
from tunekit.runwriter import METRICS, REPORT, SCORES, read_metrics
from tunekit.wholefile import disk_errors

DEFAULT = Path("runs")


@dataclass(frozen=True)
class Listed:
    """One run. state: running, finished, interrupted or failed; unknown where files are damaged.

    steps: None where a version that kept no state left the run. when: of its last sign of life,
    ISO 8601. likeness: of the finished run's pictures, -1 to 1; closed: the share of the gap
    between the base and real pictures. best_sample, last_sample: likeness by step, where samples
    were judged. note: why it failed, and what else there is to tell.
    """

    folder: Path
    state: str
    step: int
    steps: int | None
    when: str | None
    likeness: float | None = None
    closed: float | None = None
    best_sample: tuple[int, float] | None = None
    last_sample: tuple[int, float] | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        samples = {
            name: pair and {"step": pair[0], "likeness": pair[1]}
            for name, pair in (("best_sample", self.best_sample), ("last_sample", self.last_sample))
        }
        return asdict(self) | {"folder": str(self.folder)} | samples


def find(folder: Path) -> list[Path]:
    """Return the run that `folder` is, or the runs that stand in it, by name.

    One that may not be looked into counts as one. Raises UserError where there is no such folder,
    or it may not be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    with disk_errors(folder, "read"):
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return [folder] if _is_run(folder) else [path for path in inside if _is_run(path)]


def listed(folder: Path) -> list[Listed]:
    """Return how each run of `folder` stands; nothing is loaded. Raises UserError as `find`."""
    return [_look(path) for path in find(folder)]


def table(runs: Sequence[Listed]) -> list[str]:
    """Return the runs as lines for people."""
    if not runs:
        return ["no runs"]
    head = ("run", "state", "step", "learned", "best sample", "last sample", "when", "")
    rows = [head, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


@dataclass(frozen=True)
class Verified:
    """What was found of one run. whole: how many checkpoints and files; faults: a line for each."""

    folder: Path
    checkpoints: int
    files: int
    faults: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"folder": str(self.folder), "ok": not self.faults}

    def lines(self) -> list[str]:
        """Return it for people: the faults, or that there are none."""
        if self.faults:
            return self.faults
        counted = [
            f"{count} {what}{'s' * (count != 1)}"
            for count, what in ((self.checkpoints, "checkpoint"), (self.files, "file"))
        ]
        return [f"{self.folder}: {' and '.join(counted)}, all whole"]


def exported(folder: Path) -> list[Path]:
    """Return the files that a finished run exported, each held to what the run wrote of it.

    Every byte is read. Raises UserError for a run that has not finished, or whose files changed.
    """
    told = _look(folder)
    if told.state != "finished":
        note = f" ({told.note})" if told.note else ""
        raise UserError(
            f"{folder}: is {told.state}{note}, at step {told.step}: only what a finished run "
            "exported and verified is sent"
        )
    files = _scores(folder).get("run", {}).get("files", ())
    if not files:
        raise UserError(f"{folder}: has exported no files")
    for file in files:
        _hold(folder, file)
    return [folder / file["path"] for file in files]


def verified(folder: Path) -> list[Verified]:
    """Hold every checkpoint of the runs of `folder` to its manifest, every export to scores.json.

    Every byte is read. Raises UserError as `find`, and where there is no run.
    """
    runs = find(folder)
    if not runs:
        raise UserError(f"{folder}: holds no run")
    return [_verify(path) for path in runs]


def _is_run(folder: Path) -> bool:
    with contextlib.suppress(PermissionError):
        return any((folder / name).is_file() for name in (RECIPE, runstate.STATE))
    return True


def _look(folder: Path) -> Listed:
    faults: list[str] = []
    kept, lines, scores = None, [], {}
    with _collecting(faults):
        kept = runstate.read(folder)
    with _collecting(faults):
        lines = _metrics(folder)
    with _collecting(faults):
        scores = _scores(folder)
    state, held = "unknown", None
    with _collecting(faults):
        held = runlock.taken(folder)
        state = _state(folder, kept, held) if not faults else "unknown"
    note = "; ".join(faults) or (kept.error if kept and state == "failed" else None)
    if state == "running" and held and not held.here():
        note = f"on {held.host}, as its lock says"
    likeness = scores.get("scores", {}).get("likeness", {})
    samples = judged(lines)
    first = best(samples)
    reached = max([kept.step if kept else 0, *(line["step"] for line in lines)])
    return Listed(
        folder=folder,
        state=state,
        step=reached,
        steps=kept.steps if kept else None,
        when=kept.updated if kept else scores.get("run", {}).get("made"),
        likeness=likeness.get("score"),
        closed=likeness.get("closed"),
        best_sample=(first, samples[first]) if first is not None else None,
        last_sample=(max(samples), samples[max(samples)]) if samples else None,
        note=note,
    )


def _state(folder: Path, kept: runstate.State | None, held: runlock.Holder | None) -> str:
    """Return how a run stands: what it said last, and whether its process still lives."""
    if held:
        return "running"
    if kept is None:
        return "finished" if (folder / REPORT).is_file() else "interrupted"
    return "interrupted" if kept.outcome == "running" else kept.outcome


def _row(run: Listed) -> tuple[str, ...]:
    def sample(pair: tuple[int, float] | None) -> str:
        return f"{pair[1]:.3f} at {pair[0]}" if pair else ""

    learned = f"{run.closed:.0%}" if run.closed is not None else ""
    return (
        run.folder.name,
        run.state,
        f"{run.step} of {run.steps}" if run.steps is not None else str(run.step),
        learned or (f"{run.likeness:.3f}" if run.likeness is not None else ""),
        sample(run.best_sample),
        sample(run.last_sample),
        (run.when or "")[:16].replace("T", " "),
        run.note or "",
    )


def _verify(folder: Path) -> Verified:
    faults: list[str] = []
    whole = files = 0
    with _collecting(faults):
        whole = sum(_whole(path, faults) for path in _all_checkpoints(folder))
    with _collecting(faults):
        for file in _scores(folder).get("run", {}).get("files", ()):
            with _collecting(faults), disk_errors(folder, "read"):
                _hold(folder, file)
                files += 1
    for read in (runstate.read, _metrics):
        with _collecting(faults):
            read(folder)
    return Verified(folder, whole, files, faults)


def _all_checkpoints(folder: Path) -> list[Path]:
    """Return what is called a checkpoint, with those that have lost their manifest."""
    inside = folder / CHECKPOINTS
    with disk_errors(inside, "read"):
        names = inside.iterdir() if inside.is_dir() else ()
        return sorted(path for path in names if path.name.startswith("step-"))


def _whole(path: Path, faults: list[str]) -> bool:
    try:
        checkpoint.verify(path)
    except UserError as error:
        if path.exists():  # a run that goes on may have removed it meanwhile
            faults.append(str(error))
        return False
    return True


def _hold(folder: Path, file: Mapping[str, Any]) -> None:
    """Hold an exported file to what the run wrote of it; UserError where it is another one."""
    name = str(file.get("path"))
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder / SCORES}: {name} is no file of this run")
    if not path.is_file():
        raise UserError(f"{path}: is missing")
    if (size := path.stat().st_size) != file.get("bytes"):
        raise UserError(f"{path}: has {size} bytes instead of {file.get('bytes')}")
    if checkpoint.sha256(path) != file.get("sha256"):
        raise UserError(f"{path}: its content has changed since it was written (SHA-256 differs)")


def _scores(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not _are_scores(found):
            raise ValueError("it holds no scores")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    return found


def _are_scores(found: object) -> TypeGuard[dict[str, Any]]:
    """Return whether this is what a run writes, as far as it is looked at here."""

    def part(value: object, key: str) -> object:
        return value.get(key, {}) if isinstance(value, dict) else None

    run, likeness = part(found, "run"), part(part(found, "scores"), "likeness")
    if not isinstance(run, dict) or not isinstance(likeness, dict):
        return False
    files = run.get("files", [])
    numbers = [likeness.get(key) for key in ("score", "closed")]
    return (
        isinstance(run.get("made", ""), str)
        and isinstance(files, list)
        and all(isinstance(file, dict) for file in files)
        and all(value is None or type(value) in (int, float) for value in numbers)
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / METRICS)


@contextlib.contextmanager
def _collecting(faults: list[str]) -> Iterator[None]:
    """Note what is wrong, and go on."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))
