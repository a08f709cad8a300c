"""What a run says of itself at its end: the facts in scores.json, and the report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import some
from tunekit.evaluation.facts import machine, tables, verified, versions
from tunekit.evaluation.report import Facts, Timeline, write_report
from tunekit.recipe import Recipe, dump_yaml

if TYPE_CHECKING:
    from tunekit.evaluation.measure import Evaluation
    from tunekit.export import ExportedFile
    from tunekit.preparation import Prepared


@dataclass(frozen=True)
class Outcome:
    """A run whose files are there. seconds: wall time of each stage; parameters: numbers trained.

    prepared.notes: all that was chosen and said on the way.
    """

    recipe: Recipe
    folder: Path
    prepared: Prepared
    seconds: Mapping[str, float]
    parameters: int
    files: Sequence[ExportedFile]

    def facts(self, step: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what scores.json says of the run itself.

        step: after which the files were made; lines: those of metrics.jsonl.
        """
        from tunekit.train import peak_memory

        made = datetime.datetime.now().astimezone().replace(microsecond=0)
        return {
            "name": self.recipe.name,
            "made": made.isoformat(),
            "seconds": {name: round(spent, 2) for name, spent in self.seconds.items()},
            "peak_memory_bytes": peak_memory(self.prepared.device),
            "machine": machine(self.prepared.device),
            "versions": versions(),
            "trained_numbers": self.parameters,
            "step": step,
            "chosen_by": "likeness of samples" if self.recipe.train.keep_best else "last step",
            "steps_skipped": sum(bool(line.get("skipped")) for line in lines),
            "files": [
                {
                    "path": str(file.path.relative_to(self.folder)),
                    "layout": file.layout,
                    "bytes": file.bytes,
                    "sha256": file.sha256,
                    "error": file.parity.error,
                }
                for file in self.files
            ],
        }

    def report(
        self,
        evaluation: Evaluation,
        timelines: Sequence[Timeline],
        lines: Sequence[Mapping[str, Any]],
    ) -> str:
        """Return the report as HTML; lines: those of metrics.jsonl."""
        from tunekit.data import contact
        from tunekit.preparation import question_of

        ready, run = self.prepared, evaluation.scores["run"]
        question = question_of(self.recipe)
        example = question.told(question.prompts[0])
        facts = Facts(
            name=self.recipe.name,
            made=datetime.datetime.fromisoformat(run["made"]).strftime("%-d %B %Y, %H:%M"),
            recipe=dump_yaml(self.recipe),
            metrics=lines,
            timelines=[line for line in timelines if line.pictures],
            tables=tables(
                self.recipe,
                ready.sheet,
                ready.held_out,
                self.parameters,
                (self.seconds, run["peak_memory_bytes"], ready.device),
            ),
            files=[
                (str(file.path.relative_to(self.folder)), file.bytes, verified(file))
                for file in self.files
            ],
            command=f'tunekit generate --run {self.folder} --prompt "{example}"',
            notes=[*ready.notes, *_skipped(lines)],
            sheets=ready.looks,
            styles=contact.styles(),
            keepers=ready.some_keepers(),
            kept=len(ready.keepers.examples) if ready.keepers else 0,
        )
        return write_report(facts, evaluation, *ready.references)


def _skipped(lines: Sequence[Mapping[str, Any]], most: int = 20) -> list[str]:
    """Return what there is to tell of steps that were not taken, and of spikes that were."""
    told = []
    for key, what in {"skipped": "were not taken", "spike": "had a spike of the loss"}.items():
        steps = [str(line["step"]) for line in lines if line.get(key)]
        if steps:
            told.append(f"{len(steps)} of the steps {what}: {some(steps, most)}")
    return told
