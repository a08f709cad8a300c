"""Stable Diffusion 3 and 3.5: two CLIPs and T5, and a transformer that reads words beside pictures.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis". T5 may
be absent: the transformer then reads zeros in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit import words
from tunekit.errors import UserError
from tunekit.families import _text
from tunekit.families._flow import HIDDEN, POOLED, Flow
from tunekit.families._latent import classes
from tunekit.families.base import Conditioning, make_scheduler
from tunekit.modelfolder import ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.schema import Base

_ATTENTION = (r"attn2?\.(to_(q|k|v|out\.0)|add_(k|v)_proj|to_add_out)",)
_WORDS_ASK = r"attn\.add_q_proj"
_MLP = (r"ff(_context)?\.net\.(0\.proj|2)",)
_T5 = "text_encoder_3"
# How many tokens of T5 the pipeline reads where it is not told.
_T5_READS = 256
# What the first release calls the layers of a block, and ours whose rows they hold; the last block
# has less beside the words.
_BLOCK: Mapping[str, Sequence[str]] = {
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
}
_BEFORE_LAST: Mapping[str, Sequence[str]] = {
    "context_block.attn.proj": ["attn.to_add_out"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}
_TWICE: Mapping[str, Sequence[str]] = {
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
}
_AROUND: Mapping[str, Sequence[str]] = {
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
# Layers, whether some attend to the picture twice -> what Stability calls the model.
_RELEASES = {
    (24, False): "stable-diffusion-v3-medium",
    (24, True): "stable-diffusion-v3.5-medium",
    (38, False): "stable-diffusion-v3.5-large",
}


class StableDiffusion3(Flow):
    """A transformer conditioned on the last layers but one of two CLIPs, and on T5 behind them.

    Beside them it is given both CLIPs' pooled embeddings.
    """

    controlnet = "SD3ControlNetModel"
    needs = (
        "for Stable Diffusion 3: transformer SD3Transformer2DModel with 16 input channels, vae "
        "AutoencoderKL, text_encoder and text_encoder_2 CLIPTextModelWithProjection, "
        "text_encoder_3 T5EncoderModel or none, and a tokenizer of each"
    )
    kinds: ClassVar[Mapping[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        _T5: "T5EncoderModel",
    }
    tokenizer_kinds: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTokenizer",
        "text_encoder_2": "CLIPTokenizer",
        _T5: "T5TokenizerFast",
    }
    reads: ClassVar[Mapping[str, int]] = {_T5: _T5_READS}
    file_names: ClassVar[Mapping[str, str]] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        _T5: "t5xxl",
    }
    optional = frozenset({_T5})
    clip_back = 1
    embedding_keys: ClassVar[Mapping[str, str]] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
    }
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (*_ATTENTION, _WORDS_ASK),
        "attention+mlp": (*_ATTENTION, _WORDS_ASK, *_MLP),
        # Not what modulates the words: its last block orders shift and scale the other way round
        # than the first release, and clients differ in that.
        "full": (*_ATTENTION, _WORDS_ASK, *_MLP, r"norm1\.linear"),
    }

    def __init__(self, base: Base, device: torch.device, folder: ModelFolder) -> None:
        super().__init__(base, device, folder)
        denoiser: Any = self.denoiser
        cells = denoiser.config.pos_embed_max_size * denoiser.config.patch_size
        self.most_pixels = min(self.most_pixels, cells * self.latent_pixels)

    @classmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        there, transformer = classes(model_index), configs.get("transformer", {})
        return (
            all(there.get(name) == kind for name, kind in cls.held(model_index).items())
            and {"tokenizer", "tokenizer_2", "scheduler"} <= there.keys()
            and (_T5 in there) == ("tokenizer_3" in there)
            and transformer.get("in_channels", 16) == cls.latent_channels
        )

    @property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        # Behind the last block the words are dropped, so that nobody reads what they ask there.
        before = "|".join(map(str, range(self.described.get("num_layers", 18) - 1)))
        asks = (rf"transformer_blocks\.(?:{before})\.{_WORDS_ASK}",) if before else ()
        return {
            name: tuple(p for p in patterns if p != _WORDS_ASK) + asks
            for name, patterns in self.lora_presets.items()
        }

    @classmethod
    def layers_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, Sequence[str]]]:
        for number in range(config.num_layers):
            held = {**_BLOCK, **(_BEFORE_LAST if number < config.num_layers - 1 else {})}
            held |= _TWICE if number in config.dual_attention_layers else {}
            ours = f"transformer_blocks.{number}"
            for name, modules in held.items():
                yield f"joint_blocks.{number}.{name}", [f"{ours}.{module}" for module in modules]
        yield from _AROUND.items()

    @classmethod
    def others_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, str]]:
        yield "pos_embed", "pos_embed.pos_embed"
        for number in range(config.num_layers) if config.qk_norm else ():
            norms = {"x_block.attn": "attn.norm_", "context_block.attn": "attn.norm_added_"}
            norms |= (
                {"x_block.attn2": "attn2.norm_"} if number in config.dual_attention_layers else {}
            )
            for theirs, ours in norms.items():
                for what in ("q", "k"):
                    name = f"joint_blocks.{number}.{theirs}.ln_{what}.weight"
                    yield name, f"transformer_blocks.{number}.{ours}{what}.weight"

    @classmethod
    def turned(cls, layer: str, config: Any) -> bool:
        # The last block drops the words, and moves them before as the last layer does the picture.
        last = f"joint_blocks.{config.num_layers - 1}.context_block.adaLN_modulation.1"
        return layer == last or super().turned(layer, config)

    def right_cells(self) -> int | None:
        cells: int = self.described.get("sample_size", 128) ** 2
        return cells

    def encode_image(self, pixels: Tensor) -> Tensor:
        edge = max(pixels.shape[-2:])
        if edge > self.most_pixels:
            raise UserError(
                f"data.resolution: {self.label} knows places in pictures of up to "
                f"{self.most_pixels} pixels an edge, and one is {edge}: choose a smaller size"
            )
        return super().encode_image(pixels)

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        import torch
        from torch.nn import functional

        self.warn_of_cuts(prompts)
        layers, pooled = [], []
        for name, encoder in self.teachable.items():
            tokens = _text.tokens(self._tokenizers[name], prompts)
            back = self.clip_back + (self.clip_skip or 0)
            layer, answer = _text.clip_layer(encoder, tokens.input_ids.to(self.device), back)
            layers.append(layer)
            pooled.append(answer.text_embeds)
        clip = torch.cat(layers, dim=-1)
        t5 = self._t5_states(prompts)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {HIDDEN: torch.cat([clip, t5], dim=1), POOLED: torch.cat(pooled, dim=-1)}

    def _t5_states(self, prompts: Sequence[str]) -> Tensor:
        """Return T5's states [B, length, width], zeros where the base has no T5."""
        import torch

        if _T5 not in self._encoders:
            config: Any = self.denoiser.config
            shape = len(prompts), _T5_READS, config.joint_attention_dim
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        spelled = [self.spell(prompt) for prompt in prompts]
        tokens = _text.tokens(self._tokenizers[_T5], spelled)
        # The base was trained without the mask: what fills up the length is read as well.
        states: Tensor = self.text_encoders[_T5](tokens.input_ids.to(self.device))[0]
        return states.to(self.dtype)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self.denoiser(
            hidden_states=noisy.to(self.device, self.dtype),
            timestep=self.levels(timesteps) * len(self.schedule),
            encoder_hidden_states=conditioning[HIDDEN].to(self.device, self.dtype),
            pooled_projections=conditioning[POOLED].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def drawing(self, prompt: str, negative_prompt: str, guidance_scale: float) -> dict[str, Any]:
        asked = super().drawing(prompt, negative_prompt, guidance_scale)
        asked |= {} if self.clip_skip is None else {"clip_skip": self.clip_skip}
        clip = self._tokenizers["text_encoder"]
        for key in ("prompt", "negative_prompt"):
            spelled = asked[key]
            # This pipeline alone does not know that a word may have several vectors.
            if spelled and (whole := words.expand(clip, spelled)) != spelled:
                asked |= {key: whole, f"{key}_2": whole, f"{key}_3": spelled}
        return asked

    def pipeline(self, scheduler: str | None = None) -> Any:
        from diffusers import StableDiffusion3Pipeline

        encoders = {_T5: None, **self.text_encoders}
        return StableDiffusion3Pipeline(
            transformer=self.denoiser,
            vae=self.vae,
            **encoders,
            **{_text.tokenizer_name(name): self._tokenizers.get(name) for name in encoders},
            scheduler=make_scheduler(self.scheduler, scheduler),
        )

    def facts(self) -> dict[str, str]:
        config: Any = self.denoiser.config
        layers, width = config.num_layers, config.num_attention_heads * config.attention_head_dim
        release = _RELEASES.get((layers, bool(config.dual_attention_layers)))
        if release is None or width != 64 * layers:  # the topology alone
            release = f"stable-diffusion-v3-topology-{layers}x{width}"
        return {
            "modelspec.architecture": release,
            "ss_base_model_version": "sd3" if "topology" not in release else release,
            "ss_v2": "False",
            **self.base_facts(),
        }
