"""FLUX.1 dev and schnell: CLIP's pooled embedding, T5, and latents that are read in patches.

Black Forest Labs 2024, FLUX.1, after its implementation in diffusers. dev was distilled to be told
how strongly it is guided; schnell, and what is trained from it, is told nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError
from tunekit.families import _text
from tunekit.families._flow import HIDDEN, POOLED, Flow
from tunekit.families._latent import classes
from tunekit.families.base import Conditioning, make_scheduler
from tunekit.modelfolder import ModelFolder

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = (r"attn\.(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out)",)
_MLP = (r"ff(_context)?\.net\.(0\.proj|2)", r"single_transformer_blocks\.\d+\.proj_(mlp|out)")
_MODULATION = (r"norm1(_context)?\.linear", r"single_transformer_blocks\.\d+\.norm\.linear")
_CLIP, _T5 = "text_encoder", "text_encoder_2"
_PROJECTIONS = ("to_q", "to_k", "to_v")
# What the first release calls the layers of a block, and ours whose rows they hold.
_DOUBLE: Mapping[str, Sequence[str]] = {
    "img_attn.qkv": [f"attn.{one}" for one in _PROJECTIONS],
    "txt_attn.qkv": [f"attn.add_{one[3:]}_proj" for one in _PROJECTIONS],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
}
_SINGLE: Mapping[str, Sequence[str]] = {
    "linear1": [*(f"attn.{one}" for one in _PROJECTIONS), "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
_AROUND: Mapping[str, Sequence[str]] = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
_GUIDANCE_IN: Mapping[str, Sequence[str]] = {
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
}
# A patch is this many cells wide and high.
_PATCH = 2
# Trained as if not guided: what is drawn at another strength then keeps the distance it has.
_GUIDANCE = 1.0


class Flux(Flow):
    """A transformer conditioned on T5's states and CLIP's pooled embedding."""

    controlnet = "FluxControlNetModel"
    needs = (
        "for FLUX.1: transformer FluxTransformer2DModel with 64 input channels, vae AutoencoderKL, "
        "text_encoder CLIPTextModel, text_encoder_2 T5EncoderModel, and a tokenizer of each"
    )
    kinds: ClassVar[Mapping[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        _CLIP: "CLIPTextModel",
        _T5: "T5EncoderModel",
    }
    tokenizer_kinds: ClassVar[Mapping[str, str]] = {
        _CLIP: "CLIPTokenizer",
        _T5: "T5TokenizerFast",
    }
    reads: ClassVar[Mapping[str, int]] = {_T5: 512}
    file_names: ClassVar[Mapping[str, str]] = {_CLIP: "clip_l", _T5: "t5xxl"}
    embedding_keys: ClassVar[Mapping[str, str]] = {_CLIP: "clip_l"}
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "attention+mlp": _ATTENTION + _MLP,
        "full": _ATTENTION + _MLP + _MODULATION,
    }

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        there, transformer = classes(model_index), configs.get("transformer", {})
        return (
            all(there.get(name) == kind for name, kind in cls.kinds.items())
            and {"tokenizer", "tokenizer_2", "scheduler"} <= there.keys()
            and transformer.get("in_channels", 64) == cls.latent_channels * _PATCH**2
        )

    @classmethod
    def relative(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        if classes(model_index).get("transformer") != "FluxTransformer2DModel":
            return None
        kinds = {384: "FLUX.1 Fill, which is given a picture and a mask beside the noise"}
        kinds |= {128: "FLUX.1 Canny or Depth, which is given a picture beside the noise"}
        return kinds.get(configs.get("transformer", {}).get("in_channels", 64))

    @classmethod
    def resolution(cls, folder: ModelFolder) -> int:
        # The transformer does not say it; the autoencoder was made with pictures of the same size.
        edge: int = folder.configs["vae"].get("sample_size") or 1024
        return edge

    @classmethod
    def layers_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, Sequence[str]]]:
        for theirs, ours in _blocks("double", config.num_layers):
            for name, modules in _DOUBLE.items():
                yield f"{theirs}.{name}", [f"{ours}.{module}" for module in modules]
        for theirs, ours in _blocks("single", config.num_single_layers):
            for name, modules in _SINGLE.items():
                yield f"{theirs}.{name}", [f"{ours}.{module}" for module in modules]
        yield from _AROUND.items()
        if config.guidance_embeds:
            yield from _GUIDANCE_IN.items()

    @classmethod
    def others_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, str]]:
        blocks = [*_blocks("double", config.num_layers)]
        places = [(f"{t}.img_attn", f"{o}.attn.norm_") for t, o in blocks]
        places += [(f"{t}.txt_attn", f"{o}.attn.norm_added_") for t, o in blocks]
        blocks = [*_blocks("single", config.num_single_layers)]
        places += [(theirs, f"{ours}.attn.norm_") for theirs, ours in blocks]
        for theirs, ours in places:
            yield f"{theirs}.norm.query_norm.scale", f"{ours}q.weight"
            yield f"{theirs}.norm.key_norm.scale", f"{ours}k.weight"

    def shifts(self) -> Callable[[int], float] | None:
        """Return latent cells -> e^mu, mu straight from patches, as the pipeline reckons it."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        linear = config.get("time_shift_type", "exponential") == "linear"

        def shift(cells: int) -> float:
            mu = low + (cells / _PATCH**2 - first) * (high - low) / (last - first)
            return mu if linear else math.exp(mu)

        return shift

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        self.warn_of_cuts(prompts)
        encoders, tokenizers = self.text_encoders, self._tokenizers
        ids = _text.tokens(tokenizers[_CLIP], prompts).input_ids.to(self.device)
        pooled = encoders[_CLIP](ids).pooler_output
        # Without the mask: what fills up the length is read as well, as the base was trained.
        spelled = [self.spell(prompt) for prompt in prompts]
        ids = _text.tokens(tokenizers[_T5], spelled).input_ids.to(self.device)
        return {HIDDEN: encoders[_T5](ids)[0].to(self.dtype), POOLED: pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        import torch

        height, width = noisy.shape[-2:]
        states = conditioning[HIDDEN].to(self.device, self.dtype)
        denoiser: Any = self.denoiser
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full((len(noisy),), _GUIDANCE, device=self.device)
        # In the denoiser's format before it is divided, as the pipeline does it.
        told = (self.levels(timesteps) * len(self.schedule)).to(self.dtype) / len(self.schedule)
        prediction: Tensor = denoiser(
            hidden_states=pack(noisy.to(self.device, self.dtype)),
            timestep=told,
            guidance=guidance,
            pooled_projections=conditioning[POOLED].to(self.device, self.dtype),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self._places(height, width),
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)

    def _places(self, height: int, width: int) -> Tensor:
        """Return the row and column of each patch of so many cells: [patches, 3], the first 0."""
        import torch

        counts = (1, height // _PATCH, width // _PATCH)
        places = torch.cartesian_prod(*(torch.arange(count) for count in counts))
        return places.to(self.device, self.dtype)

    def drawing(self, prompt: str, negative_prompt: str, guidance_scale: float) -> dict[str, Any]:
        if negative_prompt:
            raise UserError(
                f"negative_prompt: {self.label} is guided without a second prompt and would never "
                "see it: leave it out"
            )
        return {"prompt": self.spell(prompt), "guidance_scale": guidance_scale}

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import FluxPipeline

        return FluxPipeline(
            transformer=self.denoiser,
            vae=self.vae,
            **self.text_encoders,
            **{_text.tokenizer_name(name): one for name, one in self._tokenizers.items()},
            scheduler=make_scheduler(self.scheduler, scheduler),
        )

    def facts(self) -> dict[str, str]:
        denoiser: Any = self.denoiser
        config = denoiser.config
        blocks = config.num_layers, config.num_single_layers
        release = "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"
        if blocks != (19, 38):  # the topology alone
            release = f"flux-1-topology-{blocks[0]}x{blocks[1]}"
        return {
            "modelspec.architecture": release,
            "ss_base_model_version": "flux1" if blocks == (19, 38) else release,
            "ss_v2": "False",
            **self.base_facts(),
        }


def _blocks(kind: str, count: int) -> Iterator[tuple[str, str]]:
    """Yield what the first release calls each block of a kind, and what we do."""
    ours = "transformer_blocks" if kind == "double" else f"{kind}_transformer_blocks"
    for number in range(count):
        yield f"{kind}_blocks.{number}", f"{ours}.{number}"


def pack(latents: Tensor) -> Tensor:
    """Return latents [B, C, h, w] as patches of two by two cells: [B, h w / 4, 4 C]."""
    count, channels, height, width = latents.shape
    split = latents.reshape(count, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * _PATCH**2)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Return patches as latents of `height` by `width` cells, as they were before `pack`."""
    count, _, numbers = patches.shape
    split = patches.reshape(count, height // _PATCH, width // _PATCH, -1, _PATCH, _PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(count, numbers // _PATCH**2, height, width)
