"""Who judges: the encoders of one evaluation, chosen by the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.evaluation.embedders import Clip, ImageEncoder, SubjectEncoder

if TYPE_CHECKING:
    import torch

    from tunekit.schema import Evaluate


@dataclass(frozen=True)
class Judges:
    """The encoders: `likeness` tells the subject or style, `clip` prompts and whole pictures."""

    likeness: ImageEncoder
    clip: Clip


def load_judges(evaluate: Evaluate, device: torch.device | str = "cpu") -> Judges:
    """Load the judges that a recipe names; raises UserError for what cannot be loaded."""
    return Judges(
        SubjectEncoder.load(evaluate.subject_encoder, device), Clip.load(evaluate.clip, device)
    )
