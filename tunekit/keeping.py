"""Which checkpoints of a run stay, and which of them is the best.

The best is the one whose samples are most like real pictures: held-out ones where there are any,
since pictures that were trained on may be repeated and not understood. It is a coarse judge: as
many pictures as the evaluation has prompts, of one seed each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tunekit.evaluation.measure import Reference
    from tunekit.schema import Evaluate

LIKENESS = "sample_likeness"
"""What a line of metrics.jsonl calls it, beside `step` alone."""


def superfluous(
    steps: Sequence[int], last: int | None, every: int | None, best: int | None
) -> list[int]:
    """Return which of the saved steps need not stay, the lowest first.

    last: how many of the newest stay; None: all. every: multiples of it stay. best: stays.
    """
    known = sorted(steps)
    if last is None:
        return []
    stay = {*known[-last:], best, *(step for step in known if every and step % every == 0)}
    return [step for step in known if step not in stay]


def judged(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the likeness of each step's samples, as lines of metrics.jsonl tell it."""
    return {line["step"]: line[LIKENESS] for line in lines if line.get(LIKENESS) is not None}


def best(likeness: Mapping[int, float]) -> int | None:
    """Return the step with the highest likeness, of equal ones the first; None where none is."""
    return min(likeness, key=lambda step: (-likeness[step], step), default=None)


class SampleJudge:
    """Tells how much samples are like the real pictures of a recipe, by its evaluation's judge.

    training, held_out: the real pictures. The judge is loaded for each question, on the CPU: the
    memory that trains is left alone.
    """

    def __init__(
        self, evaluate: Evaluate, training: Sequence[Reference], held_out: Sequence[Reference]
    ) -> None:
        self.against = "held-out pictures" if held_out else "training pictures"
        self._evaluate = evaluate
        self._pictures = [reference.image for reference in held_out or training]
        self._real: Tensor | None = None

    def __call__(self, samples: Sequence[Image]) -> float:
        """Return the samples' mean cosine to the real pictures, -1 to 1."""
        from tunekit.evaluation import scores
        from tunekit.evaluation.judges import load_judges

        like = load_judges(self._evaluate).likeness.embed_images
        if self._real is None:
            self._real = like(self._pictures)
        return scores.mean(scores.likeness(like(samples), self._real))
