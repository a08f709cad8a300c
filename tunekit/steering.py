"""The training part of a run: drives the loop, saves, draws samples, and stops when it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit import checkpoint
from tunekit.runfolder import CHECKPOINTS

if TYPE_CHECKING:
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

    keeper: is told of each step that was saved.
    """

    recipe: Recipe
    writer: RunWriter
    reporter: Reporter
    prepared: Prepared
    wish: Wish
    samples: Samples
    keeper: Keeper
    point: Point | None = None

    def __post_init__(self) -> None:
        self.start = self.point.step if self.point else 0

    def train(self, log: Log) -> None:
        """Take every step that is left; Interrupted after one that was asked to be the last."""
        from tunekit.train import Loop

        settings, ready = self.recipe.train, self.prepared
        encode = ready.family.encode_prompt if ready.adapter.trains_text_encoder else None
        loop = Loop(ready.family, ready.adapter, settings, encode=encode)
        if self.point is not None:
            self._take_up(self.point, loop, log)
        elif settings.sample_every:
            self._sample(0, log)
        ready.family.release(*ready.idle)
        if self.start < settings.steps:
            with self.wish.patiently():
                self._steps(loop, log)

    def _take_up(self, point: Point, loop: Loop, log: Log) -> None:
        """Be where the run was when `point` was saved."""
        loop.load_state(point.saved.tensors)
        self.samples.recall(point.step)
        note = f"went on from {point.folder.name}; times are those of the last part alone"
        self.prepared.notes.append(note)
        self.reporter.note(f"{self.writer.path}: {note}")
        if self._shown(point.step) and not self.samples.shows(point.step):
            self._sample(point.step, log)  # it was stopped between saving and drawing

    def _steps(self, loop: Loop, log: Log) -> None:
        from tunekit.evaluation.charts import Smoother
        from tunekit.interrupts import Interrupted

        settings, ready = self.recipe.train, self.prepared
        smooth = Smoother.over(settings.steps)
        with self.reporter.stage("training", settings.steps - self.start) as tick:
            for record in loop.run(ready.batches(settings), self.start):
                last, asked = record.step == settings.steps, self.wish.number
                if last or record.step % settings.log_every == 0:
                    log.step(record)
                if last or asked or _due(record.step, settings.checkpoint_every):
                    self._save(record.step, loop)
                if asked and not last:
                    raise Interrupted(
                        f"stopped after step {record.step} of {settings.steps}, which is saved; "
                        f"the same command with --resume goes on",
                        asked,
                    )
                if self._shown(record.step):
                    self._sample(record.step, log)
                    ready.family.release(*ready.idle)
                tick(_told(record, smooth(record.loss)))

    def _shown(self, step: int) -> bool:
        """Return whether samples are drawn after `step`."""
        settings = self.recipe.train
        return step == settings.steps or _due(step, settings.sample_every)

    def _save(self, step: int, loop: Loop) -> None:
        folder = self.writer.path / CHECKPOINTS / f"step-{step:06d}"
        checkpoint.save(folder, loop.state(), {"step": step})
        self.keeper.at(step)

    def _sample(self, step: int, log: Log) -> None:
        from tunekit.inference import Painter

        painter = Painter.of(self.prepared.family, self.prepared.adapter)
        log.picture("samples", self.samples.at_step(painter, step), step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _told(record: StepRecord, loss: float) -> str:
    """Return where training stands, in a few words."""
    from tunekit.evaluation.report import size

    return (
        f"loss {loss:.4f}, lr {record.lr:.2e}, {record.images_per_second:.1f} images/s, "
        f"{size(record.memory_bytes)}"
    )
