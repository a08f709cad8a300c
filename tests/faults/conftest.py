"""Fixtures for the faults of README.md: a recipe as a file, and a run that is stopped.

Nothing is made believe: processes are real ones, and so are signals, full disks and broken files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopping import SECRETS, STEPS, Stopped, lines_of, process, until_stopped

Tree = dict[str, dict[str, Any]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Tree], Path]:
    """Return a function that saves a recipe as a file."""
    from tunekit.recipe import dump_yaml, recipe_from

    def write(tree: Tree) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_yaml(recipe_from(tree)))
        return path

    return write


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
    first, code = until_stopped(command, out, folder / "first.log")
    (last,) = checkpoint.steps(out / "checkpoints")
    saved = int(re.sub(r"\D", "", last.name))
    assert len(lines_of(out)) == saved
    with (folder / "second.log").open("w") as log:
        second = process([*command, "--resume"], log)
        codes = (code, second.wait(240))
    logs = first + (folder / "second.log").read_text()
    return Stopped(recipe, out, codes, saved, logs)
