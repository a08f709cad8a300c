"""The bundled subjects in `datasets/` are what the program that draws them gives."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tunekit.toybox import bundle, world
from tunekit.toybox.palette import UNSEEN_STYLE

DATASETS = Path(__file__).parent.parent.parent / "datasets"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    bundle.main(folder)
    return folder


@pytest.mark.parametrize("subject", ["zorp", "krafto"])
def test_the_bundled_subject_is_drawn_anew_pixel_by_pixel(drawn: Path, subject: str) -> None:
    def files(root: Path) -> list[str]:
        return sorted(str(p.relative_to(root)) for p in (root / subject).rglob("*") if p.is_file())

    assert files(drawn) == files(DATASETS)
    for name in files(drawn):
        new, old = (drawn / name).read_bytes(), (DATASETS / name).read_bytes()
        if name.endswith(".png"):
            one, other = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in (new, old))
            assert np.array_equal(one, other), name
        else:
            assert new == old, name


def test_what_is_held_out_of_a_subject_is_not_among_its_training_pictures(drawn: Path) -> None:
    for subject in ("zorp", "krafto"):
        sets = [
            {Image.open(p).tobytes() for p in (drawn / subject / part).glob("*.png")}
            for part in ("train", "held_out")
        ]
        assert all(sets)
        assert not sets[0] & sets[1]


def test_the_subjects_are_new_to_the_base() -> None:
    assert bundle.ZORP.colour not in world.FULL.colours
    assert UNSEEN_STYLE not in world.FULL.styles
