"""How long a run takes, from its first steps: they are taken for real, and forgotten."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunekit.preparation import Prepared
    from tunekit.progress import Reporter
    from tunekit.recipe import Recipe

STEPS = 5
"""Steps that are taken; the first is not counted, in which kernels and caches are made."""


@dataclass(frozen=True)
class Times:
    """Seconds. step: the median of the steps after the first. preparing: as it took now, with what
    was not in the cache yet. samples, evaluating: estimated by the one picture that was drawn."""

    steps_taken: int
    step: float
    training: float
    preparing: float
    picture: float
    samples: float
    evaluating: float

    @property
    def run(self) -> float:
        """All of a run that is known; export and its proof are not."""
        return self.preparing + self.training + self.samples + self.evaluating

    def as_dict(self) -> dict[str, Any]:
        """Return everything for scripts."""
        return {name: round(value, 4) for name, value in asdict(self).items()} | {
            "run": round(self.run, 4)
        }

    def lines(self) -> list[str]:
        """Return the times for people."""
        return [
            f"{self.step:.2f} s a step by {self.steps_taken} of them, {_long(self.training)} for "
            "all of the training",
            f"about {_long(self.run)} for the run: {_long(self.preparing)} of preparation as it "
            f"took now, {_long(self.samples)} of samples and {_long(self.evaluating)} of "
            "evaluation as one picture tells; export and report are not known",
        ]


def probe_times(recipe: Recipe, reporter: Reporter) -> Times:
    """Prepare a run, take its first steps and draw a picture; nothing is kept but the cache.

    Raises UserError as a run does.
    """
    from tunekit.data import Cache
    from tunekit.preparation import prepare, quietly

    began = time.perf_counter()
    cache = Cache(say=reporter.note)
    with quietly(), cache.using():
        ready = prepare(recipe, reporter, cache)
        preparing = time.perf_counter() - began
        taken = _steps(recipe, ready, reporter)
        picture = _picture(recipe, ready)
    return _times(recipe, taken, preparing, picture)


def _steps(recipe: Recipe, ready: Prepared, reporter: Reporter) -> list[float]:
    from tunekit.train import Loop

    encode = ready.family.encode_prompt if ready.adapter.trains_text_encoder else None
    loop = Loop(ready.family, ready.adapter, recipe.train, encode=encode)
    count = min(STEPS, recipe.train.steps)
    taken: list[float] = []
    with reporter.stage("probing", count) as tick:
        for record in loop.run(ready.batches(recipe.train)):
            taken.append(record.seconds)
            tick()
            if len(taken) == count:
                break
    return taken


def _picture(recipe: Recipe, ready: Prepared) -> float:
    from tunekit.inference import Painter
    from tunekit.preparation import drawing_of, question_of

    painter = Painter.of(ready.family, ready.adapter)
    question = question_of(recipe)
    began = time.perf_counter()
    prompt = question.told(question.prompts[0])
    painter.draw(prompt, question.seeds[0], drawing_of(recipe, ready.resolution))
    return time.perf_counter() - began


def _times(recipe: Recipe, taken: list[float], preparing: float, picture: float) -> Times:
    from tunekit.evaluation.measure import count_pictures
    from tunekit.preparation import question_of
    from tunekit.samples import SAMPLE_PROMPTS

    train, question = recipe.train, question_of(recipe)
    step = statistics.median(taken[1:] or taken)
    every = train.sample_every
    # Before the first step and after the last, and where they come round in between.
    times = 2 + (train.steps - 1) // every if every else 1
    shown = len(question.prompts)
    if not train.keep_best:  # which judges all of them
        shown = min(shown, SAMPLE_PROMPTS)
    return Times(
        steps_taken=len(taken),
        step=step,
        training=step * train.steps,
        preparing=preparing,
        picture=picture,
        samples=picture * times * shown,
        evaluating=picture * count_pictures(question),
    )


def _long(seconds: float) -> str:
    """Return a span of time in the two units that tell it."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
