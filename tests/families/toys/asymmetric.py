"""Stable Diffusion with another decoder: a family in one file, as `CONTRIBUTING.md` says.

A test puts this folder beside the package's own families, and touches nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tunekit.families import _text
from tunekit.families._latent import classes
from tunekit.families._unet import HIDDEN, UNet
from tunekit.families.base import Conditioning, make_scheduler


class Asymmetric(UNet):
    """A U-Net over the latents of an AsymmetricAutoencoderKL (Zhu et al. 2023)."""

    needs = "for the example: unet, text_encoder, and a vae AsymmetricAutoencoderKL"
    kinds: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AsymmetricAutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    tokenizer_kinds: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTokenizer"}

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        return cls.kinds.items() <= classes(model_index).items()

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        self.warn_of_cuts(prompts)
        read = _text.tokens(self._tokenizers["text_encoder"], prompts)
        encoder: Any = self.text_encoders["text_encoder"]
        return {HIDDEN: encoder(read.input_ids.to(self.device))[0]}

    def predict(self, noisy: Any, timesteps: Any, conditioning: Conditioning) -> Any:
        return self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning[HIDDEN].to(self.device, self.dtype),
        ).sample

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            **self.text_encoders,
            tokenizer=self._tokenizers["text_encoder"],
            unet=self.denoiser,
            scheduler=make_scheduler(self.scheduler, scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def client_name(self, layout: str, component: str, module: str) -> str:
        part = "unet" if component == "denoiser" else component
        text = "" if component == "denoiser" else "text_model."
        name = f"{part}.{text}{module}"
        short = name.replace("text_encoder", "te", 1).replace(".", "_")
        return name if layout == "diffusers" else f"lora_{short}"

    def facts(self) -> dict[str, str]:
        return {"modelspec.architecture": "example", **self.base_facts()}
