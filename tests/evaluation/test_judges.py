"""Which encoders judge a recipe, and what the style encoder sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tunekit.evaluation.embedders import Clip, SubjectEncoder
from tunekit.evaluation.judges import StyleEncoder, load_judges
from tunekit.schema import Evaluate

Paint = Callable[..., Image.Image]


def test_the_recipe_chooses(clip_folder: Path, subject_folder: Path) -> None:
    named = {"clip": str(clip_folder), "subject_encoder": str(subject_folder)}
    judges = load_judges(Evaluate(**named))
    assert isinstance(judges.likeness, SubjectEncoder)
    style = load_judges(Evaluate(kind="style", **named))
    assert isinstance(style.likeness, StyleEncoder)
    assert style.likeness.clip is style.clip  # loaded once


def test_a_style_cosine_is_the_mean_of_words_and_texture(
    clip_folder: Path, subject_folder: Path, paint: Paint
) -> None:
    subject, clip = SubjectEncoder.load(str(subject_folder)), Clip.load(str(clip_folder))
    pictures = [paint(1), paint(2, style="outline")]
    rows = StyleEncoder(subject, clip).embed_images(pictures)
    texture, words = subject.texture(pictures), clip.embed_images(pictures)
    assert texture.shape == (2, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    mean = (texture[0] @ texture[1] + words[0] @ words[1]) / 2
    torch.testing.assert_close(rows[0] @ rows[1], mean)


@pytest.mark.parametrize("kind", ["subject", "clip"])
def test_texture_does_not_hang_on_places(
    kind: str, clip_folder: Path, subject_folder: Path, paint: Paint
) -> None:
    folder = {"subject": subject_folder, "clip": clip_folder}[kind]
    encoder = SubjectEncoder.load(str(folder))
    flat, moved = paint(1), paint(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other = paint(1, style="outline")
    rows = encoder.texture([flat, moved, other])
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
