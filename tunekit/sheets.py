"""Every picture that a recipe names, looked at: to train on, held out, and of the class.

`tunekit inspect` shows what is found here; a run refuses its errors, all of them at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunekit.data import checks
from tunekit.data.captions import fill, holds
from tunekit.data.records import SEVERITIES, DataError, Finding
from tunekit.data.sheet import DataSheet, examine, shared_pictures
from tunekit.data.source import fault_line
from tunekit.prior import section

if TYPE_CHECKING:
    from tunekit.data.cache import Cache
    from tunekit.families import Description
    from tunekit.progress import Reporter
    from tunekit.schema import Data, Train

RESOLUTION = 512
"""Pixels, where neither the recipe nor a base says how large pictures will be."""
MULTIPLE = 8
# What there is to know of pictures whose words and looks are not what is taught.
_APART = ("enlarged", "cut", "much-cut", "smaller-bucket", "duplicate", "near-duplicate", "blank")


@dataclass(frozen=True)
class Plan:
    """How often a run shows pictures. visits: the least and the most of each example."""

    steps: int
    pictures_a_step: int
    epochs: float
    visits: tuple[tuple[int, int], ...]

    def told(self) -> str:
        """Return the plan as a sentence."""
        low, high = min(v[0] for v in self.visits), max(v[1] for v in self.visits)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return (
            f"{self.steps:,} steps of {self.pictures_a_step}: {self.epochs:,.4g} epochs, each "
            f"picture shown {each} times"
        )


@dataclass(frozen=True)
class Sheets:
    """The sheets of a recipe's pictures.

    training, held_out, prior: None where there are none, or where the base draws them. plan: None
    where a picture cannot be used. findings: all there is to tell of all of them, errors first.
    """

    training: DataSheet
    held_out: DataSheet | None
    prior: DataSheet | None
    plan: Plan | None
    findings: tuple[Finding, ...]

    def check(self) -> None:
        """Raise DataError with every error of every sheet, where there is one."""
        if errors := [finding for finding in self.findings if finding.severity == "error"]:
            raise DataError(self.training.label, map(fault_line, errors))


def look(
    data: Data,
    train: Train,
    base: Description | None,
    reporter: Reporter,
    tokens: Sequence[str] = (),
    cache: Cache | None = None,
) -> Sheets:
    """Look at all pictures that `data` names, each decoded once.

    base: what they are looked at for; None where it is not known. tokens: new words, which the
    captions say. cache: keeps pictures of tables and shards. Raises UserError where a source
    cannot be looked at at all: what is wrong with pictures is a finding.
    """
    size = None if data.resolutions else (base.default_resolution if base else RESOLUTION)
    multiple = base.size_multiple if base else MULTIPLE
    words = base.cut_words if base else None
    with counting(reporter, "looking") as progress:
        sheet = examine(
            data, size, multiple=multiple, cut_words=words, progress=progress, cache=cache
        )
    findings = [*sheet.findings, *_unsaid(sheet, tokens)]
    held_out = prior = None
    if data.holdout is not None:
        with counting(reporter, "held out") as progress:
            held_out = examine(
                data,
                sheet.resolution,
                multiple=multiple,
                folder=data.holdout,
                progress=progress,
                cache=cache,
            )
        findings += _apart(held_out, "held-out", "held out")
        findings += _shared(sheet, held_out)
    if data.prior is not None and data.prior.source is not None:
        with counting(reporter, "class") as progress:
            prior = examine(
                section(data), sheet.resolution, multiple=multiple, progress=progress, cache=cache
            )
        findings += _apart(prior, "prior", f"of the class, in {data.prior.source}")
    findings += _kept(data, sheet, prior)
    plan = _plan(sheet, train)
    if plan:
        findings += checks.seldom(sheet.examples, plan.visits)
    return Sheets(sheet, held_out, prior, plan, by_severity(findings))


def by_severity(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings with the errors first, then the warnings."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


@contextlib.contextmanager
def counting(reporter: Reporter, name: str) -> Iterator[Callable[[int, int], None]]:
    """Open a stage of the reporter as soon as it is known how much there is to do."""
    with contextlib.ExitStack() as stack:
        ticks: list[Any] = []

        def progress(done: int, total: int) -> None:
            if not ticks:
                ticks.append(stack.enter_context(reporter.stage(name, total)))
            ticks[0]()

        yield progress


def _unsaid(sheet: DataSheet, tokens: Sequence[str]) -> list[Finding]:
    """Return an error for each new word that nothing would teach."""
    captions = [caption.lower() for example in sheet.examples for caption in example.captions]
    return [
        Finding(
            "error",
            "token-unsaid",
            f"no caption says {token}, so it would learn nothing",
            (),
            "write it where the subject is named, or make it the trigger",
        )
        for token in tokens
        if captions and not any(token in caption for caption in captions)
    ]


def _apart(sheet: DataSheet, code: str, whose: str) -> list[Finding]:
    """Return what to tell of pictures that are not the ones to learn."""
    return [
        replace(finding, code=f"{code}-{finding.code}", text=f"{whose}: {finding.text}")
        for finding in sheet.findings
        if finding.severity == "error" or finding.code in _APART
    ]


def _shared(sheet: DataSheet, held_out: DataSheet) -> list[Finding]:
    pairs = shared_pictures(sheet, held_out)
    if not pairs:
        return []
    names = tuple(f"{held} ({trained})" for trained, held in pairs)
    text = "held-out pictures that are training pictures as well"
    advice = "keep them apart: else the ceiling of the scores means nothing"
    return [Finding("error", "held-out-shared", text, names, advice)]


def _kept(data: Data, sheet: DataSheet, prior: DataSheet | None) -> list[Finding]:
    """Return what to tell of how the class is kept alive."""
    if data.prior is None:
        return []
    found = []
    count, resolutions = data.prior.count, sheet.resolutions
    if prior is None:
        filled = [fill(prompt, "", data.class_noun) for prompt in data.prior.prompts]
        drawn = ", ".join(f'"{prompt}"' for prompt in filled)
        text = f"the untouched base draws {count} pictures of the class: {drawn}"
        found.append(Finding("note", "prior", text))
    else:
        there = len(prior.examples)
        if there != count:
            used = f"all {there} are used" if there < count else f"{count} of {there} are used"
            text = f"data.prior.count is {count}, {data.prior.source} holds {there}: {used}"
            found.append(Finding("note", "prior", text))
        taught = tuple(e.name for e in prior.examples if any(_says(data, c) for c in e.captions))
        if taught:
            text = f'of the class, in {data.prior.source}: the caption says "{data.trigger}"'
            advice = "these pictures are to keep apart from the word: caption them without it"
            found.append(Finding("error", "prior-trigger", text, taught, advice))
        if pairs := shared_pictures(sheet, prior):
            names = tuple(f"{other} ({trained})" for trained, other in pairs)
            text = "pictures of the class that are training pictures as well"
            advice = "the class is to be kept apart from the subject: take them out of one"
            found.append(Finding("error", "prior-shared", text, names, advice))
    if len(resolutions) > 1:
        text = f"pictures of the class are trained at {resolutions[0]} pixels only"
        found.append(Finding("note", "prior", text))
    return found


def _says(data: Data, caption: str) -> bool:
    return data.trigger != checks.UNKNOWN_TRIGGER and holds(caption, data.trigger)


def _plan(sheet: DataSheet, train: Train) -> Plan | None:
    if sheet.errors or not sheet.examples:
        return None
    visits = sheet.visits(train.batch_size, train.steps * train.gradient_accumulation)
    a_step = train.batch_size * train.gradient_accumulation
    epoch = sum(example.repeats for example in sheet.examples) * len(sheet.resolutions)
    return Plan(train.steps, a_step, train.steps * a_step / epoch, visits)
