"""The sections of a recipe that every run has. No torch here: `tunekit validate` answers at once.

A field's description states its unit and its range. ``also(...)`` lists what other trainers call
it: a recipe that uses such a word is refused with the right one as suggestion. ``holds_path(...)``
marks what may be a path: it is looked for from the working directory, then from the recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from tunekit.schema_data import Data as Data
from tunekit.section import Decay, Precision, Seed, Template, distinct, holds_path
from tunekit.section import Section as Section
from tunekit.section import also as also

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
    dtype: Precision = Field(
        "fp32",
        description="Number format the frozen base is held in. fp16 and bf16 halve its memory.",
        json_schema_extra=also("torch_dtype"),
    )
    trust_remote_code: bool = Field(
        False, description="Whether code inside a model folder may run. Only for folders you trust."
    )


def _quarter(values: dict[str, Any]) -> int:
    """Four times in a run, by default."""
    steps = values.get("steps")
    return -(-steps // 4) if isinstance(steps, int) else 1


class Train(Section):
    """How is it trained?"""

    steps: int = Field(
        400,
        ge=1,
        le=10_000_000,
        description="Optimizer steps, 1 to 10,000,000.",
        json_schema_extra=also("max_train_steps", "max_steps", "num_steps", "iterations"),
    )
    batch_size: int = Field(
        4,
        ge=1,
        le=4096,
        description="Pictures per forward pass, 1 to 4096.",
        json_schema_extra=also("train_batch_size", "bs"),
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=4096,
        description="Forward passes per optimizer step, 1 to 4096; a step sees batch_size times "
        "this many pictures.",
        json_schema_extra=also("gradient_accumulation_steps"),
    )
    learning_rate: float = Field(
        1e-4,
        ge=0,
        le=10,
        description="Peak learning rate of what trains in the denoiser, 0 to 10.",
        json_schema_extra=also("lr", "unet_lr"),
    )
    text_encoder_learning_rate: float | None = Field(
        None,
        ge=0,
        le=10,
        description="Peak learning rate of what trains in the text encoder, 0 to 10; null: the "
        "same as learning_rate.",
        json_schema_extra=also("text_encoder_lr", "te_lr"),
    )
    optimizer: Literal["adamw"] = Field(
        "adamw", description="The optimizer.", json_schema_extra=also("optimizer_type")
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        le=10,
        description="Decoupled weight decay, 0 to 10.",
        json_schema_extra=also("adam_weight_decay"),
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999),
        strict=False,
        description="The optimizer's two moment decays, each in 0 to 1 (1 excluded).",
        json_schema_extra=also("adam_beta1", "adam_beta2", "adam_betas"),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="The learning rate after the warm-up: held, or lowered to 0 at the last step "
        "along a cosine or a line.",
        json_schema_extra=also("lr_scheduler", "scheduler", "lr_schedule"),
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps over which the learning rate rises from 0; fewer than steps.",
        json_schema_extra=also("lr_warmup_steps", "warmup"),
    )
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradients are scaled down to this norm where they exceed it; 0: never.",
        json_schema_extra=also("clip_grad_norm", "grad_clip", "gradient_clip_val"),
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of the forward and backward pass. fp16 and bf16 need a "
        "processor that has them to be fast; what trains is always held in fp32.",
        json_schema_extra=also("mixed_precision"),
    )
    seed: Seed = Field(0, description="Decides every random number of the run, 0 to 2^63 - 1.")
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Loss weight min(SNR, gamma) / SNR per timestep (Hang et al. 2023), above 0, "
        "usually 5; null: every timestep weighs the same.",
        json_schema_extra=also("snr_gamma"),
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of a constant added to each channel's noise, 0 to 1, usually 0 to "
        "0.1; helps very dark and very bright pictures.",
    )
    log_every: int = Field(
        1,
        ge=1,
        description="Steps between lines in metrics.jsonl and TensorBoard.",
        json_schema_extra=also("logging_steps", "log_interval"),
    )
    sample_every: int = Field(
        default_factory=_quarter,
        ge=0,
        description="Steps between sample grids, at most steps; there is always one after the last "
        "step. 0: only that one. Default: four in a run.",
        json_schema_extra=also("sample_every_n_steps", "validation_steps"),
    )
    checkpoint_every: int = Field(
        default_factory=_quarter,
        ge=0,
        description="Steps between checkpoints, at most steps; there is always one after the last "
        "step. 0: only that one. Default: four in a run.",
        json_schema_extra=also("checkpointing_steps", "save_every", "save_every_n_steps"),
    )

    @field_validator("warmup_steps", "sample_every", "checkpoint_every")
    @classmethod
    def _within_steps(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is None:
            return value
        if info.field_name == "warmup_steps" and value >= steps:
            raise ValueError(
                f"{value} is not fewer than steps ({steps}): the full rate would never be reached"
            )
        if value > steps:
            raise ValueError(
                f"{value} is more than steps ({steps}) and would never come round; "
                "0 means after the last step only"
            )
        return value


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
    layouts: Annotated[tuple[Literal["diffusers"], ...], AfterValidator(distinct)] = Field(
        ("diffusers",),
        strict=False,
        min_length=1,
        description="Whose naming the files follow, one file each.",
        json_schema_extra=also("save_format", "format"),
    )


class AdapterSettings(Section):
    """What may change? The base of every adapter kind's own settings, which fix `kind`."""

    kind: str = Field(
        description="The adapter kind.",
        json_schema_extra=also("network_module", "type", "network_type", "algo"),
    )

    def trains_text_encoder(self) -> bool:
        """Return whether these settings train anything in a text encoder."""
        return False
