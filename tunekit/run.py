"""One run, from a recipe to a report: what `tunekit train` and `tunekit.train` call.

Everything that can be known to be wrong is refused before anything is written. What is scored is
drawn with the exported file by a fresh pipeline: the scores are those of what people get.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import outofmemory
from tunekit.ranks import ALONE, Ranks, started
from tunekit.recipe import Recipe, dump_yaml, recipe_from
from tunekit.runfolder import EXPORT, PICTURES, RECIPE
from tunekit.runstate import Keeper
from tunekit.runwriter import REPORT, SAMPLES, SCORES, Log, RunWriter
from tunekit.steering import Course

if TYPE_CHECKING:
    from tunekit.evaluation.measure import Evaluation
    from tunekit.export import ExportedFile
    from tunekit.interrupts import Wish
    from tunekit.lesson import Lesson
    from tunekit.preparation import Prepared
    from tunekit.progress import Reporter
    from tunekit.resume import Point
    from tunekit.samples import Samples

__all__ = ["Request", "Run", "train"]

RUNS = Path("runs")
_MARKS = {"good": "+", "fair": "~", "poor": "!"}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its scores (the content of scores.json) and its adapter files."""

    folder: Path
    recipe: Recipe
    scores: Mapping[str, Any]
    files: Sequence[ExportedFile]

    @property
    def report(self) -> Path:
        """The report, a self-contained HTML file."""
        return self.folder / REPORT

    def as_dict(self) -> dict[str, Any]:
        """Return what a script wants to know, as JSON values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "scores_file": str(self.folder / SCORES),
            "files": [str(file.path) for file in self.files],
            "verdict": self.scores["verdict"],
            "scores": self.scores["scores"],
            "run": self.scores["run"],
        }

    def lines(self) -> list[str]:
        """Return the outcome for people: the verdict, and where things are."""
        told = self.scores["verdict"]
        return [
            told["headline"],
            *(f"  {_MARKS[line['tone']]} {line['text']}" for line in told["sentences"]),
            *(f"adapter: {file.path}" for file in self.files),
            f"report:  {self.report}",
        ]


@dataclass(frozen=True)
class Request:
    """What is to be trained, and what becomes of a run that stands there.

    recipe: a file, a mapping with a recipe's keys, or a Recipe. overrides: ``KEY=VALUE`` texts.
    out: the run's folder, by default ``runs/NAME``. overwrite: replace a run that is there.
    resume: go on with the run that stands there, from its last checkpoint (True) or from this one;
    the result is bit for bit that of a run never stopped. allow_changed: even where the recipe is
    not the one it was started with.
    """

    recipe: Path | str | Mapping[str, Any] | Recipe
    overrides: Sequence[str] = ()
    out: Path | str | None = None
    overwrite: bool = False
    resume: bool | Path | str = False
    allow_changed: bool = False

    def point(self, writer: RunWriter, recipe: Recipe) -> Point | None:
        """Return where the run goes on, None for one that begins; UserError if it may do neither.

        recipe: that of the request, as resolved.
        """
        from tunekit.errors import UserError
        from tunekit.resume import find

        if self.resume is False:
            if self.allow_changed:
                raise UserError("--allow-changed belongs to --resume")
            writer.check(self.overwrite)
            return None
        if self.overwrite:
            raise UserError(
                "--overwrite starts a run afresh and --resume goes on with it: take one"
            )
        writer.check(overwrite=False, resume=True)
        wanted = None if self.resume is True else Path(self.resume)
        return find(writer.path, wanted, recipe, self.allow_changed, finished=writer.finished())


def train(
    recipe: Path | str | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    resume: bool | Path | str = False,
    allow_changed: bool = False,
) -> Run:
    """Teach what a recipe says, and return the finished run.

    The arguments are those of `Request`; reporter: who is told of the progress; None: bars or
    lines on stderr.

    SIGTERM and Ctrl-C end a run in training after the step in hand, saved, with Interrupted.
    Raises UserError for whatever the user can mend, and where it can be known beforehand then with
    nothing written; TrainingError where the numbers break down; ExportError where the adapter file
    fails its verification, then with scores and report written, so that one can see why.
    """
    from tunekit.errors import UserError

    if (count := started()) > 1:
        raise UserError(
            f"{count} processes were started (WORLD_SIZE), and each would train the same by "
            "itself: start `tunekit train RECIPE --processes N` alone"
        )
    run = train_as(
        ALONE, Request(recipe, overrides, out, overwrite, resume, allow_changed), reporter
    )
    assert run is not None, "alone it leads"
    return run


def train_as(ranks: Ranks, asked: Request, reporter: Reporter | None = None) -> Run | None:
    """Do one process's part of `train`, and return the run; None for those that do not lead."""
    from tunekit.data import Cache
    from tunekit.interrupts import heard
    from tunekit.preparation import prepare, quietly
    from tunekit.progress import OnScreen, Silent
    from tunekit.resume import compare_pictures

    began = time.monotonic()
    recipe = recipe_from(asked.recipe, asked.overrides)
    writer = RunWriter(Path(asked.out) if asked.out is not None else RUNS / recipe.name)
    with outofmemory.told(lambda: "while the checkpoint was read", recipe):
        point = asked.point(writer, recipe)
    reporter = (reporter or OnScreen()) if ranks.leads else Silent()
    cache = Cache(say=reporter.note)
    with quietly(), heard(reporter.note) as wish, cache.using(), ranks.told():
        with ranks.in_turn(), outofmemory.told(lambda: "while the run was prepared", recipe):
            prepared = prepare(recipe, reporter, cache, ranks)
        if point is not None:
            compare_pictures(writer.path, prepared.manifest(), asked.allow_changed)
        session = _Session(recipe, writer, reporter, prepared, wish, ranks, point)
        writer.check_space(session.space_needed())
        session.course.prepare()
        if not ranks.leads:
            session.course.train(Log(writer.path))  # which is never opened
            return None
        session.seconds["preparing"] = time.monotonic() - began
        with writer.claim(asked.overwrite, point.step if point else None) as killed:
            if killed is not None:
                reporter.note(f"{writer.path}: the run before ({killed}) was killed")
            with session.keeper.keeping():
                return session.run()


@dataclass
class _Session:
    """One run in a folder of its own."""

    recipe: Recipe
    writer: RunWriter
    reporter: Reporter
    prepared: Prepared
    wish: Wish
    ranks: Ranks = ALONE
    point: Point | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    samples: Samples = field(init=False)
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        from tunekit.preparation import drawing_of, question_of
        from tunekit.samples import SAMPLE_PROMPTS, Samples

        self.question = question_of(self.recipe)
        drawing = drawing_of(self.recipe, self.prepared.resolution)
        most = None if self.recipe.train.keep_best else SAMPLE_PROMPTS
        self.samples = Samples(self.writer.path / SAMPLES, self.question, drawing, most)
        self.parameters = self.prepared.adapter.parameter_count()
        self.start = self.point.step if self.point else 0
        self.keeper = Keeper(self.writer.path, self.start, self.recipe.train.steps)
        self.course = Course(
            self.recipe,
            self.writer,
            self.reporter,
            self.prepared,
            self.wish,
            self.samples,
            self.keeper,
            self.point,
            self.ranks,
        )

    def space_needed(self) -> int:
        """Return about how many bytes the run has yet to write: checkpoints, files, pictures."""
        from tunekit.optim import disk_bytes

        train, question = self.recipe.train, self.question
        each = disk_bytes(train, self.prepared.adapter.parameter_groups())
        left = train.steps - self.start
        saved = math.ceil(left / (train.checkpoint_every or train.steps)) + train.keep_best
        if train.keep_last is not None:
            apart = train.steps // train.keep_every if train.keep_every else 0
            saved = min(saved, train.keep_last + apart + train.keep_best + 1)
        times = math.ceil(left / train.sample_every) + 1 if train.sample_every else 1
        # Each by itself, in a sheet, in TensorBoard and in the report; before and after.
        pictures = 5 * times * len(self.samples.prompts)
        pictures += 4 * len(question.prompts) * len(question.seeds) + 16
        adapter, asked = self.recipe.adapter, self.recipe.export.layouts
        files = 4 * self.parameters * (len(adapter.layouts(asked)) if adapter else 1)
        return each * saved + files + pictures * 3 * self.prepared.resolution**2 + 5_000_000

    def run(self) -> Run:
        """Train, export, evaluate and report in the claimed folder."""
        from tunekit.errors import without_frames
        from tunekit.evaluation.facts import for_card
        from tunekit.export import ExportError, write_card
        from tunekit.outcome import Outcome

        self.writer.write_text(RECIPE, dump_yaml(self.recipe))
        self.writer.write_json(PICTURES, self.prepared.manifest())
        files: list[ExportedFile] = []
        refused: ExportError | None = None
        with Log(self.writer.path, self.start if self.point else None) as log:
            with self._timed("training"):
                self.course.train(log)
                step = self.course.choose(log)
            with self._timed("exporting"), self._memory_told("while the adapter was exported"):
                try:
                    files = self._export(step)
                except ExportError as error:
                    refused = without_frames(error)
                    self.prepared.notes.append(f"no adapter file came out: {error}")
                    self.reporter.note(self.prepared.notes[-1])
            with self._timed("evaluating"), self._memory_told("while the run was evaluated"):
                evaluation = self._evaluate(files, step)
            self.samples.before_after(evaluation.pairs)
            log.scores(evaluation.scores["scores"], step)
        outcome = Outcome(
            self.recipe, self.writer.path, self.prepared, self.seconds, self.parameters, files
        )
        evaluation.scores["run"] = outcome.facts(step, log.lines)
        if files:
            told = for_card(evaluation.scores)
            if step != (steps := self.recipe.train.steps):
                told["made after step"] = f"{step} of {steps}: its samples were the most alike"
            drawn = [(p.told, p.after) for p in evaluation.pairs if p.seed == self.samples.seed]
            write_card(self.recipe, files, self.prepared.resolution, told, drawn)
        self.writer.write_json(SCORES, evaluation.scores)
        page = outcome.report(evaluation, self.samples.timelines, log.lines)
        self.writer.write_text(REPORT, page)
        if refused is not None:
            self.reporter.note(f"{self.writer.path / REPORT} shows what came of it")
            raise refused
        return Run(self.writer.path, self.recipe, evaluation.scores, files)

    def _export(self, step: int) -> list[ExportedFile]:
        from tunekit import export

        ready, folder, lesson = self.prepared, self.writer.path / EXPORT, self._lesson(step)
        with self.reporter.stage("exporting", 1) as tick:
            written = export.write(ready.family, ready.adapter, self.recipe, folder, lesson=lesson)
            ready.let_go()  # make room for a base that was not trained
            files = written.verified()
            tick("verified")
        return files

    def _lesson(self, step: int) -> Lesson:
        """Return what files say of the pictures, with one that is drawn where it is asked for."""
        from tunekit.inference import Painter
        from tunekit.lesson import Lesson

        ready, thumbnail = self.prepared, None
        if self.recipe.export.thumbnail:
            painter = Painter.of(ready.family, ready.adapter)
            prompt = self.question.told(self.question.prompts[0])
            thumbnail = self.samples.draw(painter, "thumbnail", prompt, self.samples.seed)
        captions = [example.captions for example in ready.sheet.examples]
        return Lesson.of(captions, ready.manifest(), step, thumbnail)

    def _evaluate(self, files: Sequence[ExportedFile], step: int) -> Evaluation:
        """Draw before and after, and score; what is saved of `step` draws where no file came out.

        One base is in memory at a time.
        """
        from tunekit.evaluation.judges import load_judges
        from tunekit.evaluation.measure import Gallery, count_pictures, measure
        from tunekit.export import needed
        from tunekit.inference import Painter, load
        from tunekit.samples import InTurn

        ready, base = self.prepared, self.recipe.base
        ready.let_go()
        turns = InTurn()
        before = turns.of(lambda: load(base, device=ready.device))
        after = turns.of(
            lambda: (
                load(base, needed(files), device=ready.device)
                if files
                else Painter.of(*self.course.again(step))
            )
        )
        training, held_out = ready.references
        judges = load_judges(self.recipe.evaluate, ready.device)
        with self.reporter.stage("evaluating", count_pictures(self.question)) as tick:
            return measure(
                self.question,
                Gallery(self.samples.drawer(before, "base", tick)),
                Gallery(self.samples.drawer(after, "taught", tick)),
                training,
                held_out,
                judges,
            )

    def _memory_told(self, what: str) -> contextlib.AbstractContextManager[None]:
        return outofmemory.told_after(what, self.recipe, self.prepared.resolution)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
