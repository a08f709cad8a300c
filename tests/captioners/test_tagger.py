from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny_tagger
import torch
from PIL import Image

from tunekit import captioners
from tunekit.captioners import Wishes
from tunekit.errors import UserError


def load(folder: Path, **options: Any) -> Any:
    kind = captioners.get("tagger")
    chosen = kind.Options(model=str(folder), **options)
    return kind.load(chosen, Wishes(), torch.device("cpu"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    return tiny_tagger.save(tmp_path / "tagger")


@pytest.mark.parametrize(
    ("colour", "tags"),
    [
        ((255, 0, 0), "red hat"),
        ((200, 120, 0), "red hat, green grass"),
        ((0, 0, 255), "zorp (x), blue sky"),
        ((0, 0, 0), ""),
    ],
)
def test_tags_come_by_confidence_characters_first_and_the_rating_never(
    saved: Path, colour: tuple[int, int, int], tags: str
) -> None:
    assert load(saved).describe(Image.new("RGB", (20, 20), colour)).text == tags


def test_a_picture_that_is_no_square_is_laid_on_white(saved: Path) -> None:
    flat = Image.new("RGB", (40, 10), (255, 0, 0))  # a quarter of the square, the rest is white
    assert load(saved, threshold=0.9).describe(flat).text == "red hat"
    assert "blue sky" in load(saved, threshold=0.7).describe(flat).text


def test_thresholds_and_excluded_tags(saved: Path) -> None:
    blue = Image.new("RGB", (20, 20), (0, 0, 255))
    assert load(saved, character_threshold=0.95).describe(blue).text == "blue sky"
    assert load(saved, exclude=("blue_sky",)).describe(blue).text == "zorp (x)"
    with pytest.raises(UserError, match="exclude: the model has no tag grey sky"):
        load(saved, exclude=("grey sky",))


def test_faces_stay_faces(saved: Path) -> None:
    assert [tag.words for tag in load(saved).tags][3:5] == ["red hat", "^_^"]


def test_files_that_do_not_belong_together_are_refused(saved: Path) -> None:
    (saved / "model.onnx").write_bytes(tiny_tagger.onnx(tags=7))
    with pytest.raises(UserError, match=r"scores 7 tags and selected_tags\.csv names 6"):
        load(saved)
    (saved / "model.onnx").write_bytes(tiny_tagger.onnx(shape=(1, 8, 4, 3)))
    with pytest.raises(UserError, match="takes pictures as"):
        load(saved)
    (saved / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"model\.onnx: cannot be loaded"):
        load(saved)
    (saved / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="the columns name and category"):
        load(saved)
    (saved / "selected_tags.csv").unlink()
    with pytest.raises(UserError, match=r"has no selected_tags\.csv"):
        load(saved)


def test_without_onnxruntime_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r'needs onnxruntime: pip install "tunekit\[tagger\]"'):
        load(tmp_path)
