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
    clip_back = 0
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

    @classmethod
    def relative(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        there = classes(model_index)
        if there.get("text_encoder") != "CLIPTextModel" or "text_encoder_2" in there:
            return None
        return cls.variant_of(configs.get("unet", {})) if "unet" in there else None

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        self.warn_of_cuts(prompts)
        return {HIDDEN: self._states(prompts, self.clip_skip)}

    def _states(self, prompts: Sequence[str], skip: int | None) -> Tensor:
        """Return the states [B, length, width] of the last layer, or of one so many before it."""
        encoder: Any = self.text_encoders["text_encoder"]
        tokens = _text.tokens(self._tokenizers["text_encoder"], prompts)
        # Stable Diffusion was trained without the mask; a few bases ask for it.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        ids = tokens.input_ids.to(self.device)
        if skip is None:
            last: Tensor = encoder(ids, attention_mask=mask)[0]
            return last
        states, _ = _text.clip_layer(encoder, ids, skip, mask)
        # The denoiser knows states as they are behind the last norm.
        normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states)
        return normed

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning[HIDDEN].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def drawing(self, prompt: str, negative_prompt: str, guidance_scale: float) -> dict[str, Any]:
        if self.clip_skip is None:
            return super().drawing(prompt, negative_prompt, guidance_scale)
        # diffusers 0.42 looks for a level of CLIPTextModel that transformers 5 dropped; so what its
        # pipeline would make of the prompts, where only the positive one skips, is made here.
        return {
            "prompt_embeds": self._states([prompt], self.clip_skip),
            "negative_prompt_embeds": self._states([negative_prompt], None),
            "guidance_scale": guidance_scale,
        }

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
            **self.base_facts(),
        }
