"""What the families of rectified flow share: a transformer, levels of noise, names in files.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.changes.joined import Joint, Piece
from tunekit.errors import UserError
from tunekit.families._latent import Latent
from tunekit.families._parts import TIED
from tunekit.modelfolder import ModelFolder, loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tunekit.diffusion import FlowSchedule
    from tunekit.schema import Base

_TEXT_ATTENTION = (r"self_attn\.(q|k|v|out)_proj",)
_TEXT_MLP = (r"mlp\.fc[12]",)
HIDDEN = "encoder_hidden_states"
"""The key of the prompt's states, and the transformer's argument that takes them."""
POOLED = "pooled_projections"
"""The same of the pooled embeddings."""


class Flow(Latent):
    """A transformer that predicts the velocity of a rectified flow, over latents of 16 channels.

    Prompts go through CLIP and T5; adapters and new words may change the CLIPs alone, because no
    client reads a file for T5. T5 reads a new word as the letters it is written with.
    """

    latent_channels = 16
    size_multiple = 16
    denoiser_part = "transformer"
    kohya_by_diffusers = False
    partial_files = True
    file_names: ClassVar[Mapping[str, str]]
    """Text encoder -> what files that hold a whole base call it."""
    text_lora_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _TEXT_ATTENTION,
        "attention+mlp": _TEXT_ATTENTION + _TEXT_MLP,
        "full": _TEXT_ATTENTION + _TEXT_MLP,
    }
    schedule: FlowSchedule
    described: Mapping[str, Any]
    """The denoiser's configuration, as the folder has it."""

    def __init__(self, base: Base, device: torch.device, folder: ModelFolder) -> None:
        self.described = folder.configs[self.denoiser_part]
        super().__init__(base, device, folder)
        self.joints = tuple(self._joints(self.denoiser))

    @classmethod
    @abstractmethod
    def layers_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield what the first release calls a layer, and ours whose rows it holds, in order.

        config: the denoiser's.
        """

    @classmethod
    @abstractmethod
    def others_of_the_first_release(cls, config: Any) -> Iterator[tuple[str, str]]:
        """Yield what the first release calls a tensor that is of no layer, and what we do."""

    @classmethod
    def turned(cls, layer: str, config: Any) -> bool:
        """Say whether the first release's layer shifts before it scales, where ours scales first.

        Their halves then stand the other way round.
        """
        return layer == "final_layer.adaLN_modulation.1"

    @classmethod
    def _joints(cls, denoiser: nn.Module) -> Iterator[Joint]:
        config: Any = denoiser.config
        for name, modules in cls.layers_of_the_first_release(config):
            pieces: list[Piece] = []
            for module in modules:
                layer: Any = denoiser.get_submodule(module)
                rows: int = getattr(layer, "out_features", None) or layer.out_channels
                half = rows // 2
                spans = [(half, rows), (0, half)] if cls.turned(name, config) else [(0, rows)]
                pieces += [Piece(module, first, last) for first, last in spans]
            yield Joint(name, tuple(pieces))

    def file_table(self, name: str, outline: nn.Module) -> Mapping[str, Sequence[Piece]] | None:
        if name == self.denoiser_part:
            return dict(self._of_denoiser(outline))
        if name not in self.file_names:
            return None
        clip = self.kinds[name].startswith("CLIP")
        top = f"text_encoders.{self.file_names[name]}.transformer."
        return {
            f"{top}{_wide(key) if clip else key}": [Piece(key, 0, len(tensor))]
            for key, tensor in outline.state_dict().items()
            if key not in TIED
        }

    def _of_denoiser(self, outline: nn.Module) -> Iterator[tuple[str, Sequence[Piece]]]:
        state = outline.state_dict()
        for joint in self._joints(outline):
            for which in ("weight", "bias"):
                if f"{joint.modules[0]}.{which}" in state:
                    yield (
                        f"{joint.name}.{which}",
                        [Piece(f"{p.module}.{which}", p.first, p.last) for p in joint.pieces],
                    )
        for theirs, ours in self.others_of_the_first_release(outline.config):
            yield theirs, [Piece(ours, 0, len(state[ours]))]

    def read_schedule(self) -> FlowSchedule:
        """Return the levels of noise that the scheduler's configuration has, with its own shift.

        Level t of T is sigma = s (t + 1) / (T + (s - 1) (t + 1)) with the shift s (Esser et al.
        2024, eq. 23); a base that shifts by the size of what it draws has s = 1 here.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        from tunekit.diffusion import FlowSchedule

        where, config = "scheduler/scheduler_config.json", self.scheduler.config
        if not type(self.scheduler).__name__.startswith("FlowMatch"):
            raise UserError(
                f"{self.label}: {where} is {type(self.scheduler).__name__}, which does not say the "
                "noise levels of a flow; it needs FlowMatchEulerDiscreteScheduler"
            )
        if config.get("invert_sigmas"):
            raise UserError(f"{self.label}: {where} counts its noise backwards (invert_sigmas)")
        if not config.get("shift", 1.0) > 0:
            raise UserError(f"{self.label}: {where} says shift {config['shift']}: it is above 0")
        with loading(f"{self.label}: {where}"):
            trained = FlowMatchEulerDiscreteScheduler.from_config(config)
        sigmas = trained.sigmas.flip(0).float().contiguous()
        return FlowSchedule(sigmas, self.right_cells(), self.shifts())

    def right_cells(self) -> int | None:
        """Return the latent cells (h * w) at which the levels are right as they are."""
        return None

    def shifts(self) -> Callable[[int], float] | None:
        """Return latent cells -> the shift that the base itself draws with; None: it does not."""
        return None

    def levels(self, timesteps: Tensor) -> Tensor:
        """Return the share of noise at `timesteps` [B], as told to the denoiser: [B] float32."""
        at: Tensor = self.schedule.sigmas.to(self.device)[timesteps.to(self.device)]
        return at

    @property
    def teachable(self) -> dict[str, nn.Module]:
        return {
            name: encoder
            for name, encoder in self.text_encoders.items()
            if self.kinds[name].startswith("CLIP")
        }

    def client_name(self, layout: str, component: str, module: str) -> str:
        folder = self.denoiser_part if component == "denoiser" else component
        clip = component != "denoiser" and self.kinds[component].startswith("CLIP")
        name = _wide(module) if clip else module
        if layout == "diffusers":
            return f"{folder}.{name}"
        if layout == "kohya":
            # Of the denoiser as OneTrainer writes and ComfyUI reads them, for what is not joined.
            under = name.replace(".", "_")
            if component == "denoiser":
                return f"lora_{folder}_{under}"
            # sd-scripts calls T5 the third, also where there are two.
            clips = [*self.tokenizer_kinds].index(component) + 1
            return f"lora_te{3 if component not in self.teachable else clips}_{under}"
        raise UserError(f'export.layouts: {self.label} is not written as "{layout}"')


def _wide(name: str) -> str:
    """Return the name in a CLIP that the wider world knows.

    transformers 5 dropped a level from CLIPTextModel; every client still looks for it.
    """
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
