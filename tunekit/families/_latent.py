"""What every family over latents shares: a VAE, a denoiser, text encoders, a scheduler.

A family says which components it has (`kinds`), and what is its own: recognition, the prompt's way,
the prediction, the pipeline, the names of files.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError
from tunekit.families import _text
from tunekit.families._parts import Parts, dtype_of, scheduler
from tunekit.families.base import Description, Family, PromptCutWarning
from tunekit.modelfolder import ModelFolder

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor, nn

    from tunekit.changes.joined import Piece
    from tunekit.diffusion import Schedule
    from tunekit.schema import Base


class Latent(Family):
    """A family whose base is a diffusers folder, or described by one.

    Read in this order: tokenizers and scheduler, from which the schedule; then all components, so
    that a damaged file is found now and not in an hour.
    """

    kinds: ClassVar[Mapping[str, str]]
    """Component by diffusers name -> its class's name in diffusers or transformers."""
    tokenizer_kinds: ClassVar[Mapping[str, str]]
    """Text encoder -> its tokenizer's class's name in transformers."""
    reads: ClassVar[Mapping[str, int]] = {}
    """How many tokens a text encoder is given that would take any number of them, such as T5."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Text encoders that a base of this family may lack."""
    partial_files: ClassVar[bool] = False
    """Whether a base in one file may lack components, which are then read from `base.config`."""
    denoiser_part: ClassVar[str] = "unet"
    """The denoiser's diffusers name."""
    clip_back: ClassVar[int | None] = None
    """How many layers before CLIP's last are read where base.clip_skip says nothing; None: it
    cannot say anything."""

    def __init__(self, base: Base, device: torch.device, folder: ModelFolder) -> None:
        self.label = folder.label
        self.device = device
        self.dtype = dtype_of(base)
        kinds = self.held(folder.model_index)
        self._encoders = tuple(name for name in kinds if name in self.tokenizer_kinds)
        self._tokenizers = self._read_tokenizers(folder)
        self.scheduler: Any = scheduler(folder, self.scheduler_settings(base, folder))
        self.schedule = self.read_schedule()
        self._parts = Parts(
            folder, kinds, base, device, self.denoiser_part, self.file_table, self.partial_files
        )
        self.components()
        self._other_vae = base.vae
        if base.vae is not None:
            self._check_vae(folder)
        self.clip_skip = base.clip_skip
        if base.clip_skip is not None:
            self._check_clip_skip(base.clip_skip)
        self.default_resolution = self.resolution(folder)
        blocks = folder.configs["vae"].get("block_out_channels", [64])
        self.latent_pixels: int = 2 ** (len(blocks) - 1)
        """How many pixels wide and high a latent's cell is."""
        self.denoiser: nn.Module = self._parts[self.denoiser_part]

    @classmethod
    def held(cls, model_index: Mapping[str, Any]) -> dict[str, str]:
        """Return `kinds` without what this base lacks."""
        there = classes(model_index)
        return {
            name: kind
            for name, kind in cls.kinds.items()
            if name in there or name not in cls.optional
        }

    @classmethod
    def _read_tokenizers(cls, folder: ModelFolder) -> dict[str, Any]:
        held = cls.held(folder.model_index)
        return {
            encoder: _text.tokenizer(
                folder, encoder, kind, cls.reads.get(encoder, _text.CLIP_READS)
            )
            for encoder, kind in cls.tokenizer_kinds.items()
            if encoder in held
        }

    @classmethod
    def resolution(cls, folder: ModelFolder) -> int:
        """Return the edge in pixels of the pictures that the base was made for."""
        size = folder.configs[cls.denoiser_part].get("sample_size") or 64
        edge: int = size if isinstance(size, int) else max(size)
        blocks = folder.configs["vae"].get("block_out_channels", [64])
        factor: int = 2 ** (len(blocks) - 1)
        return edge * factor

    def file_table(self, name: str, outline: nn.Module) -> Mapping[str, Sequence[Piece]] | None:
        """Return which rows of a component's tensors each tensor of a whole base in one file holds.

        None: diffusers takes the component out of such a file.
        """
        return None

    def _check_vae(self, folder: ModelFolder) -> None:
        """Refuse another VAE than the denoiser could read the latents of."""
        vae: Any = self.vae
        own = folder.configs["vae"]
        told = [
            (vae.config.latent_channels, own.get("latent_channels", 4), "latent channels"),
            (
                len(vae.config.block_out_channels),
                len(own.get("block_out_channels", [64])),
                "levels",
            ),
        ]
        for found, needed, what in told:
            if found != needed:
                raise UserError(
                    f"base.vae: {self._other_vae} has {found} {what}; {self.label} needs {needed}"
                )

    def _check_clip_skip(self, skip: int) -> None:
        if self.clip_back is None:
            raise UserError(f"base.clip_skip: means nothing to {self.label}; leave it out")
        configs: list[Any] = [encoder.config for encoder in self.teachable.values()]
        layers = min(config.num_hidden_layers for config in configs)
        most = layers - 1 - self.clip_back
        if skip > most:
            raise UserError(
                f"base.clip_skip: {skip} leaves nothing of the {layers} layers of {self.label}; "
                f"it can be 1 to {most}"
            )

    def scheduler_settings(self, base: Base, folder: ModelFolder) -> dict[str, Any]:
        """Return what stands in the scheduler's configuration in place of what the folder says."""
        for key in ("prediction", "zero_terminal_snr"):
            if getattr(base, key) is not None:
                raise UserError(f"base.{key}: means nothing to {folder.label}; leave it out")
        return {}

    @abstractmethod
    def read_schedule(self) -> Schedule:
        """Return the schedule the base was trained with, by `self.scheduler`'s configuration."""

    @classmethod
    def describe(cls, folder: ModelFolder) -> Description:
        held = [e for e in cls.tokenizer_kinds if e in cls.held(folder.model_index)]
        folder.bring([_text.tokenizer_name(encoder) for encoder in held], [], None)
        made = cls._read_tokenizers(folder)
        return Description(
            folder.label,
            cls.size_multiple,
            cls.resolution(folder),
            lambda prompt: _text.unread(made, prompt),
            cls.of_words(made),
        )

    @classmethod
    def load(
        cls, base: Base, device: torch.device | str = "cpu", folder: ModelFolder | None = None
    ) -> Self:
        import torch

        folder, device = folder or ModelFolder.open(base), torch.device(device)
        held = cls.held(folder.model_index)
        tokenizers = [_text.tokenizer_name(e) for e in cls.tokenizer_kinds if e in held]
        weighted = () if device.type == "meta" else tuple(held)
        folder.bring([*weighted, *tokenizers, "scheduler"], weighted, base.variant)
        return cls(base, device, folder)

    def base_facts(self) -> dict[str, str]:
        """Return the metadata that says how the recipe's base differs from its files."""
        facts = {}
        if self.clip_skip is not None:
            assert self.clip_back is not None
            # A1111 and sd-scripts count from the last layer, which is 1.
            facts["ss_clip_skip"] = str(self.clip_skip + self.clip_back + 1)
        if self._other_vae is not None:
            facts["ss_vae_name"] = Path(self._other_vae).name
        return facts

    def components(self) -> dict[str, nn.Module]:
        return {name: self._parts[name] for name in self._parts.kinds}

    def alone(self, name: str, dtype: torch.dtype) -> nn.Module:
        return self._parts.alone(name, dtype)

    @property
    def vae(self) -> nn.Module:
        return self._parts["vae"]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {name: self._parts[name] for name in self._encoders}

    def release(self, *components: str) -> None:
        for name in components:
            assert name == "vae" or name in self._encoders, name
        self._parts.release(*components)

    def encode_image(self, pixels: Tensor) -> Tensor:
        import torch

        _, channels, height, width = pixels.shape
        assert channels == 3, pixels.shape
        assert height % self.size_multiple == width % self.size_multiple == 0, pixels.shape
        assert -1.001 <= float(pixels.min()) <= float(pixels.max()) <= 1.001, "pixels leave -1..1"
        vae: Any = self.vae
        # Some autoencoders overflow in half precision, and say so.
        wide = self.dtype == torch.float16 and vae.config.force_upcast
        with torch.no_grad():
            if wide:
                vae.float()
            dtype = torch.float32 if wide else self.dtype
            posterior = vae.encode(pixels.to(self.device, dtype)).latent_dist
            if wide:
                vae.half()
            return self.scaled(posterior.mode().float())

    def scaled(self, latents: Tensor) -> Tensor:
        """Return latents of the autoencoder [B, C, h, w] as the denoiser knows them.

        The pipeline undoes the same before it decodes.
        """
        config: Any = self.vae.config
        # Newer autoencoders also move the latents' middle.
        middle = getattr(config, "shift_factor", None) or 0.0
        known: Tensor = (latents - middle) * config.scaling_factor
        return known

    def cut_words(self, prompt: str) -> str:
        return _text.unread(self._tokenizers, prompt)

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Give a PromptCutWarning for each prompt whose end no text encoder reads."""
        length = max(one.model_max_length for one in self._tokenizers.values())
        for prompt in dict.fromkeys(prompts):
            if cut := self.cut_words(prompt):
                warnings.warn(
                    f"the text encoder reads {length} tokens and never sees the end of this "
                    f'prompt: "{cut}" (of "{prompt}")',
                    PromptCutWarning,
                    stacklevel=3,
                )

    @classmethod
    def of_words(cls, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tokenizers that learn new words: CLIP's, which clients have files for."""
        return {e: one for e, one in tokenizers.items() if cls.kinds[e].startswith("CLIP")}

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        return self.of_words(self._tokenizers)

    def use_tokenizer(self, encoder: str, tokenizer: Any) -> None:
        assert encoder in self.tokenizers, encoder
        self._tokenizers[encoder] = tokenizer

    def tokenization(self) -> str:
        told: dict[str, Any] = {e: _text.told(one) for e, one in self._tokenizers.items()}
        told["clip_skip"] = self.clip_skip
        return json.dumps(told, sort_keys=True, default=str)


def classes(model_index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class's name of each component that a model_index.json says is there."""
    return {
        name: value[1]
        for name, value in model_index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
