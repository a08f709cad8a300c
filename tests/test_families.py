"""What every family promises, on tiny models of the real classes; then each family's own faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tunekit import families
from tunekit.errors import UserError
from tunekit.families.base import Family, PromptCutWarning
from tunekit.schedulers import FLOW_SCHEDULERS, SCHEDULERS
from tunekit.schema import Base

Folder = Callable[..., Path]
Load = Callable[..., Family]
PROMPT = "a zorp robot on the beach"
FAMILIES = families.names()


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.BUILDERS) == set(FAMILIES)


def test_facts_are_declared_without_torch() -> None:
    code = (
        "import sys; from tunekit import adapters, families;"
        "[families.get(n).lora_presets for n in families.names()]; adapters.settings_types();"
        "assert not {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names_appear_only_in_their_own_files() -> None:
    """Adding a family or an adapter kind is one file: no other file of the package knows it."""
    from tunekit import adapters

    root = Path(families.__file__).parent.parent
    own = {root / "families" / f"{n}.py": n for n in FAMILIES}
    # "full" is a plain word as well: a preset of targets, and a world of the toybox.
    own |= {root / "adapters" / f"{n}.py": n for n in adapters.names() if n != "full"}
    for path in root.rglob("*.py"):
        text = path.read_text()
        for home, name in own.items():
            if path != home:
                found = re.search(rf"""["']{name}["']|\b(families|adapters)\.{name}\b""", text)
                assert found is None, f"{path} names {found}"


@pytest.mark.parametrize("name", FAMILIES)
class TestContract:
    def test_a_folder_is_recognised(self, name: str, tiny_folder: Folder) -> None:
        assert families.recognise(tiny_folder(name)) is families.get(name)
        assert families.get(name).name == name

    def test_the_base_is_frozen_and_in_eval_mode(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        for module in (family.denoiser, family.vae, *family.text_encoders.values()):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_prediction_equals_that_of_the_family_s_own_pipeline(
        self, name: str, guidance: float, load_tiny: Load
    ) -> None:
        family = load_tiny(name)
        seen = record_denoiser(family, PROMPT, "a blue cat", guidance)
        assert len(seen) == 3
        twice = guidance > 1 and tiny.FAMILIES[name].negative
        prompts = ["a blue cat", PROMPT] if twice else [PROMPT]
        conditioning = family.encode_prompt(prompts)
        for noisy, timestep, prediction in seen:
            ours = family.predict(noisy, timestep.long().expand(len(prompts)), conditioning)
            if guidance > 1 and not twice:  # the denoiser is told, and trained as if not guided
                assert not torch.allclose(ours, prediction, atol=1e-4)
            else:
                torch.testing.assert_close(ours, prediction, atol=1e-5, rtol=0)

    def test_rows_of_a_batch_do_not_mix(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        noisy = torch.randn(2, *latent_shape(family))
        timesteps = torch.tensor([3, 900])
        both = family.predict(noisy, timesteps, family.encode_prompt([PROMPT, ""]))
        for i, prompt in enumerate([PROMPT, ""]):
            conditioning = family.encode_prompt([prompt])
            alone = family.predict(noisy[i : i + 1], timesteps[i : i + 1], conditioning)
            torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=0)

    def test_latents_are_what_the_pipeline_decodes(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        size = family.default_resolution
        pixels = torch.rand(2, 3, size, size + family.size_multiple) * 2 - 1
        latents = family.encode_image(pixels)
        assert latents.shape[:2] == (2, family.latent_channels)
        assert latents.dtype == torch.float32
        assert not latents.requires_grad
        assert torch.equal(latents, family.encode_image(pixels)), "it must not be a random draw"
        vae: Any = family.vae
        middle = getattr(vae.config, "shift_factor", None) or 0.0
        wanted = (vae.encode(pixels).latent_dist.mean - middle) * vae.config.scaling_factor
        torch.testing.assert_close(latents, wanted, atol=1e-6, rtol=0)

    def test_the_pipeline_is_built_around_the_same_modules(
        self, name: str, load_tiny: Load
    ) -> None:
        family = load_tiny(name)
        modules = {id(m) for m in family.pipeline().components.values()}
        for module in (family.denoiser, family.vae, *family.text_encoders.values()):
            assert id(module) in modules

    # diffusers hands tensors to numpy in a way that numpy 2 calls outdated.
    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    @pytest.mark.parametrize("scheduler", [None, *SCHEDULERS, "DDIMScheduler", "EULER"])
    def test_schedulers_by_name(self, name: str, scheduler: str | None, load_tiny: Load) -> None:
        family = load_tiny(name)
        drawn_with = tiny.FAMILIES[name].schedulers
        if drawn_with is not None and str(scheduler or "euler").lower() not in drawn_with:
            with pytest.raises(UserError, match=r"for this base.*there is: euler, flow_euler, lcm"):
                family.pipeline(scheduler)
            return
        first, second = family.pipeline(scheduler), family.pipeline(scheduler)
        assert first.scheduler is not second.scheduler, "a scheduler has state"
        own = type(family.scheduler).__name__
        wanted = {None: own, "DDIMScheduler": "DDIMScheduler"}.get(scheduler)
        wanted = (
            wanted
            or (SCHEDULERS if drawn_with is None else FLOW_SCHEDULERS)[str(scheduler).lower()]
        )
        assert type(first.scheduler).__name__ == wanted
        size = {"height": family.default_resolution, "width": family.default_resolution}
        latents = first(PROMPT, num_inference_steps=2, output_type="latent", **size).images
        assert latents.isfinite().all()

    def test_an_unknown_scheduler_is_refused_with_a_suggestion(
        self, name: str, load_tiny: Load
    ) -> None:
        with pytest.raises(UserError, match=r'no scheduler "eulr".*did you mean "euler"'):
            load_tiny(name).pipeline("eulr")

    def test_what_was_released_comes_back_the_same(self, name: str, tiny_folder: Folder) -> None:
        # from its files: a copy of weights lies elsewhere in memory, and sums are rounded otherwise
        family = families.load(Base(model=str(tiny_folder(name))))
        pixels = torch.zeros(1, 3, family.default_resolution, family.default_resolution)
        before = family.encode_image(pixels), family.encode_prompt([PROMPT])
        held = [id(family.vae), *map(id, family.text_encoders.values())]
        family.release("vae", *family.text_encoders)
        family.release("vae")  # what is not there is no fault
        after = family.encode_image(pixels), family.encode_prompt([PROMPT])
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
        assert held  # ids only, so that nothing is kept alive here

    def test_what_trains_is_not_released(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        encoder_name, encoder = next(iter(family.text_encoders.items()))
        next(encoder.parameters()).requires_grad_(True)
        with pytest.raises(AssertionError, match="trains"):
            family.release(encoder_name)
        encoder.requires_grad_(False).register_parameter("more", torch.nn.Parameter(torch.ones(1)))
        encoder.requires_grad_(False)
        with pytest.raises(AssertionError, match="attached"):
            family.release(encoder_name)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    def test_files_are_cast_to_the_recipe_s_format(
        self, name: str, dtype: str, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        folder = copy(tiny_folder(name), tmp_path / "half")
        for path in folder.rglob("*.safetensors"):
            half = {k: v.half() for k, v in load_file(path).items()}
            save_file(half, path, {"format": "pt"})
        family = families.load(Base(model=str(folder), dtype=dtype))
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        for module in (family.denoiser, family.vae, *family.text_encoders.values()):
            # T5 leaves the range of fp16 where transformers holds it wider.
            wide = getattr(module, "_keep_in_fp32_modules", None) or ()
            kept = [
                n
                for n, _ in module.named_parameters()
                if dtype == "fp16" and {*wide} & {*n.split(".")}
            ]
            assert {p.dtype for n, p in module.named_parameters() if n not in kept} == {wanted}
            assert all(module.get_parameter(n).dtype == torch.float32 for n in kept)
        assert family.encode_prompt([PROMPT])
        noisy = torch.randn(1, *latent_shape(family))
        prediction = family.predict(noisy, torch.tensor([5]), family.encode_prompt([PROMPT]))
        assert prediction.isfinite().all()

    def test_a_long_prompt_is_cut_out_loud(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        prompt = "a zorp robot " + "on the beach " * 40 + "wearing a hat"
        assert family.cut_words(prompt).endswith("wearing a hat")
        with pytest.warns(PromptCutWarning, match="wearing a hat"):
            family.encode_prompt([prompt])

    def test_a_base_is_described_without_its_weights(
        self, name: str, load_tiny: Load, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        family = load_tiny(name)
        folder = copy(tiny_folder(name), tmp_path / "described")
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        told = families.describe(Base(model=str(folder)))
        assert told.size_multiple == family.size_multiple
        assert told.default_resolution == family.default_resolution
        long = "a zorp robot " + "on the beach " * 40 + "wearing a hat"
        for prompt in (PROMPT, long):
            assert told.cut_words(prompt) == family.cut_words(prompt)

    def test_an_outline_has_every_name_and_shape_and_reads_no_weight(
        self, name: str, load_tiny: Load, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        family = load_tiny(name)
        folder = copy(tiny_folder(name), tmp_path / "outlined")
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        base = Base(model=str(folder), dtype="bf16")
        outline = families.outline(base)
        assert list(outline) == list(family.components())
        for part, module in family.components().items():
            drawn = outline[part]
            assert type(drawn) is type(module)
            wanted = {key: value.shape for key, value in module.state_dict().items()}
            assert {key: value.shape for key, value in drawn.state_dict().items()} == wanted
            assert {p.dtype for p in drawn.parameters()} == {torch.bfloat16}
            assert all(p.is_meta and not p.requires_grad for p in drawn.parameters())
        around = families.load(base, "meta")
        assert around.denoiser.training is False
        assert around.facts() == family.facts()

    def test_a_prompt_that_just_fits_is_not_cut(self, name: str, load_tiny: Load) -> None:
        family = load_tiny(name)
        words = "a"
        while not family.cut_words(words + " robot"):
            words += " robot"
        assert words != "a"
        assert family.cut_words(words + " robot") == "robot"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            family.encode_prompt([words, "", PROMPT])

    def test_loading_draws_nothing_from_the_global_stream(self, name: str, load_tiny: Load) -> None:
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        load_tiny(name)
        assert torch.equal(torch.rand(3), wanted)


def latent_shape(family: Family) -> tuple[int, ...]:
    pixels = torch.zeros(1, 3, family.default_resolution, family.default_resolution)
    return tuple(family.encode_image(pixels).shape[1:])


def record_denoiser(
    family: Family, prompt: str, negative: str, guidance: float
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (noisy, timestep, prediction) of each call the pipeline makes of the denoiser."""
    seen = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(tiny.FAMILIES[family.name].recorded(args, kwargs, output))

    handle = family.denoiser.register_forward_hook(hook, with_kwargs=True)
    family.pipeline()(
        prompt,
        negative_prompt=negative,
        **tiny.FAMILIES[family.name].steps(3),
        height=family.default_resolution,
        width=family.default_resolution,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    handle.remove()
    return seen


def plain(folder: Path) -> Any:
    """Return diffusers' own Stable Diffusion, of the folder, where clip_skip can be called."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    encoder = pipeline.text_encoder
    # diffusers asks for a level that transformers 5 dropped; around nn, which would own it.
    object.__setattr__(encoder, "text_model", encoder)
    return pipeline


class TestBaseKeys:
    """What a recipe says of its base beside the model."""

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_clip_skip_is_what_the_pipeline_calls_so(
        self, guidance: float, tiny_folder: Folder
    ) -> None:
        family = families.load(Base(model=str(tiny_folder()), clip_skip=1))
        pipeline = plain(tiny_folder())
        settings = {"num_inference_steps": 3, "guidance_scale": guidance, "output_type": "latent"}
        wanted = pipeline(
            PROMPT,
            negative_prompt="a blue cat",
            clip_skip=1,
            generator=torch.Generator().manual_seed(0),
            **settings,
        ).images
        ours = family.pipeline()(
            **family.drawing(PROMPT, "a blue cat", guidance),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
        without = pipeline(
            PROMPT,
            negative_prompt="a blue cat",
            generator=torch.Generator().manual_seed(0),
            **settings,
        ).images
        assert not torch.allclose(ours, without, atol=1e-4)
        trained = family.encode_prompt([PROMPT])["encoder_hidden_states"]
        drawn = pipeline.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0]
        torch.testing.assert_close(trained, drawn, atol=1e-5, rtol=0)

    def test_clip_skip_is_told_and_part_of_what_is_cached(self, tiny_folder: Folder) -> None:
        from tunekit import identity

        usual = families.load(Base(model=str(tiny_folder())))
        skips = families.load(Base(model=str(tiny_folder()), clip_skip=1))
        assert "ss_clip_skip" not in usual.facts()
        assert skips.facts()["ss_clip_skip"] == "2"
        assert identity.of_words(usual) != identity.of_words(skips)
        with pytest.raises(UserError, match=r"base\.clip_skip: 2 leaves nothing .* 1 to 1"):
            families.load(Base(model=str(tiny_folder()), clip_skip=2))

    def test_what_the_files_say_of_the_prediction_can_be_corrected(
        self, tiny_folder: Folder
    ) -> None:
        folder = str(tiny_folder(prediction_type="epsilon"))
        family = families.load(Base(model=folder, prediction="v_prediction"))
        assert family.schedule.prediction_type == "v_prediction"
        assert family.pipeline().scheduler.config.prediction_type == "v_prediction"
        assert family.pipeline("euler").scheduler.config.prediction_type == "v_prediction"
        wanted = families.load(Base(model=str(tiny_folder(prediction_type="v_prediction"))))
        drawn = [
            one.pipeline()(
                PROMPT,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
            for one in (family, wanted)
        ]
        assert torch.equal(*drawn)

    def test_a_base_that_starts_from_pure_noise(self, tiny_folder: Folder, tmp_path: Path) -> None:
        folder = str(tiny_folder(prediction_type="v_prediction"))
        family = families.load(Base(model=folder, zero_terminal_snr=True))
        assert family.schedule.alphas_cumprod[-1] == 0
        scheduler = family.pipeline().scheduler
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
        assert scheduler.alphas_cumprod[-1] < 1e-6
        with pytest.raises(UserError, match=r"cannot predict epsilon: set base\.prediction"):
            families.load(Base(model=str(tiny_folder()), zero_terminal_snr=True))
        zero = copy(Path(folder), tmp_path / "pndm")  # a sampler that cannot start there
        path = zero / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}))
        index = json.loads((zero / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "PNDMScheduler"]
        (zero / "model_index.json").write_text(json.dumps(index))
        family = families.load(Base(model=str(zero), zero_terminal_snr=True))
        scheduler = family.pipeline().scheduler
        assert type(scheduler).__name__ == "DDIMScheduler"
        assert not scheduler.config.clip_sample


@pytest.fixture(scope="module")
def other(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose VAE has other weights."""
    folder = copy(tiny_folder(), tmp_path_factory.mktemp("other") / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path, {"format": "pt"})
    return folder


class TestAnotherVae:
    @staticmethod
    def latents(**base: Any) -> torch.Tensor:
        family = families.load(Base(**base))
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert family.pipeline().vae is family.vae
        family.release("vae")
        return family.encode_image(pixels)

    def test_from_a_model_its_own_folder_and_one_file(
        self, other: Path, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        import ldm

        base, wanted = str(tiny_folder()), self.latents(model=str(other))
        assert not torch.allclose(wanted, self.latents(model=base), atol=1e-3)
        whole = ldm.single_file(other, tmp_path / "whole.safetensors")
        parts = {k: v for k, v in load_file(whole).items() if k.startswith("first_stage_model.")}
        bare = {k.removeprefix("first_stage_model."): v for k, v in parts.items()}
        save_file(parts, tmp_path / "part.safetensors")
        save_file(bare, tmp_path / "bare.safetensors")
        given = [other, other / "vae", whole, tmp_path / "part.safetensors"]
        given += [tmp_path / "bare.safetensors", other / "vae/diffusion_pytorch_model.safetensors"]
        for vae in given:
            got = self.latents(model=base, vae=str(vae))
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)

    def test_it_is_told_and_part_of_what_is_cached(self, other: Path, tiny_folder: Folder) -> None:
        from tunekit import identity

        usual = families.load(Base(model=str(tiny_folder())))
        changed = families.load(Base(model=str(tiny_folder()), vae=str(other / "vae")))
        assert changed.facts()["ss_vae_name"] == "vae"
        assert identity.of_pictures(usual) != identity.of_pictures(changed)

    def test_what_is_no_vae_is_refused(
        self, other: Path, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        def refusal(vae: Path) -> str:
            with pytest.raises(UserError) as caught:
                families.load(Base(model=str(tiny_folder()), vae=str(vae)))
            assert "\n" not in str(caught.value)
            return str(caught.value)

        assert "is no .safetensors file" in refusal(tmp_path / "none.safetensors")
        assert "has no config.json" in refusal(tmp_path)
        unet = other / "unet"
        assert "is UNet2DConditionModel, and this base takes AutoencoderKL" in refusal(unet)
        assert "base.vae" in refusal(unet / "diffusion_pytorch_model.safetensors")
        path = copy(other / "vae", tmp_path / "short") / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors.pop("encoder.conv_in.weight")
        save_file(tensors, path, {"format": "pt"})
        assert "1 weights are missing" in refusal(path.parent)
        assert "weights of its vae are missing" in refusal(path)
        (path.parent / "model.py").touch()
        assert "carries code" in refusal(path.parent)


class TestStableDiffusion:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_what_is_predicted_is_read_from_the_scheduler(
        self, prediction_type: str, load_tiny: Load
    ) -> None:
        family = load_tiny("sd", prediction_type=prediction_type)
        assert family.schedule.prediction_type == prediction_type
        assert len(family.schedule) == 1000
        wanted = {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type]
        assert family.facts()["modelspec.prediction_type"] == wanted

    def test_the_noise_schedule_is_that_of_the_files(self, load_tiny: Load) -> None:
        from diffusers import DDPMScheduler

        family = load_tiny("sd")
        known = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        assert torch.equal(family.schedule.alphas_cumprod, known.alphas_cumprod)
        cosine = load_tiny("sd", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        known = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        assert torch.equal(cosine.schedule.alphas_cumprod, known.alphas_cumprod)
        zero = load_tiny("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction")
        assert zero.schedule.alphas_cumprod[-1] == 0

    def test_the_schedule_does_not_depend_on_the_sampler_a_folder_names(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """Euler keeps other numbers in alphas_cumprod, PNDM's file says no prediction type."""
        from diffusers import EulerDiscreteScheduler, PNDMScheduler

        plain = families.load(Base(model=str(tiny_folder("sd")))).schedule
        for kind in (EulerDiscreteScheduler, PNDMScheduler):
            folder = copy(tiny_folder("sd"), tmp_path / kind.__name__)
            path = folder / "scheduler" / "scheduler_config.json"
            config = json.loads(path.read_text()) | {"_class_name": kind.__name__}
            del config["prediction_type"]
            path.write_text(json.dumps(config))
            index = folder / "model_index.json"
            named = {"scheduler": ["diffusers", kind.__name__]}
            index.write_text(json.dumps(json.loads(index.read_text()) | named))
            schedule = families.load(Base(model=str(folder))).schedule
            assert torch.equal(schedule.alphas_cumprod, plain.alphas_cumprod)
            assert schedule.prediction_type == "epsilon"

    def test_files_of_older_libraries_are_read_without_a_word(
        self, tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """transformers 4 wrote one more level and a buffer, and tokenizers as two files."""
        plain = families.load(Base(model=str(tiny_folder("sd"))))
        folder = copy(tiny_folder("sd"), tmp_path / "old")
        path = folder / "text_encoder" / "model.safetensors"
        tensors = {f"text_model.{key}": value for key, value in load_file(path).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(tensors, path, {"format": "pt"})
        bpe = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer" / "tokenizer.json").unlink()
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
        merges = "".join(f"{first} {second}\n" for first, second in bpe["merges"])
        (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        capfd.readouterr()
        old = families.load(Base(model=str(folder)))
        assert capfd.readouterr() == ("", "")
        for prompt in (PROMPT, "Zörp's 3 robots!", ""):
            wanted, got = plain.encode_prompt([prompt]), old.encode_prompt([prompt])
            assert all(torch.equal(wanted[key], got[key]) for key in wanted)

    def test_a_tokenizer_that_does_not_say_its_length_takes_the_encoder_s(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        folder = copy(tiny_folder("sd"), tmp_path / "base")
        path = folder / "tokenizer" / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps(config))
        family = families.load(Base(model=str(folder)))
        assert family.cut_words("robot " * 20).split() == ["robot"] * 6

    def test_the_tokenization_changes_with_the_tokenizer_and_with_nothing_else(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """Cached conditioning is found by it."""
        family = families.load(Base(model=str(tiny_folder("sd"))))
        before = family.tokenization()
        family.encode_prompt([PROMPT])
        assert family.tokenization() == before
        folder = copy(tiny_folder("sd"), tmp_path / "elsewhere")
        assert families.load(Base(model=str(folder))).tokenization() == before
        path = folder / "tokenizer" / "tokenizer.json"
        rules = json.loads(path.read_text())
        rules["model"]["merges"].pop()
        path.write_text(json.dumps(rules))
        assert families.load(Base(model=str(folder))).tokenization() != before

    def test_key_names_carry_the_level_that_transformers_dropped(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        module = "encoder.layers.0.self_attn.q_proj"
        wanted = f"text_encoder.text_model.{module}"
        assert family.client_name("diffusers", "text_encoder", module) == wanted
        assert family.client_name("diffusers", "text_encoder", f"text_model.{module}") == wanted
        assert family.client_name("diffusers", "denoiser", "conv_in") == "unet.conv_in"
        with pytest.raises(UserError, match="diffuser_s"):
            family.client_name("diffuser_s", "denoiser", "conv_in")
