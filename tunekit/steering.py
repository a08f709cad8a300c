"""The training part of a run: drives the loop, saves, draws samples, and stops when it is asked.

Whatever ends it, what was learned up to the last finished step is saved first, if it is whole.
Several processes take the same way through it; the first of them writes, draws and tells.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit import checkpoint, keeping, outofmemory
from tunekit.errors import UserError
from tunekit.guards import TrainingError
from tunekit.ranks import ALONE, RankLostError, Ranks
from tunekit.runfolder import CHECKPOINTS
from tunekit.wholefile import DiskError, remove_folder

if TYPE_CHECKING:
    from pathlib import Path

    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.interrupts import Wish
    from tunekit.preparation import Prepared
    from tunekit.progress import Reporter
    from tunekit.recipe import Recipe
    from tunekit.resume import Point
    from tunekit.runstate import Keeper
    from tunekit.runwriter import Log, RunWriter
    from tunekit.samples import Samples
    from tunekit.train import Loop, StepRecord


@dataclass
class Course:
    """The steps of one run, in its claimed folder. point: where it goes on; None: from the start.

    keeper: is told of each step that was saved. ranks: this process among those of the run.
    """

    recipe: Recipe
    writer: RunWriter
    reporter: Reporter
    prepared: Prepared
    wish: Wish
    samples: Samples
    keeper: Keeper
    point: Point | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self._sharded = self.recipe.train.fsdp and self.ranks.count > 1
        self.start = self.done = self.point.step if self.point else 0
        self._doing = "in training"
        self._judge = keeping.SampleJudge(self.recipe.evaluate, *self.prepared.references)
        self._loop: Loop | None = None

    def prepare(self) -> None:
        """Build the loop, and have it stand where the run goes on; nothing is written.

        Raises UserError where the machine cannot train so, and, naming the checkpoint, where that
        does not fit what trains.
        """
        from tunekit.train import Loop

        settings, ready = self.recipe.train, self.prepared
        encode = ready.family.encode_prompt if ready.adapter.trains_text_encoder else None
        with self._memory_told():
            self._loop = Loop(
                ready.family, ready.adapter, settings, encode=encode, ranks=self.ranks
            )
            if self.point is None:
                return
            try:
                self._loop.load_state(self.point.saved.tensors)
            except UserError as error:
                raise UserError(f"{self.point.folder}: {error}; take another checkpoint") from None
            self.point.saved.tensors.clear()  # as large as all that the loop itself holds

    def train(self, log: Log) -> None:
        """Take every step that is left; Interrupted after one that was asked to be the last.

        To be asked once, after `prepare`. Raises TrainingError where a guard stops it,
        OutOfMemoryError, and UserError for what else the user can mend.
        """
        settings, ready = self.recipe.train, self.prepared
        loop, self._loop = self._loop, None  # what it holds goes when the training ends
        assert loop is not None, "nothing is prepared"
        with self._memory_told():
            if self.point is not None:
                self._take_up(self.point, loop, log)
            elif settings.sample_every:
                self._sample(0, loop, log)
        ready.family.release(*ready.idle)
        if self.start < settings.steps:
            saved = self._rescuing(loop, log)
            with self.wish.patiently(), saved, self._memory_told(), self.ranks.told():
                self._steps(loop, log)

    def choose(self, log: Log) -> int:
        """Return the step that the run's files are made of, and have its weights in the adapter.

        That is the last, or the best where the recipe asks for it.
        """
        steps, likeness = self.recipe.train.steps, self._likeness(log)
        if self._sharded:  # what was trained in parts is put together in a fresh base
            self.again(steps)
        if not self.recipe.train.keep_best:
            return steps
        best = keeping.best(likeness)
        assert best is not None, "the last step's samples are judged"
        if best != steps:
            self._take(best)
        curve = ", ".join(f"{value:.3f} at step {step}" for step, value in likeness.items())
        self._note(
            f"the files are those of step {best}: of all samples its are most like the "
            f"{self._judge.against} (mean cosine {curve})"
        )
        return best

    def again(self, step: int) -> tuple[Family, Adapter]:
        """Return a fresh base with what is saved of `step`; both stand in what is prepared."""
        self.prepared.renew(self.recipe)
        self._take(step)
        return self.prepared.family, self.prepared.adapter

    def _take(self, step: int) -> None:
        saved = checkpoint.read(self._folder(step))
        self.prepared.adapter.load_state(saved.tensors["adapter"])

    def _take_up(self, point: Point, loop: Loop, log: Log) -> None:
        """Show what the run showed until `point` was saved, and what it had yet to show."""
        self.samples.recall(point.step)
        self._note(f"went on from {point.folder.name}; times are those of the last part alone")
        before = point.saved.meta.get("processes", 1)
        if before != self.ranks.count:
            self._note(
                f"up to {point.folder.name} it was of {before} processes, and now it is of "
                f"{self.ranks.count}: pictures, noise and timesteps are those it would have had, "
                "sums are rounded otherwise, and dropout draws anew"
            )
        self._prune(log)
        if self._shown(point.step):  # it may have been stopped between saving, drawing and judging
            if self.ranks.heard(not self.samples.shows(point.step)):
                self._sample(point.step, loop, log)
            elif self.ranks.heard(point.step not in keeping.judged(log.lines)):
                self._judge_samples(point.step, loop, log)

    def _steps(self, loop: Loop, log: Log) -> None:
        from tunekit.evaluation.charts import Smoother
        from tunekit.interrupts import Interrupted

        settings, ready = self.recipe.train, self.prepared
        smooth, smoothed = Smoother.over(settings.steps), math.nan
        with self.reporter.stage("training", settings.steps - self.start) as tick:
            for record in loop.run(ready.batches(settings, self.ranks), self.start):
                self.done = record.step
                last, asked = record.step == settings.steps, self._asked()
                if record.noticed:
                    self.reporter.note(record.noticed)
                odd = record.noticed or record.skipped or record.spike is not None
                if self.ranks.leads and (last or odd or record.step % settings.log_every == 0):
                    log.step(record)
                if last or asked or _due(record.step, settings.checkpoint_every):
                    self._save(record.step, loop, log)
                if asked and not last:
                    self.ranks.wait()
                    raise Interrupted(
                        f"stopped after step {record.step} of {settings.steps}, which is saved; "
                        f"the same command with --resume goes on",
                        asked,
                    )
                if self._shown(record.step):
                    self._sample(record.step, loop, log)
                    ready.family.release(*ready.idle)
                if math.isfinite(record.loss):
                    smoothed = smooth(record.loss)
                tick(_told(record, smoothed))

    def _asked(self) -> int | None:
        """Return the signal that one of the processes was asked to stop by; None where none was."""
        return max(self.ranks.gather(self.wish.number or 0)) or None

    def _shown(self, step: int) -> bool:
        """Return whether samples are drawn after `step`."""
        settings = self.recipe.train
        return step == settings.steps or _due(step, settings.sample_every)

    def _folder(self, step: int) -> Path:
        return self.writer.path / CHECKPOINTS / f"step-{step:06d}"

    def _save(self, step: int, loop: Loop, log: Log) -> None:
        if not (self.ranks.leads or self._sharded):
            return
        state = loop.state()
        if not self.ranks.leads:
            return
        log.settle()
        about = {"step": step, "sets": sorted(state), "processes": self.ranks.count}
        checkpoint.save(self._folder(step), state, about)
        self.keeper.at(step)
        self._prune(log)

    def _prune(self, log: Log) -> None:
        """Remove the checkpoints that the recipe does not keep."""
        if not self.ranks.leads:
            return
        train = self.recipe.train
        saved = checkpoint.steps(self.writer.path / CHECKPOINTS)
        best = keeping.best(self._likeness(log)) if train.keep_best else None
        known = [checkpoint.step_of(folder) for folder in saved]
        for step in keeping.superfluous(known, train.keep_last, train.keep_every, best):
            remove_folder(self._folder(step))

    def _likeness(self, log: Log) -> dict[int, float]:
        """Return the likeness of the samples of every step that is saved."""
        judged = keeping.judged(log.lines)
        return {step: value for step, value in judged.items() if self._folder(step).is_dir()}

    def _sample(self, step: int, loop: Loop, log: Log) -> None:
        from tunekit.inference import Painter

        self._doing = f"while samples were drawn after step {step}"
        painter = Painter.of(self.prepared.family, self.prepared.adapter)
        if self.ranks.leads:
            log.picture("samples", self.samples.at_step(painter, step), step)
        elif self._sharded:  # nobody can draw without the parts of the others
            self.samples.along(painter)
        self.ranks.wait()
        self._judge_samples(step, loop, log)
        self._doing = "in training"

    def _judge_samples(self, step: int, loop: Loop, log: Log) -> None:
        """Say how much a step's samples are like the real pictures; save it if none are more."""
        if not (self.recipe.train.keep_best and step):
            return
        best = False
        if self.ranks.leads:
            pictures = [dict(line.pictures)[step] for line in self.samples.timelines]
            likeness = self._judge(pictures)
            log.judged(step, likeness)
            best = keeping.best(self._likeness(log) | {step: likeness}) == step
        if self.ranks.heard(best and not self._folder(step).is_dir()):
            self._save(step, loop, log)
        self._prune(log)

    def _note(self, text: str) -> None:
        """Tell something that belongs into the report too."""
        self.prepared.notes.append(text)
        self.reporter.note(f"{self.writer.path}: {text}")

    def _memory_told(self) -> contextlib.AbstractContextManager[None]:
        steps = self.recipe.train.steps

        def when() -> str:
            return self._doing.replace("in training", f"in step {self.done + 1} of {steps}")

        return outofmemory.told(when, self.recipe, self.prepared.resolution)

    @contextlib.contextmanager
    def _rescuing(self, loop: Loop, log: Log) -> Iterator[None]:
        """Save what was learned up to the last finished step, where another one fails."""
        try:
            yield
        except (UserError, OSError, RuntimeError) as error:
            together = isinstance(error, TrainingError)  # which all processes find alike
            mine = together if self._sharded else self.ranks.leads
            if mine and loop.whole and self.done and (told := self._rescue(loop, log, error)):
                if isinstance(error, UserError) and not _told_elsewhere(error):
                    error.args = (str(error) + ("\n" if "\n" in str(error) else "; ") + told,)
                else:
                    self.reporter.note(told)
            if together:
                self.ranks.wait()
            raise

    def _rescue(self, loop: Loop, log: Log, error: Exception) -> str:
        """Save the last finished step, and return what there is to tell of that."""
        try:
            missing = not self._folder(self.done).is_dir()
            if self.ranks.heard(missing) if self._sharded else missing:
                self._save(self.done, loop, log)
        except (UserError, OSError, RuntimeError) as second:
            return _told_again(self.done, error, second)
        if _told_elsewhere(error):
            return ""
        return f"step {self.done} is saved: the same command with --resume goes on"


def _told_elsewhere(error: Exception) -> bool:
    """Return whether the process that started this one tells of it, and of what is saved."""
    return isinstance(error, RankLostError) and error.watched


def _told_again(step: int, error: Exception, second: Exception) -> str:
    """Return what is new where `step` could not be saved either; "" where that was the error."""
    if str(second) == str(error):
        return ""
    if isinstance(error, DiskError) and isinstance(second, DiskError):
        needed = "" if second.needed is None else f": {second.needed} bytes needed"
        again = second.path == error.path
        return "" if again else f"step {step} could not be saved either{needed}"
    return f"step {step} could not be saved: {second}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _told(record: StepRecord, loss: float) -> str:
    """Return where training stands, in a few words."""
    from tunekit.evaluation.report import size

    return (
        f"loss {loss:.4f}, lr {record.lr:.2e}, {record.images_per_second:.1f} images/s, "
        f"{size(record.memory_bytes)}"
    )
