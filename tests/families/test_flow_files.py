"""A transformer's base as one file: as good as the folder it was made from, or refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm
import pytest
import torch
from safetensors.torch import load_file, save_file

from tunekit import families, modelfolder
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.inference import DrawSettings, Painter
from tunekit.schema import Base

Folder = Callable[..., Path]
NAMES = ["sd3", "flux"]
PROMPT = "a zorp robot on the beach"


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tiny_folder: Folder) -> Path:
    return tiny_folder(request.param)


@pytest.fixture
def configs(folder: Path, tmp_path: Path) -> Path:
    """Return the folder without its weights."""
    bare = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(folder, tmp_path / "configs", ignore=bare)


def load(path: Path, configs: Path, **settings: Any) -> Family:
    return families.load(Base(model=str(path), config=str(configs), **settings))


def refusal(path: Path, configs: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path, configs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_weight_is_the_folder_s(
    dtype: Any, folder: Path, configs: Path, tmp_path: Path
) -> None:
    path = ldm.single_file_flow(folder, tmp_path / "one.safetensors")
    ours, theirs = (
        load(path, configs, dtype=dtype),
        families.load(Base(model=str(folder), dtype=dtype)),
    )
    for name, wanted in theirs.components().items():
        found = ours.components()[name]
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for key, tensor in wanted.state_dict().items():
            assert found.state_dict()[key].equal(tensor), key
            assert found.state_dict()[key].dtype == tensor.dtype, key
        kept = dict(found.named_buffers())
        assert all(kept[key].equal(held) for key, held in wanted.named_buffers())
    if dtype == "fp32":
        settings = DrawSettings(steps=2, guidance_scale=2.0)
        pictures = [Painter(one).draw(PROMPT, 1, settings) for one in (ours, theirs)]
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert ours.facts() == theirs.facts()


def test_what_a_transformer_alone_lacks_is_read_from_the_folder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = ldm.single_file_flow(folder, tmp_path / "alone.safetensors", alone=True)
    # so that it can be told whose transformer it is
    changed(path, lambda t: t.update({k: v + 1 for k, v in t.items() if k.endswith("linear.bias")}))
    modelfolder.say.cache_clear()
    with caplog.at_level(logging.WARNING, "tunekit"):
        ours = load(path, folder)
    assert f"holds no vae; that of {folder} is taken" in caplog.text
    assert f"holds no text_encoder_2; that of {folder} is taken" in caplog.text
    theirs = families.load(Base(model=str(folder)))
    off = (
        ours.denoiser.state_dict()["proj_out.bias"] - theirs.denoiser.state_dict()["proj_out.bias"]
    )
    torch.testing.assert_close(off, torch.ones_like(off))
    words = [family.encode_prompt([PROMPT]) for family in (ours, theirs)]
    assert all(words[0][key].equal(tensor) for key, tensor in words[1].items())


def test_what_neither_has_is_asked_for(folder: Path, configs: Path, tmp_path: Path) -> None:
    path = ldm.single_file_flow(folder, tmp_path / "alone.safetensors", alone=True)
    line = refusal(path, configs)
    assert f"{path}: " in line
    assert "vae" in line or "text_encoder" in line
    assert "name a diffusers folder that has its weights as base.config" in line


class TestDoNotBelongTogether:
    @pytest.fixture
    def path(self, folder: Path, tmp_path: Path) -> Path:
        return ldm.single_file_flow(folder, tmp_path / "one.safetensors")

    def test_a_weight_is_missing(self, path: Path, configs: Path) -> None:
        name = "model.diffusion_model.final_layer.linear.weight"
        line = refusal(changed(path, lambda tensors: tensors.pop(name)), configs)
        assert "lacks 1 of the weights" in line
        assert "final_layer.linear.weight" in line

    def test_a_weight_too_many(self, path: Path, configs: Path) -> None:
        name = "text_encoders.clip_l.transformer.text_model.encoder.layers.9.mlp.fc1.bias"
        line = refusal(
            changed(path, lambda tensors: tensors.update({name: torch.ones(2)})), configs
        )
        assert "has no place for 1 of its weights" in line
        assert "layers.9" in line

    def test_a_weight_of_another_shape(self, path: Path, configs: Path) -> None:
        name = "model.diffusion_model.final_layer.linear.weight"
        line = refusal(changed(path, lambda t: t.update({name: torch.ones(3, 5)})), configs)
        assert "final_layer.linear.weight is [3, 5]; is base.config that of this model?" in line
        assert "damaged" not in line

    def test_weights_that_are_scaled_to_8_bits(self, path: Path, configs: Path) -> None:
        name = "model.diffusion_model.final_layer.linear.scale_weight"
        line = refusal(changed(path, lambda t: t.update({name: torch.ones(())})), configs)
        assert f"its weights are scaled to 8 bits ({name})" in line

    def test_plain_8_bits_are_read(self, path: Path, configs: Path) -> None:
        name = "model.diffusion_model.final_layer.linear.weight"
        kept: dict[str, torch.Tensor] = {}

        def narrow(tensors: dict[str, Any]) -> None:
            kept["it"] = tensors[name] = tensors[name].to(torch.float8_e4m3fn)

        family = load(changed(path, narrow), configs)
        assert family.denoiser.state_dict()["proj_out.weight"].equal(kept["it"].float())

    def test_what_files_hold_beside_is_passed_over(self, path: Path, configs: Path) -> None:
        top = "text_encoders.clip_l."
        more = {f"{top}logit_scale": torch.ones(())}
        more[f"{top}transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
        assert load(changed(path, lambda tensors: tensors.update(more)), configs).text_encoders
