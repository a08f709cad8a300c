"""Fixtures for the faults of README.md: a command line to type at, and a run that is stopped.

Nothing is made believe: processes are real ones, and so are signals, full disks and broken files.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunekit.cli import main

Tree = dict[str, dict[str, Any]]
Typed = Callable[..., "Told"]

# What no file of a run may hold. Parts are put together, so that this file is no find either.
SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7" * 11,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Vk4" * 11,
    "TRACKER_API_KEY": "tracker" + "-9x8y7z" * 3,
    "DATABASE_PASSWORD": "opensesame" + "-12345",
}
STEPS = 40


@dataclass(frozen=True)
class Told:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refusal(self, *names: str) -> list[str]:
        """Return the lines of a refusal, one of which names each of `names`."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        for name in names:
            assert any(name in line for line in lines), (name, self.err)
        return lines


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Return a function that types `tunekit` with words, in this process."""

    def typed(*words: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["tunekit", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Told(left.value.code, said.out, said.err)

    return typed


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Tree], Path]:
    """Return a function that saves a recipe as a file."""
    from tunekit.recipe import dump_yaml, recipe_from

    def write(tree: Tree) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_yaml(recipe_from(tree)))
        return path

    return write


@dataclass(frozen=True)
class Stopped:
    """A run that SIGTERM stopped, and that went on. logs: all that both processes printed."""

    recipe: Tree
    folder: Path
    codes: tuple[int, int]
    saved: int
    """Lines of metrics.jsonl, and the step of the only checkpoint, when it had stopped."""
    logs: str


@pytest.fixture(scope="session")
def stopped(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Return a run of two real processes, with SECRETS in their environment."""
    from tunekit import checkpoint
    from tunekit.recipe import dump_yaml, recipe_from

    recipe = tree(
        train={
            "steps": STEPS,
            "checkpoint_every": 0,
            "sample_every": 0,
            "ema": 0.9,
            "optimizer": "adamw",
        },
        data={"captions": {"dropout": 0.3}, "crop": "random", "flip": True},
        adapter={"kind": "lora", "rank": 2, "dropout": 0.2},
        evaluate={"steps": 1},
    )
    folder = tmp_path_factory.mktemp("stopped")
    out = folder / "run"
    note = "".join(f"# {name}={value}\n" for name, value in SECRETS.items())
    (folder / "recipe.yaml").write_text(note + dump_yaml(recipe_from(recipe)))
    command = ["train", str(folder / "recipe.yaml"), "--out", str(out)]
    first, code = _until_stopped(command, out, folder / "first.log")
    (last,) = checkpoint.steps(out / "checkpoints")
    saved = int(re.sub(r"\D", "", last.name))
    assert len(_lines(out)) == saved
    with (folder / "second.log").open("w") as log:
        second = process([*command, "--resume"], log)
        codes = (code, second.wait(240))
    logs = first + (folder / "second.log").read_text()
    return Stopped(recipe, out, codes, saved, logs)


def process(words: list[str], log: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start a real `tunekit`; what it prints goes to `log`."""
    environment: Mapping[str, str] = {**os.environ, **SECRETS}
    return subprocess.Popen(
        [sys.executable, "-m", "tunekit", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        **options,
    )


def _lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _until_stopped(command: list[str], out: Path, path: Path) -> tuple[str, int]:
    with path.open("w") as log:
        running = process(command, log)
        try:
            until = time.monotonic() + 200
            while len(_lines(out)) < 2:
                assert running.poll() is None, path.read_text()
                assert time.monotonic() < until, "no step in all this time"
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            code = running.wait(120)
        finally:
            running.kill()
    return path.read_text(), code
