"""A base as files: what is taken, and the one line each wrong or hostile folder is refused with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Canary
from safetensors.torch import load_file, save_file

from tunekit import families
from tunekit.errors import UserError
from tunekit.schema import Base

Folder = Callable[..., Path]


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def refusal(model: Path | str, **settings: Any) -> str:
    """Return the one line that loading this base is refused with."""
    with pytest.raises(UserError) as caught:
        families.load(Base(model=str(model), **settings))
    line = str(caught.value)
    assert "\n" not in line
    assert str(model) in line
    return line


def rewrite_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class TestRefusals:
    @pytest.fixture
    def folder(self, tiny_folder: Folder, tmp_path: Path) -> Path:
        return copy(tiny_folder("sd"), tmp_path / "base")

    def test_another_model_is_named_with_what_is_needed(self, folder: Path) -> None:
        rewrite_index(
            folder,
            _class_name="StableDiffusionXLPipeline",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        )
        line = refusal(folder)
        assert "StableDiffusionXLPipeline" in line
        assert "text_encoder_2 CLIPTextModelWithProjection" in line
        assert "for Stable Diffusion 1.x / 2.x: unet UNet2DConditionModel" in line

    def test_an_inpainting_base_is_told_from_its_input_channels(self, folder: Path) -> None:
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
        assert "with 9 input channels" in refusal(folder)

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "picture.png").touch()
        assert "no model_index.json, only picture.png" in refusal(tmp_path)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        assert "there is no folder" in refusal(tmp_path / "none")
        assert 'did you mean "toybox"' in refusal("toybx")

    def test_a_wrong_family_name(self, folder: Path) -> None:
        with pytest.raises(UserError, match='there is no family "sdx"'):
            families.load(Base(model=str(folder), family="sdx"))

    def test_a_broken_index(self, folder: Path) -> None:
        (folder / "model_index.json").write_text("{")
        assert "cannot be read as JSON" in refusal(folder)

    def test_a_component_whose_name_leads_elsewhere(self, folder: Path) -> None:
        rewrite_index(folder, **{"tokenizer/../../other": ["transformers", "CLIPTokenizer"]})
        assert "'tokenizer/../../other', which is no name of a component" in refusal(folder)

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
            folder / "unet" / "diffusion_pytorch_model.bin"
        )
        line = refusal(folder)
        assert "unet/diffusion_pytorch_model.bin is a pickle" in line

    def test_a_pickle_beside_safetensors_is_not_touched(self, folder: Path) -> None:
        canary = folder / "canary"
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            torch.save(Canary(canary), folder / "unet" / name)
        families.load(Base(model=str(folder)))
        assert not canary.exists()

    def test_a_pickle_renamed_safetensors(self, folder: Path) -> None:
        canary = folder / "canary"
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(Canary(canary), path)
        assert f"{path}: is a pickle" in refusal(folder)
        assert not canary.exists()

    def test_code_in_the_folder(self, folder: Path) -> None:
        (folder / "unet" / "my_unet.py").write_text("raise SystemExit")
        line = refusal(folder)
        assert "carries code (unet/my_unet.py)" in line
        assert "base.trust_remote_code" in line
        families.load(Base(model=str(folder), trust_remote_code=True))

    def test_missing_parts(self, folder: Path) -> None:
        shutil.rmtree(folder / "tokenizer")
        assert "has no folder tokenizer" in refusal(folder)

    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
    def test_weights_that_are_missing_are_not_made_up(
        self, folder: Path, component: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = next((folder / component).glob("*.safetensors"))
        tensors = load_file(path)
        gone = sorted(tensors)[0]
        del tensors[gone]
        save_file(tensors, path, {"format": "pt"})
        line = refusal(folder)
        assert "1 weights are missing" in line
        assert component in line

    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
    def test_weights_without_a_place_are_not_dropped(self, folder: Path, component: str) -> None:
        path = next((folder / component).glob("*.safetensors"))
        tensors = load_file(path)
        tensors["down_blocks.9.conv.weight"] = torch.zeros(2)
        save_file(tensors, path, {"format": "pt"})
        line = refusal(folder)
        assert "no place for 1 of the weights, such as down_blocks.9.conv.weight" in line
        assert component in line

    def test_a_table_of_positions_is_no_weight(self, folder: Path) -> None:
        """What older transformers saved among the weights of every Stable Diffusion."""
        path = next((folder / "text_encoder").glob("*.safetensors"))
        tensors = load_file(path)
        tensors["text_model.embeddings.position_ids"] = torch.arange(4)
        save_file(tensors, path, {"format": "pt"})
        families.load(Base(model=str(folder)))

    def test_a_truncated_file(self, folder: Path) -> None:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        assert "cannot be loaded" in refusal(folder)

    def test_a_variant_that_is_not_there(self, folder: Path) -> None:
        line = refusal(folder, variant="fp16")
        assert "base.variant" in line
        assert "diffusion_pytorch_model.safetensors" in line

    def test_a_variant_that_is_there(self, folder: Path) -> None:
        for path in folder.rglob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        families.load(Base(model=str(folder), variant="fp16"))
        assert "base.variant" in refusal(folder)

    def test_a_broken_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
        assert "tokenizer: cannot be loaded" in refusal(folder)

    @pytest.mark.parametrize("name", ["DiffusionPipeline", "NoSuchScheduler", "os"])
    def test_a_scheduler_that_is_none(self, folder: Path, name: str) -> None:
        rewrite_index(folder, scheduler=["diffusers", name])
        assert "names no scheduler of diffusers" in refusal(folder)

    def test_a_missing_scheduler_config(self, folder: Path) -> None:
        (folder / "scheduler" / "scheduler_config.json").unlink()
        assert "scheduler: cannot be loaded" in refusal(folder)

    def test_a_scheduler_whose_package_is_missing(
        self, folder: Path, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers.utils import dummy_torch_and_torchsde_objects as without_torchsde

        name = "DPMSolverSDEScheduler"
        monkeypatch.setattr(f"diffusers.{name}", getattr(without_torchsde, name))
        rewrite_index(folder, scheduler=["diffusers", name])
        line = refusal(folder)
        assert "scheduler: cannot be loaded" in line
        assert "torchsde" in line
        family = families.load(Base(model=str(tiny_folder("sd"))))
        with pytest.raises(UserError, match=f"scheduler: {name}: cannot .*torchsde") as caught:
            family.pipeline(name)
        assert "\n" not in str(caught.value)

    def test_an_unknown_beta_schedule(self, folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "wavy"}))
        assert "wavy" in refusal(folder)

    def test_an_incomplete_vae_config(self, folder: Path) -> None:
        path = folder / "vae" / "config.json"
        config = json.loads(path.read_text())
        del config["block_out_channels"]
        path.write_text(json.dumps(config))
        assert "vae: cannot be loaded" in refusal(folder)

    def test_a_prediction_type_that_cannot_be_trained(self, folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | {"prediction_type": "flow_prediction"}
        path.write_text(json.dumps(config))
        assert "prediction_type flow_prediction" in refusal(folder)

    @pytest.mark.parametrize(
        "betas", [{"beta_start": -0.01}, {"beta_end": -0.02}, {"trained_betas": [[0.1], [0.2]]}]
    )
    def test_betas_of_which_no_schedule_comes(self, folder: Path, betas: dict[str, Any]) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | {"beta_schedule": "linear"}
        path.write_text(json.dumps(config | betas))
        assert "says betas of which no schedule comes" in refusal(folder)

    @pytest.mark.parametrize("channels", [[], {}, "4", None])
    def test_input_channels_that_are_no_number(self, folder: Path, channels: Any) -> None:
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": channels}))
        assert "which tunekit cannot teach" in refusal(folder)


class TestHub:
    def test_an_id_is_found_in_the_local_cache(
        self, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repo = tmp_path / "models--someone--tiny"
        copy(tiny_folder("sd"), repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
        family = families.load(Base(model="someone/tiny"))
        assert family.label == "someone/tiny"
        with pytest.raises(UserError, match="cannot be reached"):
            families.load(Base(model="someone/tiny", revision="other"))

    @pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {}])
    def test_an_unreachable_hub_is_one_line(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        """Once with nobody listening, once offline by setting, in a process of its own."""
        code = (
            "from tunekit import families; from tunekit.schema import Base\n"
            "try: families.load(Base(model='someone/nothing'))\n"
            "except ValueError as error: print(error)"
        )
        offline = {} if environment else {"HF_HUB_OFFLINE": "1"}
        kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=kept | environment | offline | {"HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        line = done.stdout.strip()
        assert "\n" not in line
        assert "someone/nothing" in line
        assert "the Hugging Face Hub cannot be reached" in line
