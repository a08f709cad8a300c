"""Fixtures that many tests share. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch is imported: one thread a process (pytest -n starts several), and threads that sleep
# while they wait, because spinning ones bring a shared machine to a standstill.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test may lean on the network, or on what an earlier run left in the Hub's cache.
os.environ["HF_HUB_OFFLINE"] = "1"

if TYPE_CHECKING:
    from told import Typed

    from tunekit.families.base import Family
    from tunekit.run import Run

Tree = dict[str, dict[str, Any]]
Load = Callable[..., "Family"]


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Let runs, which collect garbage often, not look through all that is loaded by now.

    That is most of a second each time, once the libraries are there.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Return a function that types `tunekit` with words, in this process."""
    from told import Said

    from tunekit.cli import main

    def typed(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["tunekit", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        assert isinstance(left.value.code, int)
        return Said(left.value.code, said.out, said.err)

    return typed


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a tiny base's folder by family name and settings, made once.

    Tests may not write in it.
    """
    import tiny

    made: dict[str, Path] = {}

    def folder(family: str = "sd", **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in made:
            made[key] = tiny.BUILDERS[family](tmp_path_factory.mktemp(family), **settings)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Callable[..., Path]) -> Load:
    """Return a function that gives a tiny base to oneself: by family, dtype, and builder settings.

    Each is read from its files once, and copied from then on.
    """
    from tunekit import families
    from tunekit.schema import Base

    read: dict[str, Family] = {}

    def load(family: str = "sd", dtype: Any = "fp32", **settings: Any) -> Family:
        folder = str(tiny_folder(family, **settings))
        key = f"{folder} {dtype}"
        if key not in read:
            read[key] = families.load(Base(model=folder, dtype=dtype))
        return copy.deepcopy(read[key])

    return load


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with training pictures in train/ and others in held_out/."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("held_out", 2)):
        (root / part).mkdir()
        lines = []
        for i in range(count):
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(blocks).save(root / part / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a zorp robot {i}"}))
        (root / part / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the recipe's keys for tiny judges."""
    from tiny_judges import tiny_clip, tiny_resnet

    clip = tiny_clip(tmp_path_factory.mktemp("clip"))
    return {"clip": str(clip), "subject_encoder": str(tiny_resnet(tmp_path_factory.mktemp("sub")))}


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep encoded pictures out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tree(
    pictures: Path, judges: dict[str, str], tiny_folder: Callable[..., Path], run_cache: None
) -> Callable[..., Tree]:
    """Return a maker of recipes; keyword sections are laid over it."""

    def make(**sections: dict[str, Any]) -> Tree:
        made: Tree = {
            "base": {"model": str(tiny_folder())},
            "data": {
                "source": str(pictures / "train"),
                "holdout": str(pictures / "held_out"),
                "trigger": "zorp",
                "class": "robot",
            },
            "adapter": {"kind": "lora", "rank": 2},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "sample_every": 2},
            "evaluate": {"steps": 2, "prompts": ["a {trigger} {class}, red"], "seeds": [1]},
        }
        made["evaluate"] |= judges
        for name, values in sections.items():
            made[name] = made[name] | values
        return made | {"name": "tiny"}  # type: ignore[dict-item]

    return make


@pytest.fixture(scope="session")
def run(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a finished run. Tests may not write in its folder."""
    import tunekit
    from tunekit.progress import Silent

    out = tmp_path_factory.mktemp("runs") / "whole"
    return tunekit.train(tree(), out=out, reporter=Silent())
