"""What is Stable Diffusion XL's own: two text encoders, sizes and crops, ldm's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunekit import families, modelfolder
from tunekit.data import Cache, EncodedDataset, preflight
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.schema import Base, Data

Folder = Callable[..., Path]
Load = Callable[..., Family]
PROMPT = "a zorp robot on the beach"
# What Stability's own configuration says, as far as shapes and names go.
REAL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def always(batch: Any) -> Callable[[int, int], Any]:
    return lambda step, micro: batch


@pytest.fixture
def real(tiny_folder: Folder, tmp_path: Path) -> Family:
    """Return a family around SDXL in its real size, without weights."""
    folder = copy(tiny_folder("sdxl"), tmp_path / "real")
    path = folder / "unet" / "config.json"
    own = json.loads(path.read_text())
    own["norm_num_groups"] = 32
    path.write_text(json.dumps(own | REAL_UNET))
    return families.load(Base(model=str(folder)), "meta")


class TestConditioning:
    @pytest.mark.parametrize("skip", [None, 1])
    @pytest.mark.parametrize("prompt", [PROMPT, ""])
    def test_prompts_are_read_as_by_the_pipeline(
        self, prompt: str, skip: int | None, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        folder = copy(tiny_folder("sdxl"), tmp_path / "deep")
        if skip:  # two layers leave nothing before the last but one
            import tiny

            shutil.rmtree(folder)
            tiny.tiny_sdxl(folder, layers=3)
        family = families.load(Base(model=str(folder), clip_skip=skip))
        wanted, _, pooled, _ = family.pipeline().encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False, clip_skip=skip
        )
        ours = family.encode_prompt([prompt])
        torch.testing.assert_close(ours["encoder_hidden_states"], wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours["text_embeds"], pooled, atol=1e-6, rtol=0)
        assert ("ss_clip_skip" in family.facts()) == (skip is not None)
        drawn = family.drawing(prompt, "", 3.0)
        assert drawn.get("clip_skip") == skip
        if skip:
            assert family.facts()["ss_clip_skip"] == "3"

    def test_sizes_and_crops_are_told_as_the_pipeline_tells_them(self, load_tiny: Load) -> None:
        family = load_tiny("sdxl")
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            told = kwargs["added_cond_kwargs"]["time_ids"]
            seen.append((args[0].clone(), args[1].clone(), told.clone(), output[0].clone()))

        handle = family.denoiser.register_forward_hook(hook, with_kwargs=True)
        family.pipeline()(
            PROMPT,
            num_inference_steps=2,
            guidance_scale=1.0,
            original_size=(500, 700),
            crops_coords_top_left=(3, 40),
            target_size=(32, 40),
            height=32,
            width=40,
            output_type="latent",
        )
        handle.remove()
        sizes = torch.tensor([[500, 700, 3, 40, 32, 40]])
        words = family.encode_prompt([PROMPT])
        told = family.with_sizes(words, sizes)
        for noisy, timestep, ids, prediction in seen:
            assert ids.tolist() == sizes.tolist()
            ours = family.predict(noisy, timestep.long().expand(1), told)
            torch.testing.assert_close(ours, prediction, atol=1e-5, rtol=0)
            untold = family.predict(noisy, timestep.long().expand(1), words)
            assert not torch.allclose(untold, prediction, atol=1e-4)
            whole = family.with_sizes(words, torch.tensor([[32, 40, 0, 0, 32, 40]]))
            again = family.predict(noisy, timestep.long().expand(1), whole)
            assert torch.equal(again, untold)

    @pytest.mark.parametrize("captions", ["cached", "read in every step"])
    def test_a_batch_carries_the_real_crop_of_each_picture(
        self, captions: str, load_tiny: Load, tmp_path: Path
    ) -> None:
        """A picture of 120 x 50, scaled to 32 pixels of height, of which 32 are seen."""
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        Image.new("RGB", (120, 50), "red").save(pictures / "wide.png")
        Image.new("RGB", (40, 90), "blue").save(pictures / "tall.png")
        section = Data.model_validate(
            {
                "source": str(pictures),
                "trigger": "zorp",
                "class": "robot",
                "resolution": 32,
                "flip": True,
                "crop": "random",
            }
        )
        family = load_tiny("sdxl")
        encoded = EncodedDataset.encode(
            preflight(section, multiple=8).examples,
            section,
            resolution=32,
            seed=0,
            encode_image=family.encode_image,
            image_fingerprint="vae",
            encode_prompt=family.encode_prompt if captions == "cached" else None,
            text_fingerprint="words",
            batch_size=2,
            batches=8,
            cache=Cache(tmp_path / "cache"),
        )
        crops = set()
        for step in range(8):
            batch = encoded.batch(step, 0, 2)
            assert batch.sizes is not None
            for name, row in zip(batch.names, batch.sizes.tolist(), strict=True):
                crops.add((name, *row[2:4]))
                assert row[4:] == [32, 32]
                if name == "wide.png":
                    assert row[:2] == [50, 120]
                    assert row[2] == 0
                    assert 0 <= row[3] <= round(120 * 32 / 50) - 32
                else:
                    assert row[:2] == [90, 40]
                    assert row[3] == 0
                    assert 0 <= row[2] <= round(90 * 32 / 40) - 32
        assert len({crop for crop in crops if crop[0] == "wide.png"}) > 4  # mirrored ones differ
        told = family.with_sizes(batch.conditioning, batch.sizes)
        assert set(told) >= {"time_ids"}

    def test_the_loop_tells_the_denoiser(self, load_tiny: Load) -> None:
        from tunekit import adapters
        from tunekit.data.dataset import Batch
        from tunekit.schema import Train
        from tunekit.train import train

        family = load_tiny("sdxl")
        seen = []
        hook = family.denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()),
            with_kwargs=True,
        )
        sizes = torch.tensor([[100, 200, 3, 4, 32, 32]])
        for text in (False, True):
            settings = adapters.get("lora").Settings(kind="lora", text_encoder=text)
            adapter = adapters.get("lora").attach(family, settings, 0)
            words = {} if text else family.encode_prompt([PROMPT])
            latents = torch.zeros(1, 4, 8, 8)
            batch = Batch(latents, words, ("one.png",), (PROMPT,), sizes=sizes)
            encode = family.encode_prompt if text else None
            assert (
                len(list(train(family, adapter, always(batch), Train(steps=1), encode=encode))) == 1
            )
            adapter.detach()
        hook.remove()
        assert seen == [sizes.tolist()] * 2


def test_presets_leave_out_layers_that_nobody_reads(tiny_folder: Folder) -> None:
    """The last layer of the first text encoder, and of both what clip_skip takes away."""
    from tunekit import adapters

    settings = adapters.get("lora").Settings(kind="lora", text_encoder=True)

    def layers(model: Path, encoder: str, **base: Any) -> set[str]:
        family = families.load(Base(model=str(model), **base))
        chosen = settings.choose(family)[encoder]  # type: ignore[attr-defined]
        return {name.partition("layers.")[2].partition(".")[0] for name in chosen}

    assert layers(tiny_folder("sdxl"), "text_encoder") == {"0"}
    assert layers(tiny_folder("sdxl"), "text_encoder_2") == {"0", "1"}
    assert layers(tiny_folder("sd"), "text_encoder") == {"0", "1"}
    assert layers(tiny_folder("sd"), "text_encoder", clip_skip=1) == {"0"}


def test_an_autoencoder_with_a_middle_and_spread_of_each_channel(load_tiny: Load) -> None:
    """What the pipeline decodes, encoded as for training, is what it had drawn."""
    family = load_tiny("sdxl")
    vae: Any = family.vae
    plain = family.encode_image(torch.zeros(1, 3, 32, 32))
    vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[0.5, 2.0, 1.0, 3.0])
    decoded: list[torch.Tensor] = []
    decode = vae.decode
    vae.decode = lambda latents, **rest: decoded.append(latents) or decode(latents, **rest)
    pipeline = family.pipeline()
    how = {"num_inference_steps": 1, "height": 32, "width": 32, "guidance_scale": 1.0}
    how["generator"] = torch.Generator().manual_seed(0)
    drawn: list[torch.Tensor] = []
    pipeline(
        PROMPT,
        **how,
        callback_on_step_end=lambda *told: drawn.append(told[3]["latents"].clone()) or {},
    )
    torch.testing.assert_close(family.scaled(decoded[0]), drawn[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(family.encode_image(torch.zeros(1, 3, 32, 32)), plain)


class TestNames:
    def test_kohya_s_are_those_of_ldm(self, real: Family) -> None:
        """As sd-scripts and ComfyUI look for them."""
        for module, wanted in {
            "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
            "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
            "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
            "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": "input_blocks_8_1_"
            "transformer_blocks_9_attn2_to_out_0",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_"
            "transformer_blocks_0_ff_net_0_proj",
            "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
            "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q": "output_blocks_2_1_"
            "transformer_blocks_0_attn1_to_q",
            "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
            "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
            "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
            "time_embedding.linear_2": "time_embed_2",
            "add_embedding.linear_1": "label_emb_0_0",
            "conv_in": "input_blocks_0_0",
            "conv_out": "out_2",
        }.items():
            assert real.denoiser.get_submodule(module) is not None
            assert real.client_name("kohya", "denoiser", module) == f"lora_unet_{wanted}"

    def test_no_two_modules_share_one(self, real: Family) -> None:
        from torch import nn

        kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
        modules = [n for n, m in real.denoiser.named_modules() if isinstance(m, kinds)]
        names = {real.client_name("kohya", "denoiser", module) for module in modules}
        assert len(names) == len(modules) > 700
        assert not any("down_blocks" in name or "up_blocks" in name for name in names)

    def test_of_text_encoders(self, real: Family) -> None:
        module = "encoder.layers.0.self_attn.q_proj"
        kohya = "text_model_encoder_layers_0_self_attn_q_proj"
        for encoder, short in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
            for inside in (module, f"text_model.{module}"):
                assert real.client_name("kohya", encoder, inside) == f"lora_{short}_{kohya}"
                wanted = f"{encoder}.text_model.{module}"
                assert real.client_name("diffusers", encoder, inside) == wanted
        projection = real.client_name("diffusers", "text_encoder_2", "text_projection")
        assert projection == "text_encoder_2.text_projection"
        with pytest.raises(UserError, match="koya"):
            real.client_name("koya", "denoiser", "conv_in")

    def test_metadata_says_which_base(self, real: Family, load_tiny: Load) -> None:
        facts = real.facts()
        assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        assert facts["ss_base_model_version"].startswith("sdxl_")
        assert facts["ss_v2"] == "False"
        tiny = load_tiny("sdxl", prediction_type="v_prediction").facts()
        assert tiny["modelspec.prediction_type"] == "v"
        assert tiny["modelspec.architecture"] != facts["modelspec.architecture"]


class TestSingleFile:
    def test_it_is_as_good_as_the_folder(self, tiny_folder: Folder, tmp_path: Path) -> None:
        folder = tiny_folder("sdxl")
        path = ldm.single_file_xl(folder, tmp_path / "xl.safetensors")
        configs = tmp_path / "configs"
        shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
        ours = families.load(Base(model=str(path), config=str(configs)))
        theirs = families.load(Base(model=str(folder)))
        for name, module in theirs.components().items():
            mine = ours.components()[name].state_dict()
            assert all(torch.equal(mine[key], value) for key, value in module.state_dict().items())
        for one, other in zip(
            ours.encode_prompt([PROMPT]).values(),
            theirs.encode_prompt([PROMPT]).values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        for part, tensor in {
            "text_encoder_2": "conditioner.embedders.1.model.text_projection",
            "unet": "model.diffusion_model.label_emb.0.2.bias",
        }.items():
            tensors = load_file(path)
            del tensors[tensor]
            broken = tmp_path / f"{part}.safetensors"
            save_file(tensors, broken)
            with pytest.raises(UserError, match=f"weights of its {part} are missing|its {part} ca"):
                families.load(Base(model=str(broken), config=str(configs)))

    def test_without_a_configuration_it_is_taken_for_stability_s_own(
        self, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        deep = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
        path = ldm.single_file_xl(tiny_folder("sdxl"), tmp_path / "xl.safetensors", (deep,))
        with pytest.raises(UserError, match="tokenizer of stabilityai/stable-diffusion-xl-base"):
            families.load(Base(model=str(path)))

    @pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
    def test_marks_say_what_it_predicts(
        self,
        marks: tuple[str, ...],
        tiny_folder: Folder,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder = tiny_folder("sdxl")
        path = ldm.single_file_xl(folder, tmp_path / "marked.safetensors", marks)
        modelfolder.say.cache_clear()
        family = families.load(Base(model=str(path), config=str(folder)))
        assert family.schedule.prediction_type == "v_prediction"
        assert (family.schedule.snr[-1] == 0) == ("ztsnr" in marks)
        assert len(caplog.records) == len(marks)
        assert "is marked as predicting a velocity, and taken so" in caplog.text
        plain = families.load(
            Base(model=str(path), config=str(folder), prediction="epsilon", zero_terminal_snr=False)
        )
        assert plain.schedule.prediction_type == "epsilon"


class TestRefusals:
    @pytest.fixture
    def folder(self, tiny_folder: Folder, tmp_path: Path) -> Path:
        return copy(tiny_folder("sdxl"), tmp_path / "base")

    @staticmethod
    def refusal(folder: Path, **base: Any) -> str:
        with pytest.raises(UserError) as caught:
            families.load(Base(model=str(folder), **base))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_the_refiner(self, folder: Path) -> None:
        nothing = [None, None]
        rewrite(folder / "model_index.json", text_encoder=nothing, tokenizer=nothing)
        rewrite(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
        line = self.refusal(folder)
        assert "is the refiner of Stable Diffusion XL" in line
        assert "take the base that draws from words alone" in line

    def test_an_inpainting_base(self, folder: Path) -> None:
        rewrite(folder / "unet" / "config.json", in_channels=9)
        line = self.refusal(folder)
        assert "is an inpainting base" in line
        assert "with 9 input channels" in line

    def test_noise_levels_of_another_kind(self, folder: Path) -> None:
        """As Playground 2.5 has them, in a pipeline of the same name."""
        from diffusers import EDMEulerScheduler

        EDMEulerScheduler().save_pretrained(folder / "scheduler")
        rewrite(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
        assert "was trained with EDM's noise levels (its scheduler is EDMEuler" in self.refusal(
            folder
        )

    def test_the_wrong_family(self, folder: Path, tiny_folder: Folder) -> None:
        line = self.refusal(folder, family="sd")
        assert line.startswith(f"base.family: sd, but {folder} is sdxl: it holds StableDiffusionXL")
        assert "base.family: sd, but" not in self.refusal(tiny_folder(), family="sdxl")
        assert "is sd: it holds StableDiffusionPipeline" in self.refusal(
            tiny_folder(), family="sdxl"
        )


def test_half_precision_encodes_pictures_where_the_vae_overflows(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    """SDXL's VAE leaves fp16's range; its configuration says so."""
    folder = copy(tiny_folder("sdxl"), tmp_path / "half")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["encoder.conv_in.weight"] *= 6e4 / tensors["encoder.conv_in.weight"].abs().max()
    save_file(tensors, path, {"format": "pt"})
    pixels = torch.ones(1, 3, 32, 32)
    family = families.load(Base(model=str(folder), dtype="fp16"))
    assert family.encode_image(pixels).isfinite().all()
    assert {p.dtype for p in family.vae.parameters()} == {torch.float16}
    rewrite(folder / "vae" / "config.json", force_upcast=False)
    family = families.load(Base(model=str(folder), dtype="fp16"))
    assert not family.encode_image(pixels).isfinite().all()
