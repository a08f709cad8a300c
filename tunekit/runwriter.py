"""What a run writes: who may write in its folder, and how files come into it.

A folder is empty, or holds a finished run (it has its report), or an unfinished one, or something
no run wrote, which is never touched. `tunekit.runfolder` reads what is written here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tunekit import checkpoint, runlock
from tunekit.errors import UserError
from tunekit.keeping import LIKENESS
from tunekit.runfolder import CHECKPOINTS, EXPORT, PICTURES, RECIPE
from tunekit.runlock import LOCK, Holder
from tunekit.runstate import STATE
from tunekit.safefile import check_folder
from tunekit.wholefile import disk_errors, part_of, remove_folder, tidy, to_disk, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.utils.tensorboard import SummaryWriter

    from tunekit.train import StepRecord

METRICS, SCORES, REPORT = "metrics.jsonl", "scores.json", "report.html"
SAMPLES, BOARD = "samples", "tb"
_NOTHING = contextlib.nullcontext()
_STEP = re.compile(r"step-(\d+)")
RESULTS = frozenset({SCORES, REPORT, EXPORT})
OURS = RESULTS | {RECIPE, PICTURES, METRICS, SAMPLES, CHECKPOINTS, BOARD, LOCK, STATE}


class RunWriter:
    """One run's folder; nothing is written before `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, overwrite: bool, resume: bool = False) -> None:
        """Raise UserError where a run may not be written here; writes nothing itself.

        A finished and an unfinished run both need `overwrite` or `resume`; a folder with files that
        no run wrote is refused with them too.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; name a folder for the run with --out")
        self._check_writable()
        if not self.path.is_dir():
            return
        check_folder(self.path)
        runlock.check(self.path)
        found = sorted(entry.name for entry in self.path.iterdir())
        strange = [name for name in found if (part_of(name) or name) not in OURS]
        if strange:
            raise UserError(
                f"{self.path}: holds {', '.join(strange[:3])}, which no run wrote; "
                "name another folder with --out"
            )
        if not (overwrite or resume) and set(found) - {LOCK}:
            going_on = "" if self.finished() else "--resume goes on with it, "
            raise UserError(
                f"{self.path}: holds {self.state()}; {going_on}--overwrite replaces it, --out "
                "names another folder"
            )

    def finished(self) -> bool:
        """Return whether the run here came to its report."""
        return (self.path / REPORT).exists()

    def state(self) -> str:
        """Return what is here in words."""
        if self.finished():
            return "a finished run"
        steps = checkpoint.steps(self.path / CHECKPOINTS)
        reached = f"its last checkpoint is {steps[-1].name}" if steps else "it has no checkpoint"
        return f"an unfinished run ({reached})"

    @contextlib.contextmanager
    def claim(self, overwrite: bool, resume_at: int | None = None) -> Iterator[Holder | None]:
        """Make the folder, hold its lock, and empty it of a former run.

        resume_at: the step after which a run goes on; what was written up to it stays. Gives the
        process that was killed while it held the folder, else None. Raises UserError as `check`
        does, and where another process holds the folder.
        """
        self.check(overwrite, resume_at is not None)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with runlock.hold(self.path) as left:
            with disk_errors(self.path):
                self._clear(resume_at)
            yield left

    def _clear(self, resume_at: int | None) -> None:
        """Remove what a former run left, or, where it goes on, what it left after that step."""
        for parent in (SAMPLES, CHECKPOINTS):
            tidy(self.path / parent)
            for path in list((self.path / parent).glob("step-*")):
                found = _STEP.match(path.name)
                if found is None or int(found[1]) <= (-1 if resume_at is None else resume_at):
                    continue
                if path.is_dir() and not path.is_symlink():
                    remove_folder(path)  # killed on the way, it leaves no half of a checkpoint
                else:
                    path.unlink()
        parts = {path.name for path in self.path.iterdir() if part_of(path.name)}
        for name in sorted((OURS - {LOCK} if resume_at is None else RESULTS) | parts):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _ancestor(self) -> Path:
        here = self.path.absolute()
        while not here.exists():
            here = here.parent
        return here

    def _check_writable(self) -> None:
        here = self._ancestor()
        if not here.is_dir():
            raise UserError(f"{self.path}: {here} is a file, so no folder can be made in it")
        if not os.access(here, os.W_OK | os.X_OK):
            raise UserError(f"{self.path}: {here} may not be written to; name a folder with --out")

    def check_space(self, needed: int) -> None:
        """Raise UserError where the disk has less than `needed` bytes free."""
        free = shutil.disk_usage(self._ancestor()).free
        if free < needed:
            raise UserError(
                f"{self.path}: the run needs about {math.ceil(needed / 1e6):,} MB and the disk has "
                f"{free // 1_000_000:,} MB free; name another place with --out, or keep fewer "
                "checkpoints (train.checkpoint_every, train.keep_last)"
            )

    def write_text(self, name: str, text: str) -> Path:
        """Write a file whole or not at all, and return its path; UserError where disks refuse."""
        write_whole(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write JSON as people read it, whole or not at all; NaN is refused."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_text(name, text + "\n")


class Log:
    """metrics.jsonl and TensorBoard: a line and its points for each logged step, at once on disk.

    `lines` are the steps written so far, as they stand in the file. Whatever writes raises
    UserError with the path where the disk refuses.

    after: the step after which a run goes on, whose lines up to there are kept; None: a new run.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        self._metrics, self._events = folder / METRICS, folder / BOARD
        self._after = after
        self.lines: list[dict[str, float | None]] = []
        if after is not None:
            self.lines = [line for line in read_metrics(self._metrics) if line["step"] <= after]

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self._hook, threading.excepthook = threading.excepthook, self._heard
        try:
            with disk_errors(self._events):
                # A later point of the former run would stand beside ours in every curve.
                purge = None if self._after is None else self._after + 1
                self._board = SummaryWriter(str(self._events), purge_step=purge)
            write_whole(self._metrics, "".join(json.dumps(line) + "\n" for line in self.lines))
            with disk_errors(self._metrics):
                self._file = self._metrics.open("a", encoding="utf-8")
        except BaseException:
            threading.excepthook = self._hook
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        threading.excepthook = self._hook
        # What the disk refused before is tried once more by closing: the first refusal is told.
        told = contextlib.suppress(UserError) if isinstance(error, UserError) else _NOTHING
        with told, contextlib.ExitStack() as both:
            both.enter_context(disk_errors(self._events))
            both.callback(self._board.close)
            both.enter_context(disk_errors(self._metrics))
            both.callback(self._file.close)

    def _heard(self, told: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: its next call raises the same again."""
        ours = type(told.thread).__module__.startswith("tensorboard.")
        if not (ours and issubclass(told.exc_type, OSError)):
            self._hook(told)

    @contextlib.contextmanager
    def _on_board(self) -> Iterator[SummaryWriter]:
        with disk_errors(self._events):
            yield self._board
            # Else a thread of TensorBoard does it up to two minutes later: a refusal is told late.
            self._board.flush()

    def step(self, record: StepRecord) -> None:
        """Write a step. What is no finite number, as where fp16 overflowed, is null in JSON."""
        values: dict[str, float | None] = {
            "loss": _finite(record.loss),
            "lr": record.lr,
            "grad_norm": _finite(record.grad_norm),
            "images_per_second": round(record.images_per_second, 3),
            "memory_bytes": record.memory_bytes,
            "seconds": round(record.seconds, 4),
        }
        if record.prior_loss is not None:
            values["prior_loss"] = _finite(record.prior_loss)
        if record.spike is not None:
            values["spike"] = round(record.spike, 3)
        line: dict[str, float | None] = {"step": record.step, **values}
        if record.skipped:
            line["skipped"] = True
        self._add(line)
        with self._on_board() as board:
            for name, value in values.items():
                if value is not None:
                    board.add_scalar(f"train/{name}", value, record.step)

    def settle(self) -> None:
        """Have every line on the disk: a checkpoint may not outlive those of its steps."""
        with disk_errors(self._metrics):
            to_disk(self._metrics)

    def judged(self, step: int, likeness: float) -> None:
        """Write how much a step's samples are like the real pictures: a line of its own."""
        self._add({"step": step, LIKENESS: likeness})
        with self._on_board() as board:
            board.add_scalar(f"train/{LIKENESS}", likeness, step)

    def _add(self, line: dict[str, float | None]) -> None:
        self.lines.append(line)
        with disk_errors(self._metrics):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def picture(self, name: str, image: Image, step: int) -> None:
        """Show a picture in TensorBoard."""
        import numpy as np

        with self._on_board() as board:
            board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def scores(self, sums: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Show the scores in TensorBoard."""
        with self._on_board() as board:
            for name, values in sums.items():
                for kind in ("score", "closed", "change"):
                    if values.get(kind) is not None:
                        board.add_scalar(f"scores/{name}_{kind}", values[kind], step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines that a run logged so far; the last may have been cut by its end.

    Raises UserError with the line that is none of a run's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        fits = isinstance(value, dict) and type(value.get("step")) is int
        if not (fits and type(value.get(LIKENESS, 0.0)) in (int, float)):
            raise UserError(f"{path}:{number}: is no step that a run logged; is the file damaged?")
        found.append(value)
    return found
