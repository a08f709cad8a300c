"""Stable Diffusion XL: two text encoders, and a denoiser that is told sizes and crops.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis".
Bases that predict noise or velocity, with or without zero terminal SNR. Not the refiner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError
from tunekit.families import _ldm, _text
from tunekit.families._latent import classes
from tunekit.families._unet import HIDDEN, UNet
from tunekit.families.base import Conditioning, make_scheduler
from tunekit.modelfolder import ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.schema import Base

# The keys under which the pooled embedding and the sizes travel, and what the U-Net calls them.
_POOLED, _SIZES = "text_embeds", "time_ids"


class StableDiffusionXL(UNet):
    """A U-Net conditioned on the last layers but one of CLIP-L and OpenCLIP bigG, side by side.

    Beside them it is given bigG's pooled embedding, and what `Batch.sizes` says of the picture.
    """

    needs = (
        "for Stable Diffusion XL: unet UNet2DConditionModel with 4 input channels and text_time "
        "conditioning, vae AutoencoderKL, text_encoder CLIPTextModel, text_encoder_2 "
        "CLIPTextModelWithProjection, and a tokenizer of each"
    )
    kinds: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    tokenizer_kinds: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTokenizer",
        "text_encoder_2": "CLIPTokenizer",
    }
    clip_back = 1
    embedding_keys: ClassVar[Mapping[str, str]] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
    }

    def __init__(self, base: Base, device: torch.device, folder: ModelFolder) -> None:
        super().__init__(base, device, folder)
        # Whether no negative prompt is zeros to the pipeline, and not the empty prompt.
        self._zeros: bool = folder.model_index.get("force_zeros_for_empty_prompt", True)

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        there, unet = classes(model_index), configs.get("unet", {})
        return (
            all(there.get(name) == kind for name, kind in cls.kinds.items())
            and {"tokenizer", "tokenizer_2", "scheduler"} <= there.keys()
            and unet.get("in_channels", 4) == cls.latent_channels
            and unet.get("addition_embed_type") == "text_time"
        )

    @classmethod
    def relative(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        there, unet = classes(model_index), configs.get("unet", {})
        if "text_encoder_2" not in there or unet.get("addition_embed_type") != "text_time":
            return None
        if "text_encoder" not in there:
            return "the refiner of Stable Diffusion XL, which only reworks what its base has drawn"
        return cls.variant_of(unet)

    def scaled(self, latents: Tensor) -> Tensor:
        import torch

        config: Any = self.vae.config
        # Some autoencoders say middle and spread of each channel, which this pipeline alone reads.
        told = [getattr(config, key, None) for key in ("latents_mean", "latents_std")]
        if None in told:
            return super().scaled(latents)
        mean, spread = (torch.tensor(one, device=latents.device).view(1, -1, 1, 1) for one in told)
        known: Tensor = (latents - mean) / spread * config.scaling_factor
        return known

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        import torch

        self.warn_of_cuts(prompts)
        states = []
        for name, encoder in self.text_encoders.items():
            tokens = _text.tokens(self._tokenizers[name], prompts)
            back = self.clip_back + (self.clip_skip or 0)
            layer, answer = _text.clip_layer(encoder, tokens.input_ids.to(self.device), back)
            states.append(layer)
        return {HIDDEN: torch.cat(states, dim=-1), _POOLED: answer.text_embeds}

    def layers_read(self, encoder: str) -> int:
        if encoder == "text_encoder_2":  # its last layer makes the pooled embedding
            config: Any = self.text_encoders[encoder].config
            layers: int = config.num_hidden_layers
            return layers
        return super().layers_read(encoder)

    def with_sizes(self, conditioning: Conditioning, sizes: Tensor) -> Conditioning:
        return {**conditioning, _SIZES: sizes}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        sizes = conditioning.get(_SIZES)
        if sizes is None:
            sizes = self._whole(noisy)
        prediction: Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning[HIDDEN].to(self.device, self.dtype),
            added_cond_kwargs={
                _POOLED: conditioning[_POOLED].to(self.device, self.dtype),
                # In whole numbers or float32: half precision cannot tell 1023 from 1024.
                _SIZES: sizes.to(self.device).float(),
            },
            return_dict=False,
        )[0]
        return prediction

    def _whole(self, noisy: Tensor) -> Tensor:
        """Return the sizes of pictures that are nothing but what these latents hold: [B, 6]."""
        import torch

        height, width = (edge * self.latent_pixels for edge in noisy.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]] * len(noisy))

    def drawing(self, prompt: str, negative_prompt: str, guidance_scale: float) -> dict[str, Any]:
        asked = super().drawing(prompt, negative_prompt, guidance_scale)
        return asked if self.clip_skip is None else {**asked, "clip_skip": self.clip_skip}

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            **self.text_encoders,
            tokenizer=self._tokenizers["text_encoder"],
            tokenizer_2=self._tokenizers["text_encoder_2"],
            unet=self.denoiser,
            scheduler=make_scheduler(self.scheduler, scheduler),
            force_zeros_for_empty_prompt=self._zeros,
            add_watermarker=False,
        )

    def client_name(self, layout: str, component: str, module: str) -> str:
        denoiser: Any = self.denoiser
        # transformers 5 dropped this level from CLIPTextModel; every client still looks for it.
        inside = module.startswith(("text_model.", "text_projection"))
        text = module if inside else f"text_model.{module}"
        if layout == "diffusers":
            return f"unet.{module}" if component == "denoiser" else f"{component}.{text}"
        if layout == "kohya":
            if component == "denoiser":
                name = f"unet_{_ldm.unet_name(module, denoiser.config)}"
            else:
                name = f"te{2 if component == 'text_encoder_2' else 1}_{text}"
            return f"lora_{name.replace('.', '_')}"
        raise UserError(f'export.layouts: Stable Diffusion XL is not written as "{layout}"')

    def facts(self) -> dict[str, str]:
        denoiser: Any = self.denoiser
        width = denoiser.config.cross_attention_dim
        velocity = self.schedule.prediction_type == "v_prediction"
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
        if width != 2048:  # the topology alone
            version = architecture = f"sdxl-topology-{width}"
        return {
            "modelspec.architecture": architecture,
            "modelspec.prediction_type": "v" if velocity else self.schedule.prediction_type,
            "ss_base_model_version": version,
            "ss_v2": "False",
            **self.base_facts(),
        }
