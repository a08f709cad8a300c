"""FLUX.1: its own facts and faults, beside what every family promises."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import tunekit
from tunekit import adapters, families, objective
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.inference import DrawSettings, Painter
from tunekit.progress import Silent
from tunekit.schema import Base
from tunekit.schema_objective import Objective

Folder = Callable[..., Path]
Load = Callable[..., Family]
Tree = Callable[..., dict[str, dict[str, Any]]]
PROMPT = "a zorp robot on the beach"
REAL = {"base_shift": 0.5, "max_shift": 1.15}


def refusal(folder: Path, **base: Any) -> str:
    with pytest.raises(UserError) as caught:
        families.load(Base(model=str(folder), **base))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestShift:
    @pytest.mark.parametrize("edge", [512, 768, 1024, 1536])
    def test_it_is_what_the_pipeline_draws_with(self, edge: int, load_tiny: Load) -> None:
        """Half the way of diffusers' own scheduler, by mu of diffusers' own pipeline."""
        family: Any = load_tiny("flux", **REAL)
        cells = (edge // 8) ** 2
        scheduler = family.pipeline().scheduler
        scheduler.set_timesteps(sigmas=np.array([1.0, 0.5]), mu=calculate_shift(cells // 4))
        shift = family.schedule.shifts(cells)
        assert float(scheduler.sigmas[1]) == pytest.approx(shift / (1 + shift), rel=1e-5)
        if edge == 1024:
            assert shift == pytest.approx(math.exp(1.15))

    def test_training_draws_larger_pictures_noisier(self, load_tiny: Load) -> None:
        family = load_tiny("flux", **REAL)

        def middle(cells: int, **settings: Any) -> float:
            goal = objective.Goal(Objective(**settings), family.schedule)
            drawn = goal.timesteps([cells] * 4000, torch.Generator().manual_seed(0))
            return float(drawn.float().median())

        # The median of what is drawn alike, shifted by s: 1000 s / (1 + s).
        for cells, shift in ((1024, math.exp(0.5)), (16384, math.exp(1.15))):
            wanted = 1000 * shift / (1 + shift)
            assert middle(cells, resolution_shift=True) == pytest.approx(wanted, abs=15)
            assert middle(cells) == pytest.approx(500, abs=15)

    def test_schnell_has_none(self, load_tiny: Load) -> None:
        family = load_tiny("flux", guided=False)
        with pytest.raises(UserError, match="resolution_shift: this base does not say"):
            objective.check(Objective(resolution_shift=True), family.schedule)


class TestGuidance:
    def test_it_is_trained_as_if_not_guided(self, load_tiny: Load) -> None:
        seen = []
        for guided in (True, False):
            family = load_tiny("flux", guided=guided)
            family.denoiser.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True
            )
            noisy = torch.randn(2, 16, 8, 8)
            words = family.encode_prompt([PROMPT, ""])
            assert family.predict(noisy, torch.tensor([3, 900]), words).shape == noisy.shape
        assert seen[0].tolist() == [1, 1]
        assert seen[1] is None

    def test_a_negative_prompt_is_refused(
        self, load_tiny: Load, tree: Tree, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        settings = DrawSettings(steps=1, negative_prompt="blurry")
        with pytest.raises(UserError, match=r"negative_prompt: .* would never see it"):
            Painter(load_tiny("flux")).draw(PROMPT, 1, settings)
        recipe = tree(
            base={"model": str(tiny_folder("flux"))}, evaluate={"negative_prompt": "blurry"}
        )
        with pytest.raises(UserError, match=r"negative_prompt: .* would never see it"):
            tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
        assert not (tmp_path / "run").exists()


def test_adapters_change_clip_and_not_t5(load_tiny: Load) -> None:
    settings = adapters.get("lora").Settings(kind="lora", text_encoder=True, targets="full")
    plan = settings.choose(load_tiny("flux"))  # type: ignore[attr-defined]
    assert list(plan) == ["denoiser", "text_encoder"]
    held = plan["denoiser"]
    assert {"transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.norm1.linear"} <= {*held}
    assert "single_transformer_blocks.1.proj_mlp" in held
    assert not {"proj_out", "x_embedder", "context_embedder", "norm_out.linear"} & {*held}


def test_names_of_modules(load_tiny: Load) -> None:
    family = load_tiny("flux")
    module = "single_transformer_blocks.0.proj_mlp"
    assert family.client_name("diffusers", "denoiser", module) == f"transformer.{module}"
    flat = "lora_transformer_single_transformer_blocks_0_proj_mlp"
    assert family.client_name("kohya", "denoiser", module) == flat
    inside = "encoder.layers.0.mlp.fc1"
    wanted = f"text_encoder.text_model.{inside}"
    assert family.client_name("diffusers", "text_encoder", inside) == wanted


@pytest.mark.parametrize(("guided", "wanted"), [(True, "flux-1-dev"), (False, "flux-1-schnell")])
def test_metadata_says_which_release(guided: bool, wanted: str, load_tiny: Load) -> None:
    family = load_tiny("flux", guided=guided)
    assert family.facts()["modelspec.architecture"] == "flux-1-topology-1x2"
    denoiser: Any = family.denoiser
    denoiser.register_to_config(num_layers=19, num_single_layers=38)
    assert family.facts()["modelspec.architecture"] == wanted


class TestRefusals:
    @pytest.fixture
    def folder(self, tiny_folder: Folder, tmp_path: Path) -> Path:
        shutil.copytree(tiny_folder("flux"), tmp_path / "base")
        return tmp_path / "base"

    def test_the_wrong_family(self, folder: Path, tiny_folder: Folder) -> None:
        assert f"base.family: sd3, but {folder} is flux: it holds FluxP" in refusal(
            folder, family="sd3"
        )
        assert "is sd3: it holds StableDiffusion3Pipeline" in refusal(
            tiny_folder("sd3"), family="flux"
        )

    @pytest.mark.parametrize(("channels", "kin"), [(384, "FLUX.1 Fill"), (128, "FLUX.1 Canny")])
    def test_relatives(self, channels: int, kin: str, folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": channels}))
        line = refusal(folder)
        assert f"is {kin}" in line
        assert "take the base that draws from words alone" in line

    def test_clip_skip_means_nothing(self, folder: Path) -> None:
        assert "base.clip_skip: means nothing to" in refusal(folder, clip_skip=1)
