"""Objectives, optimizers and averages in a run from recipe to file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from told import Told

import tunekit
from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.progress import Silent

Tree = dict[str, dict[str, Any]]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"objective": {"shift": 3.0}}}, r"train\.objective\.shift: moves the timesteps"),
        (
            {"train": {"objective": {"max_timestep": 5000}}},
            r"train\.objective\.max_timestep: 5000 is past the last timestep of this base, 999",
        ),
        (
            {"train": {"optimizer": "lion", "optimizer_args": {"fixeddecay": True}}},
            r'train\.optimizer_args\.fixeddecay: lion has no such .*did you mean "fixed_decay"',
        ),
        (
            {
                "train": {
                    "optimizer": "prodigy",
                    "learning_rate": 1.0,
                    "text_encoder_learning_rate": 0.5,
                },
                "adapter": {"text_encoder": True},
            },
            "prodigy finds one rate",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tree: Callable[..., Tree], tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        tunekit.train(tree(**sections), out=tmp_path / "run", reporter=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "draws"),
    [
        ({"ema": 0.9}, "ema"),
        ({"ema": 0.9, "ema_export": False}, "trained"),
        ({"optimizer": "schedulefree_adamw"}, "average"),
    ],
)
def test_a_run_exports_the_weights_it_was_asked_for(
    tree: Callable[..., Tree],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    train: dict[str, Any],
    draws: str,
) -> None:
    said = Told()
    recipe = tree(
        base={"model": str(tiny_folder(prediction_type="v_prediction"))},
        train=train | {"objective": {"zero_terminal_snr": True, "loss": "huber"}},
    )
    run = tunekit.train(recipe, out=tmp_path / "run", reporter=said)
    assert any("rescale_betas_zero_snr" in note for note in said.notes)
    saved = checkpoint.read(checkpoint.steps(run.folder / "checkpoints")[-1]).tensors
    drawn = saved["adapter"]
    ends = next(name for name in drawn if "lora_B" in name or "up" in name)
    if draws == "trained":
        assert "trained" not in saved
        assert not torch.equal(drawn[ends], saved["ema"][ends])
    else:
        assert not torch.equal(drawn[ends], saved["trained"][ends])
    if draws == "ema":
        assert torch.equal(drawn[ends], saved["ema"][ends])
    written = [
        checkpoint.read_safetensors(path)[0]
        for path in sorted((run.folder / "export").glob("*.safetensors"))
    ]
    assert any(
        tensor.shape == drawn[ends].shape
        and torch.allclose(tensor.float(), drawn[ends], atol=1e-3, rtol=1e-3)
        for tensor in written[0].values()
    )
