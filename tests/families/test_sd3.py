"""Stable Diffusion 3: its own facts and faults, beside what every family promises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tunekit
from tunekit import adapters, families, words
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.inference import DrawSettings, Painter
from tunekit.progress import Silent
from tunekit.schema import Base

Folder = Callable[..., Path]
Load = Callable[..., Family]
Tree = Callable[..., dict[str, dict[str, Any]]]
PROMPT = "a zorp robot on the beach"


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, **base: Any) -> str:
    with pytest.raises(UserError) as caught:
        families.load(Base(model=str(folder), **base))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_scheduler_s_shift_is_in_the_levels(load_tiny: Load) -> None:
    """Half the way is three quarters noise at shift 3, and the ends stay where they are."""
    shifted, plain = load_tiny("sd3").schedule, load_tiny("sd3", shift=1.0).schedule
    assert float(plain.sigma[499]) == pytest.approx(0.5)
    assert float(shifted.sigma[499]) == pytest.approx(0.75)
    assert float(shifted.sigma[999]) == float(plain.sigma[999]) == 1
    assert 0 < float(plain.sigma[0]) < float(shifted.sigma[0]) < 0.01


def test_without_t5_zeros_stand_in_its_place(load_tiny: Load) -> None:
    whole, bare = load_tiny("sd3"), load_tiny("sd3", t5=False)
    assert list(bare.text_encoders) == ["text_encoder", "text_encoder_2"]
    states = bare.encode_prompt([PROMPT])["encoder_hidden_states"]
    assert states.shape == whole.encode_prompt([PROMPT])["encoder_hidden_states"].shape
    assert not states[:, 16:].any()
    assert states[:, :16].any()
    # CLIP alone reads 16 tokens here, so that more is cut.
    long = "a zorp robot on the beach wearing a hat, watercolour style, in a green forest at night"
    assert bare.cut_words(long)
    assert not whole.cut_words(long)


def test_adapters_change_both_clips_and_not_t5(load_tiny: Load) -> None:
    settings = adapters.get("lora").Settings(kind="lora", text_encoder=True, targets="full")
    plan = settings.choose(load_tiny("sd3"))  # type: ignore[attr-defined]
    assert list(plan) == ["denoiser", "text_encoder", "text_encoder_2"]
    # The second and last block drops the words, so that they ask nothing there.
    assert "transformer_blocks.0.attn.add_q_proj" in plan["denoiser"]
    assert "transformer_blocks.1.attn.add_q_proj" not in plan["denoiser"]
    assert "transformer_blocks.1.attn.add_k_proj" in plan["denoiser"]


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_run_writes_what_sd_scripts_reads(
    kind: str, tree: Tree, tiny_folder: Folder, tmp_path: Path
) -> None:
    recipe = tree(
        base={"model": str(tiny_folder("sd3"))},
        adapter={"kind": kind},
        train={"steps": 1, "sample_every": 0},
        evaluate={"steps": 1},
    )
    recipe["export"] = {"dtype": "fp32", "layouts": ["kohya"]}
    run = tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    (file,) = run.files
    names = {key.partition(".")[0] for key in load_file(file.path)}
    if kind == "lora":
        assert "lora_unet_joint_blocks_1_context_block_attn_qkv" in names
        assert all(name.startswith("lora_unet_joint_blocks_") for name in names)
    else:  # which cannot be joined, and goes by the names that ComfyUI reads
        assert "lora_transformer_transformer_blocks_0_attn_to_q" in names
    assert tunekit.load(run.folder).draw("a zorp robot", seed=1).size == (32, 32)


def test_a_word_beside_an_adapter(
    tree: Tree, tiny_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    """Learned in both CLIPs; what is drawn with the files is what was drawn in training."""
    recipe = tree(
        base={"model": str(tiny_folder("sd3"))},
        train={"steps": 2, "sample_every": 2, "learning_rate": 0.01},
    )
    recipe["tokens"] = [{"name": "<zorp>", "vectors": 2, "init": "robot", "learning_rate": 0.1}]  # type: ignore[assignment]
    for part in ("train", "held_out"):  # without captions, so that they are called by the word
        (tmp_path / part).mkdir()
        for picture in (pictures / part).glob("*.png"):
            shutil.copy(picture, tmp_path / part)
    recipe["data"] |= {"source": str(tmp_path / "train"), "holdout": str(tmp_path / "held_out")}
    recipe["data"]["trigger"] = "<zorp>"
    recipe["export"] = {"dtype": "fp32"}
    run = tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    layouts = {file.layout: file for file in run.files}
    assert {*layouts} == {"diffusers", "kohya", "words", "bundle"}
    word = load_file(layouts["words"].path)
    assert {key: tensor.shape for key, tensor in word.items()} == {
        "clip_l": (2, 24),
        "clip_g": (2, 32),
    }
    assert not layouts["words"].diffusers
    card = (run.folder / "export" / "README.md").read_text()
    assert "diffusers has no loader for new words of this base" in card
    assert "load_lora_weights" not in card
    (sample,) = (run.folder / "samples").glob("step-000002_*.png")
    (drawn,) = (run.folder / "samples").glob("taught_*red*.png")
    with Image.open(sample) as one, Image.open(drawn) as other:
        pixels = [np.asarray(picture, dtype=int) for picture in (one, other)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_t5_reads_a_word_as_it_is_written(load_tiny: Load) -> None:
    family: Any = load_tiny("sd3")
    for encoder, tokenizer in family.tokenizers.items():
        words.add(tokenizer, {"<zorp>": 2})
        family.text_encoders[encoder].resize_token_embeddings(len(tokenizer))
    seen = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        family.text_encoders[name].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or [kwargs["input_ids"]])[0]),
            with_kwargs=True,
        )
    with torch.no_grad():
        ours = family.encode_prompt(["a <ZORP> robot"])
    trained, seen[:] = list(seen), []
    asked = family.drawing("a <ZORP> robot", "", 1.0)
    asked.pop("guidance_scale")
    states, _, pooled, _ = family.pipeline().encode_prompt(
        **{"prompt_2": None, "prompt_3": None} | asked, device="cpu"
    )
    assert all(one.equal(other) for one, other in zip(trained, seen[:3], strict=True))
    torch.testing.assert_close(ours["encoder_hidden_states"], states, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["pooled_projections"], pooled, atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):
        family.use_tokenizer("text_encoder_3", None)


def test_larger_pictures_than_it_has_places_for_are_refused(load_tiny: Load) -> None:
    family = load_tiny("sd3")
    with pytest.raises(UserError, match=r"data\.resolution: .* up to 48 pixels an edge"):
        family.encode_image(torch.zeros(1, 3, 32, 64))
    with pytest.raises(UserError, match="width: 64 is not a multiple of 16 in 16 to 48"):
        Painter(family).draw(PROMPT, 1, DrawSettings(steps=1, width=64))


class TestNames:
    def test_of_modules(self, load_tiny: Load) -> None:
        family = load_tiny("sd3")
        for component, module, wanted in (
            ("denoiser", "transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn"),
            ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.enc"),
            ("text_encoder", "encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers"),
            ("text_encoder_3", "encoder.block.0.layer.0", "text_encoder_3.encoder.block.0.layer.0"),
        ):
            assert family.client_name("diffusers", component, module).startswith(wanted)
        name = "transformer_blocks.0.attn.to_out.0"
        flat = "lora_transformer_transformer_blocks_0_attn_to_out_0"
        assert family.client_name("kohya", "denoiser", name) == flat
        assert family.client_name("kohya", "text_encoder_2", "text_projection") == (
            "lora_te2_text_projection"
        )
        with pytest.raises(UserError, match="koya"):
            family.client_name("koya", "denoiser", name)

    @pytest.mark.parametrize(
        ("layers", "twice", "wanted"),
        [
            (24, (), "stable-diffusion-v3-medium"),
            (24, tuple(range(13)), "stable-diffusion-v3.5-medium"),
            (38, (), "stable-diffusion-v3.5-large"),
        ],
    )
    def test_metadata_says_which_release(
        self, layers: int, twice: tuple[int, ...], wanted: str, load_tiny: Load
    ) -> None:
        family = load_tiny("sd3")
        assert "topology-2x96" in family.facts()["modelspec.architecture"]
        denoiser: Any = family.denoiser
        denoiser.register_to_config(
            num_layers=layers,
            num_attention_heads=layers,
            attention_head_dim=64,
            dual_attention_layers=twice,
        )
        assert family.facts()["modelspec.architecture"] == wanted


class TestRefusals:
    @pytest.fixture
    def folder(self, tiny_folder: Folder, tmp_path: Path) -> Path:
        return copy(tiny_folder("sd3"), tmp_path / "base")

    def test_the_wrong_family(self, folder: Path, tiny_folder: Folder) -> None:
        line = refusal(folder, family="sdxl")
        assert f"base.family: sdxl, but {folder} is sd3: it holds StableDiffusion3Pip" in line
        assert "is sd: it holds StableDiffusionPipeline" in refusal(tiny_folder(), family="sd3")

    def test_a_base_that_is_given_more_than_noisy_latents(self, folder: Path) -> None:
        rewrite(folder / "transformer" / "config.json", in_channels=33)
        assert "SD3Transformer2DModel with 33 input channels" in refusal(folder)

    def test_a_scheduler_that_knows_no_flow(self, folder: Path, tiny_folder: Folder) -> None:
        shutil.rmtree(folder / "scheduler")
        shutil.copytree(tiny_folder() / "scheduler", folder / "scheduler")
        rewrite(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
        assert "is DDIMScheduler, which does not say the noise levels of a flow" in refusal(folder)

    @pytest.mark.parametrize(
        ("setting", "said"), [({"shift": 0.0}, "above 0"), ({"invert_sigmas": True}, "backwards")]
    )
    def test_levels_of_another_kind(self, setting: dict[str, Any], said: str, folder: Path) -> None:
        rewrite(folder / "scheduler" / "scheduler_config.json", **setting)
        assert said in refusal(folder)

    def test_keys_for_diffusion(self, folder: Path) -> None:
        assert "base.prediction: means nothing to" in refusal(folder, prediction="epsilon")
        assert "base.zero_terminal_snr: means" in refusal(folder, zero_terminal_snr=True)
