"""The contract of a model family. No torch is imported until a model is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from tunekit import words as wordlist
from tunekit.errors import UserError
from tunekit.modelfolder import ModelFolder
from tunekit.schedulers import make_scheduler

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor, nn

    from tunekit.changes.joined import Joint
    from tunekit.diffusion import Schedule
    from tunekit.schema import Base, Token

__all__ = [
    "Conditioning",
    "Description",
    "Family",
    "ModelFolder",
    "PromptCutWarning",
    "make_scheduler",
]

# What a prompt becomes for the denoiser: tensors [B, ...] under keys that the family defines.
Conditioning: TypeAlias = "dict[str, Tensor]"


class PromptCutWarning(UserWarning):
    """A prompt is longer than the text encoder reads; the message names the words it never saw."""


@dataclass(frozen=True)
class Description:
    """What a base says of itself before any weight is read.

    size_multiple: pictures' edges are multiples of this many pixels. default_resolution: pixels.
    cut_words: as `Family.cut_words`. tokenizers: as `Family.tokenizers`, this description's own.
    """

    label: str
    size_multiple: int
    default_resolution: int
    cut_words: Callable[[str], str]
    tokenizers: Mapping[str, Any] = field(default_factory=dict)

    def add_words(self, tokens: Sequence[Token], class_noun: str) -> None:
        """Let the tokenizers read a recipe's new words; `cut_words` counts their vectors from then.

        Raises UserError, all faults at once, for names that the base knows or that hide its own
        words, for starts it does not know or that are too many, and for a family that learns no
        new words.
        """
        if not self.tokenizers:
            raise UserError(f"tokens: {self.label} is of a family that learns no new words")
        faults: dict[str, None] = {}
        for tokenizer in self.tokenizers.values():
            for token in tokens:
                faults |= dict.fromkeys(_word_faults(tokenizer, token, class_noun))
        if faults:
            raise UserError("\n".join(faults))
        for tokenizer in self.tokenizers.values():
            wordlist.add(tokenizer, {token.name: token.vectors for token in tokens})


class Family(ABC):
    """A kind of base model: facts declared as class attributes, and the few methods they leave.

    An instance holds one base, frozen (`requires_grad` False, `eval()`), on one device. The
    denoiser is always in memory; VAE and text encoders may be released, after which the next use
    loads them again from the folder.
    """

    name: ClassVar[str]
    """The registered name: the file's name, set by the class's definition."""
    needs: ClassVar[str]
    """What a folder must hold to be of this family, in words for an error message."""
    latent_channels: ClassVar[int]
    size_multiple: ClassVar[int]
    """Pictures' edges are multiples of this many pixels."""
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """Preset name -> patterns for module names of the denoiser (see adapters/base.py)."""
    text_lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """The same for text encoders."""
    embedding_keys: ClassVar[Mapping[str, str]] = {}
    """Text encoder -> what files of new words call its vectors; empty where there is only one."""
    joints: Sequence[Joint] = ()
    """The denoiser's weights that sd-scripts joins, or calls otherwise than `client_name`: a plain
    LoRA is written so in the layout "kohya". Made when the base is loaded, and stays."""
    kohya_by_diffusers: ClassVar[bool] = True
    """Whether diffusers' loader for this family takes LoRA by the names of the kohya layout."""
    controlnet: ClassVar[str] = ""
    """The class of its ControlNets, by its diffusers name; empty: it takes none."""
    most_pixels: int = 8192
    """The longest edge that is drawn."""

    device: torch.device
    dtype: torch.dtype
    denoiser: nn.Module
    schedule: Schedule
    default_resolution: int
    """Edge of the pictures the base was made for, in pixels."""
    label: str
    """What the user called the model."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    @classmethod
    @abstractmethod
    def recognise(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> bool:
        """Say whether a folder with this model_index.json and these component configs is ours."""

    @classmethod
    def relative(
        cls, model_index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        """Return, in words, which relative of this family a folder is that cannot be taught."""
        return None

    @classmethod
    @abstractmethod
    def describe(cls, folder: ModelFolder) -> Description:
        """Return what a folder of this family says by its configuration and tokenizers alone."""

    @classmethod
    @abstractmethod
    def load(
        cls, base: Base, device: torch.device | str = "cpu", folder: ModelFolder | None = None
    ) -> Self:
        """Load the base, frozen, in `base.dtype` whatever the files hold; only from safetensors.

        On the device "meta" the components are built from their configurations: names, shapes and
        classes are there, and no weight is read.
        """

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """Return every component by its diffusers name, loaded if it is not in memory."""

    @abstractmethod
    def alone(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Return a component by its diffusers name, read from the files anew, on the CPU.

        Nothing else of the base is read for it, and nothing of it is kept: also of a base on
        "meta" the component has its weights.
        """

    @property
    @abstractmethod
    def vae(self) -> nn.Module:
        """The autoencoder, loaded if it is not in memory."""

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their diffusers names, loaded if they are not in memory."""

    @property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """`lora_presets` for this base, without modules whose output nobody reads.

        What is there could learn nothing.
        """
        return self.lora_presets

    @property
    def teachable(self) -> dict[str, nn.Module]:
        """The text encoders that adapters may change, by their diffusers names."""
        return self.text_encoders

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the latents the denoiser is trained on, without gradient.

        pixels: [B, 3, H, W] in -1..1, H and W multiples of `size_multiple`. Returns [B, C, h, w]
        float32: the mean of the posterior (so the same picture gives the same latents), scaled.
        """

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `prompts`: [B, ...] tensors.

        Differentiable in whatever trains in the text encoders. A prompt longer than the encoder
        reads is cut as the family's pipeline cuts it, and a PromptCutWarning names the words.
        """

    @abstractmethod
    def cut_words(self, prompt: str) -> str:
        """Return the end of `prompt` that the text encoder never sees, or '' where all fits."""

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """The tokenizers by the name of their text encoder; none: it learns no new words."""
        return {}

    def use_tokenizer(self, encoder: str, tokenizer: Any) -> None:
        """Read prompts for a text encoder with this tokenizer, such as one with new words."""
        raise UserError(f"tokens: {self.label} is of a family that learns no new words")

    def spell(self, prompt: str) -> str:
        """Return `prompt` with new words spelled as the family's pipeline looks for them."""
        for tokenizer in self.tokenizers.values():
            prompt = wordlist.spell(tokenizer, prompt)
        return prompt

    @abstractmethod
    def tokenization(self) -> str:
        """Return as text which tokens a prompt becomes, and which layers of the encoders are read.

        With the encoders' weights it decides `encode_prompt`; conditioning is cached by both.
        """

    def with_sizes(self, conditioning: Conditioning, sizes: Tensor) -> Conditioning:
        """Return `conditioning` with what the denoiser is told of pictures' sizes and crops.

        sizes: [B, 6] int64, as in `Batch.sizes`. As it is, where the denoiser is told nothing;
        where it is told, `predict` without them takes the pictures for whole.
        """
        return conditioning

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction: [B, C, h, w] and [B] int64 -> [B, C, h, w]."""

    @abstractmethod
    def pipeline(self, scheduler: str | None = None) -> Any:
        """Return the diffusers pipeline around these same modules.

        `scheduler`: a name of `schedulers.NAMES` or a diffusers class name; None: the base's own.
        Every call returns a scheduler of its own. Raises UserError on a name that is unknown or
        cannot follow what the base predicts.
        """

    def drawing(self, prompt: str, negative_prompt: str, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that say what is drawn, and how strongly.

        prompt, negative_prompt: as people write them. An empty negative prompt is none: the
        pipeline then takes what it takes without one.
        """
        return {
            "prompt": self.spell(prompt),
            "negative_prompt": self.spell(negative_prompt) or None,
            "guidance_scale": guidance_scale,
        }

    @abstractmethod
    def release(self, *components: str) -> None:
        """Drop "vae" and text encoders by name from memory; the next use loads them again.

        A component that trains cannot be released: what it learned would be lost.
        """

    @abstractmethod
    def client_name(self, layout: str, component: str, module: str) -> str:
        """Return what a client calls a module in an adapter file.

        `component`: "denoiser" or a text encoder's name; `module`: its dotted name in here.
        Raises UserError for a layout this family cannot be written in.
        """

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return the metadata that says which base an adapter file belongs to."""

    def text_presets(self, encoder: str) -> Mapping[str, tuple[str, ...]]:
        """Return `text_lora_presets` for one text encoder, without layers that nobody reads.

        What is there could learn nothing.
        """
        return self.text_lora_presets

    def component(self, name: str) -> nn.Module:
        """Return "denoiser" or a text encoder by name."""
        return self.denoiser if name == "denoiser" else self.text_encoders[name]


def _word_faults(tokenizer: Any, token: Token, class_noun: str) -> Iterator[str]:
    name, vectors, start = token.name, token.vectors, token.start_words(class_noun)
    if problem := wordlist.fault(tokenizer, name):
        yield f"tokens: {problem}"
    if vectors > (room := tokenizer.model_max_length - 2):
        yield f"tokens: {name} has {vectors} vectors, and a prompt has room for {room}"
    if start is None:
        return
    try:
        ids = wordlist.known(tokenizer, start)
    except UserError as fault:
        yield f"tokens: init of {name}: {fault}"
        return
    if len(ids) > vectors:
        yield (
            f'tokens: init of {name}: "{start}" is {len(ids)} words, and {name} has {vectors} '
            "vectors: give it as many, or start at fewer words"
        )
