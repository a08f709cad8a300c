"""A family is one file: put there, every part of the house knows it; nothing else is touched."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL

import tunekit
from tunekit import families
from tunekit.errors import UserError
from tunekit.progress import Silent

TOYS = Path(__file__).parent / "toys"
NAME = "asymmetric"


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(TOYS)])
    yield
    sys.modules.pop(f"tunekit.families.{NAME}", None)
    families.__dict__.pop(NAME, None)


@pytest.fixture
def base(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Return the tiny Stable Diffusion with a VAE whose decoder is wider than its encoder."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder(), folder)
    shutil.rmtree(folder / "vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            down_block_out_channels=(8, 16, 16),
            up_block_types=("UpDecoderBlock2D",) * 3,
            up_block_out_channels=(16, 16, 32),
            norm_num_groups=4,
            sample_size=32,
        )
    vae.save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    named = {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    return folder


def test_without_the_file_nobody_knows_it(base: Path) -> None:
    assert NAME not in families.names()
    with pytest.raises(UserError, match=r"AsymmetricAutoencoderKL.*which tunekit cannot teach"):
        families.recognise(base)


def test_with_the_file_a_whole_run_teaches_it(
    added: None, base: Path, tree: Callable[..., dict[str, dict[str, object]]], tmp_path: Path
) -> None:
    assert NAME in families.names()
    recipe = tree(
        base={"model": str(base), "family": NAME},
        train={"steps": 2, "sample_every": 0},
        evaluate={"steps": 1},
    )
    run = tunekit.train(
        recipe | {"export": {"dtype": "fp32"}}, out=tmp_path / "run", reporter=Silent()
    )
    assert [file.layout for file in run.files] == ["diffusers", "kohya"]
    assert (run.folder / "report.html").is_file()
    picture = tunekit.load(run.folder).draw("a zorp robot", seed=1)
    assert picture.size == (32, 32)
