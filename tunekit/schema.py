"""The sections of a recipe that every run has. No torch here: `tunekit validate` answers at once.

A field's description states its unit and its range. ``also(...)`` lists what other trainers call
it: a recipe that uses such a word is refused with the right one as suggestion. ``holds_path(...)``
marks what may be a path: it is looked for from the working directory, then from the recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, field_validator

from tunekit.schema_data import Data as Data
from tunekit.schema_tokens import Token as Token
from tunekit.schema_tokens import clashes as clashes
from tunekit.schema_train import Train as Train
from tunekit.section import Precision, Seed, Template, distinct, holds_path
from tunekit.section import Section as Section
from tunekit.section import also as also

Layout = Literal["diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""Every naming of adapter files, that of the recommended file first."""
Layouts = Annotated[tuple[Layout, ...], Field(strict=False, min_length=1), AfterValidator(distinct)]

Quantized = Literal["nf4", "int8", "int8_torchao", "fp8_torchao"]

BUNDLED = "toybox"
"""The name of the models that come with the package."""

PROMPTS: dict[str, tuple[str, ...]] = {
    "subject": (
        "a {trigger} {class}",
        "a {trigger} {class} on the beach",
        "a {trigger} {class} in the snow",
        "a {trigger} {class} in a forest",
        "a {trigger} {class} at night, pixel art",
    ),
    "style": (
        "a red robot, {trigger} {class}",
        "a blue cat on the beach, {trigger} {class}",
        "a green house in the snow, {trigger} {class}",
        "a yellow car at night, {trigger} {class}",
    ),
}


class Base(Section):
    """Which model?"""

    model: str = Field(
        min_length=1,
        description="The model to teach: `toybox` (bundled, 64 pixels), a diffusers folder, a "
        "`.safetensors` file, or a Hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`.",
        json_schema_extra=also(
            "pretrained_model_name_or_path", "name_or_path", "model_name", "base_model"
        )
        | holds_path("model"),
    )
    config: str | None = Field(
        None,
        min_length=1,
        description="Diffusers folder with the configuration and tokenizer of a single file (its "
        "weights are not needed); null: those of the Hub model that diffusers takes for the file.",
        json_schema_extra=holds_path("folder"),
    )
    family: str | None = Field(
        None, description="The model's family; null: recognised from its files and said."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub id; null: the Hub's main branch."
    )
    variant: str | None = Field(
        None, description="Weight variant of a Hub id or folder, such as `fp16`; null: none."
    )
    vae: str | None = Field(
        None,
        min_length=1,
        description="Another VAE than the base's own: its diffusers folder, a model's folder that "
        "has one, or a `.safetensors` file; null: the base's own.",
        json_schema_extra=also("vae_name_or_path", "pretrained_vae_model_name_or_path")
        | holds_path("part"),
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=31,
        description="How many of CLIP's last layers a prompt skips, from 1, as diffusers counts; "
        "A1111 and sd-scripts count one more. null: as the base was trained.",
    )
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None,
        description="What the base predicts, where its scheduler's configuration says it wrong; "
        "null: what that says.",
        json_schema_extra=also("v_pred", "v_parameterization", "prediction_type"),
    )
    zero_terminal_snr: bool | None = Field(
        None,
        description="Whether the base was trained to start from pure noise (Lin et al. 2023), "
        "where its scheduler's configuration says it wrong; then drawn with DDIM where its own "
        "sampler cannot. null: what that says.",
        json_schema_extra=also("ztsnr", "rescale_betas_zero_snr"),
    )
    dtype: Precision = Field(
        "fp32",
        description="Number format the frozen base is held in. fp16 and bf16 halve its memory.",
        json_schema_extra=also("torch_dtype"),
    )
    quantize: Quantized | None = Field(
        None,
        description="What the frozen Linears of the denoiser are held as in training, to save "
        "memory: 4 bits a weight (`nf4`) or 8, by bitsandbytes or torchao; null: as dtype says. "
        "Needs `pip install tunekit[quantize]`.",
        json_schema_extra=also(
            "load_in_4bit", "load_in_8bit", "quantization", "quantization_config", "quantize_base"
        ),
    )
    trust_remote_code: bool = Field(
        False, description="Whether code inside a model folder may run. Only for folders you trust."
    )


def _prompts(values: dict[str, Any]) -> tuple[str, ...]:
    return PROMPTS[values.get("kind", "subject")]


class Evaluate(Section):
    """How do we know?"""

    kind: Literal["subject", "style"] = Field(
        "subject",
        description="What was taught: a `subject` is compared by identity, a `style` by manner.",
    )
    prompts: Annotated[tuple[Template, ...], AfterValidator(distinct)] = Field(
        default_factory=_prompts,
        strict=False,
        min_length=1,
        description="What is drawn for samples and scores. {trigger} and {class} are filled in; "
        "every prompt holds {trigger}. Default: a list that suits kind.",
        json_schema_extra=also("validation_prompt", "validation_prompts", "sample_prompts"),
    )
    seeds: Annotated[tuple[Seed, ...], AfterValidator(distinct)] = Field(
        (1, 2),
        strict=False,
        min_length=1,
        description="Each prompt is drawn once with each seed, 0 to 2^63 - 1.",
        json_schema_extra=also("validation_seeds", "num_validation_images"),
    )
    steps: int = Field(
        25,
        ge=1,
        le=1000,
        description="Denoising steps a picture, 1 to 1000.",
        json_schema_extra=also("num_inference_steps", "sample_steps", "inference_steps"),
    )
    guidance_scale: float = Field(
        5.0,
        ge=0,
        le=100,
        description="Classifier-free guidance, 0 to 100; 1: none.",
        json_schema_extra=also("guidance", "cfg_scale", "cfg"),
    )
    scheduler: str | None = Field(
        None,
        description="Sampler by name, such as `ddim` or `euler`; null: the base's own.",
        json_schema_extra=also("sampler", "noise_scheduler"),
    )
    negative_prompt: str = Field(
        "", description="What pictures should not show.", json_schema_extra=also("neg", "negative")
    )
    subject_encoder: str = Field(
        BUNDLED,
        min_length=1,
        description="Image encoder that tells likeness: `toybox` (bundled), a folder or a Hub id, "
        "such as `facebook/dino-vits16`.",
        json_schema_extra=holds_path("model"),
    )
    clip: str = Field(
        BUNDLED,
        min_length=1,
        description="CLIP that tells prompt fidelity: `toybox` (bundled), a folder or a Hub id, "
        "such as `openai/clip-vit-base-patch32`.",
        json_schema_extra=holds_path("model"),
    )

    @field_validator("prompts")
    @classmethod
    def _hold_trigger(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in value:
            if "{trigger}" not in prompt:
                raise ValueError(
                    f'"{prompt}" lacks {{trigger}}: the scores compare it with and without the word'
                )
        return value


class Export(Section):
    """Which files come out?"""

    dtype: Precision = Field(
        "fp16",
        description="Number format of the exported tensors.",
        json_schema_extra=also("save_precision", "save_dtype"),
    )
    layouts: Layouts | None = Field(
        None,
        description="Whose naming the files follow, one file each: `diffusers`, or `kohya` (which "
        "ComfyUI, sd-scripts and A1111 read); null: every one that carries what was trained.",
        json_schema_extra=also("save_format", "format"),
    )
    license: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$",
        description="Licence that files and model card state, by the Hub's word for it, such as "
        "`openrail++`, `apache-2.0` or `other`; null: none is stated. The base's own may bind you.",
        json_schema_extra=also("licence", "metadata_license"),
    )
    thumbnail: bool = Field(
        False,
        description="Whether the files carry a small picture, drawn with them (in the metadata, as "
        "`modelspec.thumbnail`).",
        json_schema_extra=also("metadata_thumbnail"),
    )


class AdapterSettings(Section):
    """What may change? The base of every adapter kind's own settings, which fix `kind`."""

    kind: str = Field(
        description="The adapter kind.",
        json_schema_extra=also("network_module", "type", "network_type", "algo"),
    )

    trains_weights: ClassVar[bool] = False
    """Whether copies of the base's own weights train, and not something small beside them."""

    def trains_text_encoder(self) -> bool:
        """Return whether these settings train anything in a text encoder."""
        return False

    def layout_fault(self, layout: str) -> str | None:
        """Return why `layout` cannot carry what these settings train; None where it can."""
        return None

    def quantize_fault(self, kind: str) -> str | None:
        """Return why these cannot be learned on a base quantised so; None where they can."""
        return None

    def layouts(self, chosen: tuple[Layout, ...] | None = None) -> tuple[Layout, ...]:
        """Return the layouts to export in: `chosen`, or every one that carries these settings."""
        if chosen is not None:
            return chosen
        return tuple(name for name in LAYOUTS if self.layout_fault(name) is None)
