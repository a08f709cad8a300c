"""Stable Diffusion 1.x and 2.x, and every model of that topology (the bundled toybox is one).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". What the
denoiser predicts (noise or velocity) is read from the scheduler's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError
from tunekit.families import _text
from tunekit.families._latent import classes
from tunekit.families._unet import HIDDEN, UNet
from tunekit.families.base import Conditioning, make_scheduler

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusion(UNet):
    """A U-Net conditioned on the last layer of one CLIP text encoder."""

    needs = (
        "for Stable Diffusion 1.x / 2.x: unet UNet2DConditionModel with 4 input channels, vae "
        "AutoencoderKL, one text_encoder CLIPTextModel and its tokenizer"
    )
    kinds: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    tokenizer_kinds: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTokenizer"}

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        there = classes(model_index)
        unet = configs.get("unet", {})
        return (
            all(there.get(name) == kind for name, kind in cls.kinds.items())
            and there.get("tokenizer") in ("CLIPTokenizer", "CLIPTokenizerFast")
            and "text_encoder_2" not in there
            and "scheduler" in there
            # Inpainting bases take 9 channels, upscalers 7.
            and unet.get("in_channels", 4) == cls.latent_channels
            and unet.get("addition_embed_type") is None
            and unet.get("class_embed_type") is None
        )

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        self.warn_of_cuts(prompts)
        encoder: Any = self.text_encoders["text_encoder"]
        tokens = _text.tokens(self._tokenizers["text_encoder"], prompts)
        # Stable Diffusion was trained without the mask; a few bases ask for it.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return {HIDDEN: encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning[HIDDEN].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders["text_encoder"],
            tokenizer=self._tokenizers["text_encoder"],
            unet=self.denoiser,
            scheduler=make_scheduler(self.scheduler, scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

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
