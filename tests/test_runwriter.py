"""What a run writes where the disk is full: one line that names the path and the reason."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tunekit.errors import UserError
from tunekit.runwriter import Log, RunWriter

STEP: Any = SimpleNamespace(
    step=1, loss=1.0, lr=1e-3, grad_norm=1.0, images_per_second=1.0, memory_bytes=1, seconds=1.0,
    skipped=False, prior_loss=None, noticed=None, skips=0, spike=None,
)  # fmt: skip


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(path: Path) -> str:
    return rf"^{path}: cannot be written: File too large$"


def test_a_text_is_whole_or_refused_with_its_path(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write_text("recipe.yaml", "old")
    for size in (2_000, 200_000):
        with (
            files_of_at_most(1024),
            pytest.raises(UserError, match=refused(tmp_path / "recipe.yaml")),
        ):
            writer.write_text("recipe.yaml", "x" * size)
    with files_of_at_most(1024), pytest.raises(UserError, match=refused(tmp_path / "scores.json")):
        writer.write_json("scores.json", {"x": "y" * 2_000})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"recipe.yaml": "old"}


def test_a_folder_that_cannot_be_claimed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    with (
        files_of_at_most(0),
        pytest.raises(UserError, match=refused(writer.path)),
        writer.claim(False),
    ):
        raise AssertionError("claimed")
    with writer.claim(False):  # and the lock was given back
        pass


def log_steps(folder: Path, room: int) -> None:
    with Log(folder) as log:
        log.step(STEP)
        with files_of_at_most((folder / "metrics.jsonl").stat().st_size + room):
            log.step(STEP)


def log_picture(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with files_of_at_most(2048), Log(folder) as log:
        log.step(STEP)
        log.picture("samples", Image.fromarray(noise), 1)


def test_metrics_that_no_longer_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=refused(tmp_path / "metrics.jsonl")):
        log_steps(tmp_path, 10)
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["step"] == 1


def test_a_picture_that_tensorboard_cannot_keep(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):  # whether its thread or ours runs into the limit is a matter of luck
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=refused(folder / "tb")):
            log_picture(folder)
    assert capfd.readouterr().err == ""


def test_a_folder_that_takes_no_log(tmp_path: Path) -> None:
    before = threading.excepthook
    (tmp_path / "tb").write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/tb: cannot be written: "), Log(tmp_path):
        raise AssertionError("opened")
    assert threading.excepthook is before
