"""What the families with a U-Net share: what adapters may change, and the schedule of diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from tunekit.errors import UserError
from tunekit.families._latent import Latent
from tunekit.modelfolder import loading

if TYPE_CHECKING:
    from tunekit.diffusion import NoiseSchedule

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

    def read_schedule(self) -> NoiseSchedule:
        """Return the schedule the base was trained with, whatever sampler the folder names."""
        from diffusers import DDPMScheduler

        from tunekit.diffusion import PREDICTION_TYPES, NoiseSchedule

        with loading(f"{self.label}: scheduler/scheduler_config.json"):
            trained = DDPMScheduler.from_config(self.scheduler.config)
        kind = trained.config.prediction_type
        if kind not in PREDICTION_TYPES:
            raise UserError(
                f"{self.label}: scheduler/scheduler_config.json says prediction_type {kind}; "
                f"tunekit trains {', '.join(PREDICTION_TYPES)}"
            )
        return NoiseSchedule(trained.alphas_cumprod.float(), kind)
