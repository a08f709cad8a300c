"""Stable Diffusion 1.x and 2.x, and every model of that topology (the bundled toybox is one).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". What the
denoiser predicts (noise or velocity) is read from the scheduler's configuration.
"""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit import singlefile, words
from tunekit.errors import UserError
from tunekit.families.base import (
    Conditioning,
    Description,
    Family,
    PromptCutWarning,
    make_scheduler,
)
from tunekit.modelfolder import ModelFolder, loading

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor, nn

    from tunekit.diffusion import NoiseSchedule
    from tunekit.schema import Base

_ATTENTION = (r"attn[12]\.to_(q|k|v|out\.0)",)
_MLP = (r"ff\.net\.(0\.proj|2)", r"attentions\.\d+\.proj_(in|out)")
_CONVOLUTIONS = (
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)",
    r"(down|up)samplers\.0\.conv",
)
# A table of 0, 1, 2, ... that older transformers saved among the text encoder's weights.
_HARMLESS = ("position_ids",)
_TEXT_ATTENTION = (r"self_attn\.(q|k|v|out)_proj",)
_TEXT_MLP = (r"mlp\.fc[12]",)
# The key under which the hidden states travel, and the argument of the U-Net that takes them.
_HIDDEN = "encoder_hidden_states"


class StableDiffusion(Family):
    """UNet2DConditionModel over AutoencoderKL latents, conditioned on one CLIP text encoder."""

    needs = (
        "for Stable Diffusion 1.x / 2.x: unet UNet2DConditionModel with 4 input channels, vae "
        "AutoencoderKL, one text_encoder CLIPTextModel and its tokenizer"
    )
    latent_channels = 4
    size_multiple = 8
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "attention+mlp": _ATTENTION + _MLP,
        # Not conv_in, conv_out and the time embedding: other trainers' clients refuse those.
        "full": _ATTENTION + _MLP + _CONVOLUTIONS,
    }
    text_lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _TEXT_ATTENTION,
        "attention+mlp": _TEXT_ATTENTION + _TEXT_MLP,
        "full": _TEXT_ATTENTION + _TEXT_MLP,
    }

    def __init__(self, base: Base, device: torch.device, folder: ModelFolder) -> None:
        import torch

        self.label = folder.label
        self.device = device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            base.dtype
        ]
        self._folder = folder
        self._variant = base.variant
        self._loaded: dict[str, nn.Module] = {}
        self._weights: dict[str, int] = {}
        self.tokenizer: Any = _tokenizer(folder.path)
        self.scheduler: Any = _scheduler(folder)
        self.schedule = _noise_schedule(self.scheduler, folder.label)
        self.denoiser: nn.Module = self._module("unet")
        # Needed first of all in every run; and a damaged file is found now, not in an hour.
        vae: Any = self._module("vae")
        encoder: Any = self._module("text_encoder")
        # Some tokenizers do not say how much the encoder reads.
        self.tokenizer.model_max_length = min(
            self.tokenizer.model_max_length, encoder.config.max_position_embeddings
        )
        # The loaded module's word: a config.json may leave out what is the default.
        self._vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.default_resolution = _edge(folder) * self._vae_factor

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        classes = {
            name: value[1]
            for name, value in model_index.items()
            if isinstance(value, list) and len(value) == 2
        }
        unet = configs.get("unet", {})
        return (
            classes.get("unet") == "UNet2DConditionModel"
            and classes.get("vae") == "AutoencoderKL"
            and classes.get("text_encoder") == "CLIPTextModel"
            and classes.get("tokenizer") in ("CLIPTokenizer", "CLIPTokenizerFast")
            and "text_encoder_2" not in classes
            and "scheduler" in classes
            # Inpainting bases take 9 channels, upscalers 7.
            and unet.get("in_channels", 4) == cls.latent_channels
            and unet.get("addition_embed_type") is None
            and unet.get("class_embed_type") is None
        )

    @classmethod
    def describe(cls, folder: ModelFolder) -> Description:
        folder.bring(["tokenizer"], [], None)
        tokenizer = _tokenizer(folder.path)
        read = folder.configs.get("text_encoder", {}).get("max_position_embeddings", 77)
        tokenizer.model_max_length = min(tokenizer.model_max_length, read)
        factor = 2 ** (len(folder.configs["vae"].get("block_out_channels", [64])) - 1)
        return Description(
            folder.label,
            cls.size_multiple,
            _edge(folder) * factor,
            lambda prompt: _cut_words(tokenizer, prompt),
            {"text_encoder": tokenizer},
        )

    @classmethod
    def load(
        cls, base: Base, device: torch.device | str = "cpu", folder: ModelFolder | None = None
    ) -> Self:
        import torch

        folder = folder or ModelFolder.open(base)
        weighted = ("unet", "vae", "text_encoder")
        folder.bring([*weighted, "tokenizer", "scheduler"], weighted, base.variant)
        return cls(base, torch.device(device), folder)

    @property
    def vae(self) -> nn.Module:
        return self._module("vae")

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self._module("text_encoder")}

    def _module(self, name: str) -> nn.Module:
        if name not in self._loaded:
            module = _load(self._folder, name, self.dtype, self._variant)
            self._weights[name] = sum(1 for _ in module.parameters())
            self._loaded[name] = module.to(self.device).requires_grad_(False).eval()
        return self._loaded[name]

    def encode_image(self, pixels: Tensor) -> Tensor:
        import torch

        _, channels, height, width = pixels.shape
        assert channels == 3, pixels.shape
        assert height % self.size_multiple == width % self.size_multiple == 0, pixels.shape
        assert -1.001 <= float(pixels.min()) <= float(pixels.max()) <= 1.001, "pixels leave -1..1"
        vae: Any = self.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(self.device, self.dtype)).latent_dist
            latents: Tensor = posterior.mode().float() * vae.config.scaling_factor
        return latents

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in dict.fromkeys(prompts):
            if cut := self.cut_words(prompt):
                warnings.warn(
                    f"the text encoder reads {self.tokenizer.model_max_length} tokens and never "
                    f'sees the end of this prompt: "{cut}" (of "{prompt}")',
                    PromptCutWarning,
                    stacklevel=2,
                )
        encoder: Any = self._module("text_encoder")
        tokens = self.tokenizer(
            [words.expand(self.tokenizer, prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # Stable Diffusion was trained without the mask; a few bases ask for it.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return {_HIDDEN: encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]}

    def cut_words(self, prompt: str) -> str:
        return _cut_words(self.tokenizer, prompt)

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        return {"text_encoder": self.tokenizer}

    def use_tokenizer(self, encoder: str, tokenizer: Any) -> None:
        assert encoder == "text_encoder", encoder
        self.tokenizer = tokenizer

    def tokenization(self) -> str:
        tokenizer = self.tokenizer
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is; the length stands beside it.
        rules |= {"padding": None, "truncation": None}
        told = [rules, tokenizer.model_max_length, tokenizer.special_tokens_map]
        return json.dumps(told, sort_keys=True, default=str)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning[_HIDDEN].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self._module("text_encoder"),
            tokenizer=self.tokenizer,
            unet=self.denoiser,
            scheduler=make_scheduler(self.scheduler, scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def release(self, *components: str) -> None:
        import torch

        for name in components:
            assert name in ("vae", "text_encoder"), name
            module = self._loaded.get(name)
            if module is None:
                continue
            assert not any(p.requires_grad for p in module.parameters()), f"{name} trains"
            extra = sum(1 for _ in module.parameters()) - self._weights[name]
            assert not extra, f"an adapter is attached to {name}"
            del self._loaded[name], module
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def client_name(self, layout: str, component: str, module: str) -> str:
        # transformers 5 dropped this level from CLIPTextModel; every client still looks for it.
        text = f"text_model.{module.removeprefix('text_model.')}"
        assert component in ("denoiser", "text_encoder"), component
        if layout == "diffusers":
            return f"unet.{module}" if component == "denoiser" else f"text_encoder.{text}"
        if layout == "kohya":
            name = f"unet_{module}" if component == "denoiser" else f"te_{text}"
            return f"lora_{name.replace('.', '_')}"
        raise UserError(f'export.layouts: Stable Diffusion is not written as "{layout}"')

    def facts(self) -> dict[str, str]:
        denoiser: Any = self.denoiser
        width = denoiser.config.cross_attention_dim
        velocity = self.schedule.prediction_type == "v_prediction"
        if width == 768:
            version, architecture = "sd_v1", "stable-diffusion-v1"
        elif width == 1024:
            version = "sd_v2_v" if velocity else "sd_v2"
            architecture = f"stable-diffusion-v2-{'768-v' if velocity else '512'}"
        else:
            # The topology alone: a client that knows only the two above must not take it for one.
            version = architecture = f"stable-diffusion-topology-{width}"
        return {
            "modelspec.architecture": architecture,
            "modelspec.prediction_type": "v" if velocity else self.schedule.prediction_type,
            "ss_base_model_version": version,
            "ss_v2": str(width == 1024),
        }


def _edge(folder: ModelFolder) -> int:
    """Return the edge of the latents that the denoiser was made for."""
    size = folder.configs["unet"].get("sample_size") or 64
    return size if isinstance(size, int) else max(size)


def _cut_words(tokenizer: Any, prompt: str) -> str:
    # The last token read is the end mark, in the place of the first one cut.
    whole = words.expand(tokenizer, prompt)
    tokens = tokenizer(whole, truncation=False, verbose=False).input_ids
    cut: str = tokenizer.decode(tokens[tokenizer.model_max_length - 1 : -1])
    return cut


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        line = " ".join(str(error).split())
        raise UserError(f"{folder / 'tokenizer'}: cannot be loaded: {line[:300]}") from error


def _scheduler(folder: ModelFolder) -> Any:
    import diffusers

    name = folder.model_index["scheduler"][1]
    kind = getattr(diffusers, name, None) if str(name).endswith("Scheduler") else None
    if kind is None:
        raise UserError(f"{folder.label}: model_index.json names no scheduler of diffusers: {name}")
    with loading(f"{folder.label}: scheduler"):
        return kind.from_pretrained(folder.path, subfolder="scheduler", local_files_only=True)


def _noise_schedule(scheduler: Any, label: str) -> NoiseSchedule:
    """Return the schedule the base was trained with, whatever sampler the folder names."""
    from diffusers import DDPMScheduler

    from tunekit.diffusion import PREDICTION_TYPES, NoiseSchedule

    with loading(f"{label}: scheduler/scheduler_config.json"):
        trained = DDPMScheduler.from_config(scheduler.config)
    kind = trained.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"{label}: scheduler/scheduler_config.json says prediction_type {kind}; "
            f"tunekit trains {', '.join(PREDICTION_TYPES)}"
        )
    return NoiseSchedule(trained.alphas_cumprod.float(), kind)


def _load(folder: ModelFolder, name: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """Return a component with every one of its weights read from the folder's safetensors."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    if folder.weights is not None:
        return singlefile.load(kinds[name], folder.weights, folder.path, name, dtype)
    # The two libraries call it by two names.
    precision = "dtype" if name == "text_encoder" else "torch_dtype"
    where: dict[str, Any] = {"subfolder": name, "use_safetensors": True, "variant": variant}
    where[precision] = dtype
    with loading(str(folder.path / name)), _quiet():
        module, report = kinds[name].from_pretrained(folder.path, output_loading_info=True, **where)
    # The libraries fill a missing weight with random numbers and go on.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder.path / name}: {len(missing)} weights are missing, such as {missing[0]}; "
            "the folder is incomplete or was saved under names this version does not read"
        )
    # And drop weights that the configuration has no place for, such as whole blocks.
    if unused := sorted(key for key in report["unexpected_keys"] if not key.endswith(_HARMLESS)):
        raise UserError(
            f"{folder.path / name}: its config.json has no place for {len(unused)} of the weights, "
            f"such as {unused[0]}; configuration and weights do not belong together"
        )
    loaded: nn.Module = module
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' loading bar, which would run through the run's own progress."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
