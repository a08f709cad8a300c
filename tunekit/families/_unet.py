"""What the families with a U-Net share: what adapters may change, and the schedule of diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit import singlefile
from tunekit.errors import UserError
from tunekit.families._latent import Latent
from tunekit.modelfolder import ModelFolder, loading, say

if TYPE_CHECKING:
    from tunekit.diffusion import NoiseSchedule
    from tunekit.schema import Base

_ATTENTION = (r"attn[12]\.to_(q|k|v|out\.0)",)
_MLP = (r"ff\.net\.(0\.proj|2)", r"attentions\.\d+\.proj_(in|out)")
_CONVOLUTIONS = (
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)",
    r"(down|up)samplers\.0\.conv",
)
_TEXT_ATTENTION = (r"self_attn\.(q|k|v|out)_proj",)
_TEXT_MLP = (r"mlp\.fc[12]",)
HIDDEN = "encoder_hidden_states"
"""The key under which the hidden states travel, and the U-Net's argument that takes them."""


class UNet(Latent):
    """UNet2DConditionModel over AutoencoderKL latents, conditioned on CLIP text encoders."""

    controlnet = "ControlNetModel"
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
    schedule: NoiseSchedule

    def layers_read(self, encoder: str) -> int:
        """Return how many of a text encoder's layers, from the first on, what it gives hangs on."""
        config: Any = self.text_encoders[encoder].config
        layers: int = config.num_hidden_layers
        return layers - (self.clip_back or 0) - (self.clip_skip or 0)

    def text_presets(self, encoder: str) -> Mapping[str, tuple[str, ...]]:
        config: Any = self.text_encoders[encoder].config
        read = self.layers_read(encoder)
        if read == config.num_hidden_layers:
            return self.text_lora_presets
        layers = f"layers\\.(?:{'|'.join(map(str, range(read)))})"
        return {
            name: tuple(f"{layers}\\.{pattern}" for pattern in patterns)
            for name, patterns in self.text_lora_presets.items()
        }

    @staticmethod
    def variant_of(unet: Mapping[str, Any]) -> str | None:
        """Return what a U-Net is that takes more than noisy latents; None where it takes these."""
        kinds = {9: "an inpainting base, whose denoiser is given a mask beside the picture"}
        kinds |= {7: "an upscaler", 8: "a base that edits pictures by instructions"}
        channels = unet.get("in_channels", 4)
        return kinds.get(channels) if isinstance(channels, int) else None

    def scheduler_settings(self, base: Base, folder: ModelFolder) -> dict[str, Any]:
        prediction, zero = base.prediction, base.zero_terminal_snr
        marks = singlefile.marks(folder.weights) if folder.weights is not None else frozenset()
        if prediction is None and "prediction" in marks:
            prediction = "v_prediction"
            say(f"{folder.label}: is marked as predicting a velocity, and taken so")
        if zero is None and "zero_terminal_snr" in marks:
            zero = True
            say(f"{folder.label}: is marked as starting from pure noise, and taken so")
        settings: dict[str, Any] = {}
        if prediction is not None:
            settings["prediction_type"] = prediction
        if zero is not None:
            settings["rescale_betas_zero_snr"] = zero
        if zero:
            settings["timestep_spacing"] = "trailing"  # so that drawing begins at the last timestep
        return settings

    def read_schedule(self) -> NoiseSchedule:
        """Return the schedule the base was trained with, whatever sampler the folder names."""
        from diffusers import DDPMScheduler

        from tunekit.diffusion import PREDICTION_TYPES, NoiseSchedule

        if "sigma_data" in self.scheduler.config:
            raise UserError(
                f"{self.label}: was trained with EDM's noise levels (its scheduler is "
                f"{type(self.scheduler).__name__}), which tunekit does not know"
            )
        with loading(f"{self.label}: scheduler/scheduler_config.json"):
            trained = DDPMScheduler.from_config(self.scheduler.config)
        kind = trained.config.prediction_type
        if kind not in PREDICTION_TYPES:
            raise UserError(
                f"{self.label}: scheduler/scheduler_config.json says prediction_type {kind}; "
                f"tunekit trains {', '.join(PREDICTION_TYPES)}"
            )
        alphas = trained.alphas_cumprod.float()
        if alphas.ndim != 1 or not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise UserError(
                f"{self.label}: scheduler/scheduler_config.json says betas of which no schedule "
                "comes: what they leave of the picture is not always between nothing and all"
            )
        if kind == "epsilon" and bool((alphas == 0).any()):
            raise UserError(
                f"{self.label}: its schedule ends in pure noise, which says nothing of the "
                "picture, so it cannot predict epsilon: set base.prediction: v_prediction or "
                "base.zero_terminal_snr: false"
            )
        return NoiseSchedule(alphas, kind)
