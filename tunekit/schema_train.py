"""The training section of a recipe: steps, rates, optimizer, schedule, and what is minimised."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tunekit.schema_memory import Memory, grad_norm
from tunekit.schema_objective import Objective as Objective
from tunekit.section import Decay, Precision, Seed, also

OptimizerName = Literal[
    "adamw",
    "adamw8bit",
    "paged_adamw8bit",
    "lion",
    "lion8bit",
    "adafactor",
    "prodigy",
    "schedulefree_adamw",
    "came",
    "muon",
]
ScheduleName = Literal[
    "constant", "cosine", "cosine_with_restarts", "linear", "polynomial", "warmup_stable_decay"
]

# Optimizers without the two moment decays of `betas`; CAME has three, under optimizer_args.
NO_BETAS = ("adafactor", "came")
# Parameters that keys of the recipe speak of.
_KEYS = {
    "lr": "learning_rate",
    "betas": "betas",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "params": "learning_rate",
}

_SKIPS = 10


def _quarter(values: dict[str, Any]) -> int:
    """Four times in a run, by default."""
    steps = values.get("steps")
    return -(-steps // 4) if isinstance(steps, int) else 1


def _rate(values: dict[str, Any]) -> float:
    """An optimizer's usual rate, by default."""
    return {"prodigy": 1.0, "lion": 2e-5, "lion8bit": 2e-5}.get(values.get("optimizer", ""), 1e-4)


class Train(Memory):
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
    optimizer: OptimizerName = Field(
        "adamw",
        description="The optimizer (docs/training.md says which for what). Those other than "
        "adamw, adafactor and muon need `pip install tunekit[optimizers]`.",
        json_schema_extra=also("optimizer_type", "optim"),
    )
    optimizer_args: dict[str, Any] = Field(
        default_factory=dict,
        strict=False,
        description="More parameters of the optimizer, by its own names, such as `eps: 1.0e-6`; "
        "checked before the run starts.",
        json_schema_extra=also("optimizer_kwargs", "optimizer_params"),
    )
    learning_rate: float = Field(
        default_factory=_rate,
        ge=0,
        le=10,
        description="Peak learning rate of what trains in the denoiser, 0 to 10. Default: 1e-4; "
        "prodigy 1, lion and lion8bit 2e-5.",
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
    weight_decay: float = Field(
        0.01,
        ge=0,
        le=10,
        description="Decoupled weight decay, 0 to 10.",
        json_schema_extra=also("adam_weight_decay"),
    )
    betas: tuple[Decay, Decay] | None = Field(
        None,
        strict=False,
        description="The optimizer's two moment decays, each in 0 to 1 (1 excluded); null: its "
        "own, which are 0.9 and 0.999, of lion and lion8bit 0.9 and 0.99.",
        json_schema_extra=also("adam_beta1", "adam_beta2", "adam_betas"),
    )
    schedule: ScheduleName = Field(
        "constant",
        description="The learning rate after the warm-up: held; lowered to 0 at the last step "
        "along a cosine (with restarts: along `cycles` of them), a line or a power of one; or held "
        "and lowered along a line over the last `decay_steps`.",
        json_schema_extra=also("lr_scheduler", "scheduler", "lr_schedule"),
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps over which the learning rate rises from 0; fewer than steps.",
        json_schema_extra=also("lr_warmup_steps", "warmup"),
    )
    cycles: int = Field(
        1,
        ge=1,
        le=1000,
        description="Cosines of cosine_with_restarts, 1 to 1000.",
        json_schema_extra=also("lr_scheduler_num_cycles", "lr_num_cycles", "num_cycles"),
    )
    power: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Exponent of polynomial, above 0 to 100; 1 is linear.",
        json_schema_extra=also("lr_power", "lr_scheduler_power"),
    )
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="Last steps of warmup_stable_decay, over which the learning rate falls; null: "
        "a fifth of the steps.",
        json_schema_extra=also("lr_decay_steps"),
    )
    max_grad_norm: float = Field(
        default_factory=grad_norm,
        ge=0,
        description="Gradients are scaled down to this norm where they exceed it; 0: never. "
        "Default: 1; 0 with fused_backward.",
        json_schema_extra=also("clip_grad_norm", "grad_clip", "gradient_clip_val"),
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of the forward and backward pass. fp16 and bf16 need a "
        "processor that has them to be fast; what trains is always held in fp32.",
        json_schema_extra=also("mixed_precision"),
    )
    seed: Seed = Field(0, description="Decides every random number of the run, 0 to 2^63 - 1.")
    ema: Decay | None = Field(
        None,
        description="Decay of a running average of what trains, 0 to 1 (1 excluded), usually 0.99 "
        "to 0.9999, less over the first steps; null: no average.",
        json_schema_extra=also("ema_decay", "use_ema", "ema_gamma"),
    )
    ema_export: bool = Field(
        True,
        description="Whether the average is what draws, is scored and is exported; false: what "
        "was trained itself. Checkpoints hold both.",
    )
    objective: Objective = Field(
        default_factory=Objective,
        description="What is minimised; by default the base's own objective.",
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

    keep_last: int | None = Field(
        None,
        ge=1,
        description="Checkpoints that stay, the newest, 1 or more; null: all. An older one goes "
        "when a newer one is whole on the disk.",
        json_schema_extra=also(
            "checkpoints_total_limit", "save_total_limit", "max_step_saves_to_keep"
        ),
    )
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Checkpoints of every so many steps stay beside those of keep_last; a multiple "
        "of checkpoint_every. Null: none does.",
    )
    keep_best: bool = Field(
        False,
        description="Whether samples are judged, and the checkpoint whose samples are most like "
        "the real pictures stays and is exported (docs/runs.md says how). Samples then show every "
        "prompt of the evaluation.",
        json_schema_extra=also("load_best_model_at_end"),
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="Where loss or gradient is no finite number: `stop` before the step is taken, "
        "or `skip` the step.",
    )
    on_spike: Literal["warn", "skip", "stop"] = Field(
        "warn",
        description="Where the loss stands far above what its timesteps usually cost: `warn` and "
        "take the step, `skip` it, or `stop` before it.",
    )
    max_skips: int = Field(
        _SKIPS,
        ge=1,
        description="Steps of a run that on_nonfinite and on_spike may skip, 1 or more; one more "
        "stops it.",
    )

    @field_validator("keep_every")
    @classmethod
    def _beside_the_last(cls, value: int | None, info: ValidationInfo) -> int | None:
        every = info.data.get("checkpoint_every")
        if value is not None and info.data.get("keep_last", 1) is None:
            raise ValueError("has no effect: without keep_last every checkpoint stays")
        if value is not None and every is not None and (every == 0 or value % every):
            raise ValueError(
                f"{value} is not a multiple of checkpoint_every ({every}): none is saved then"
            )
        return value

    @field_validator("keep_best")
    @classmethod
    def _has_samples(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("sample_every") == 0:
            raise ValueError(
                "true needs samples along the way, by which the best is told: set sample_every"
            )
        return value

    @field_validator("max_skips")
    @classmethod
    def _has_skips(cls, value: int, info: ValidationInfo) -> int:
        policies = [info.data.get(key, "skip") for key in ("on_nonfinite", "on_spike")]
        if value != _SKIPS and "skip" not in policies:
            raise ValueError("has no effect: it belongs to on_nonfinite: skip and on_spike: skip")
        return value

    @field_validator("optimizer_args")
    @classmethod
    def _not_keys(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        optimizer = info.data.get("optimizer")
        for word, given in value.items():
            parts = given if isinstance(given, list) else [given]
            if any(isinstance(part, list | dict) for part in parts):
                raise ValueError(f"{word} must be one value or a list of values")
            if word in _KEYS and not (word == "betas" and optimizer in NO_BETAS):
                raise ValueError(f"{word} does not belong here: the key is train.{_KEYS[word]}")
        return value

    @field_validator("learning_rate", "text_encoder_learning_rate")
    @classmethod
    def _suits_prodigy(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("optimizer") == "prodigy" and value and value < 0.01:
            raise ValueError(
                f"{value:g} is too small for prodigy, which finds the rate itself and multiplies "
                "it with this one: leave it out, or set about 1"
            )
        return value

    @field_validator("betas")
    @classmethod
    def _has_betas(cls, value: Any, info: ValidationInfo) -> Any:
        optimizer = info.data.get("optimizer")
        if value is not None and optimizer in NO_BETAS:
            own = "; its three stand under optimizer_args.betas" if optimizer == "came" else ""
            raise ValueError(f"{optimizer} does not have two moment decays{own}: leave it out")
        return value

    @field_validator("schedule")
    @classmethod
    def _suits_optimizer(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("optimizer") == "schedulefree_adamw" and value != "constant":
            raise ValueError(
                f"{value} contradicts schedulefree_adamw, which averages in place of a falling "
                "rate: leave it constant"
            )
        return value

    @field_validator("cycles", "power")
    @classmethod
    def _belongs_to_schedule(cls, value: Any, info: ValidationInfo) -> Any:
        owner = {"cycles": "cosine_with_restarts", "power": "polynomial"}[str(info.field_name)]
        if value != 1 and info.data.get("schedule", owner) != owner:
            raise ValueError(f"has no effect: it belongs to schedule: {owner}")
        return value

    @field_validator("decay_steps")
    @classmethod
    def _leaves_a_plateau(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None:
            return value
        steps, warmup = info.data.get("steps"), info.data.get("warmup_steps", 0)
        if info.data.get("schedule", "warmup_stable_decay") != "warmup_stable_decay":
            raise ValueError("has no effect: it belongs to schedule: warmup_stable_decay")
        if steps is not None and value + warmup > steps:
            raise ValueError(f"{value} and warmup_steps ({warmup}) are more than steps ({steps})")
        return value

    @field_validator("ema")
    @classmethod
    def _one_average(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("optimizer") == "schedulefree_adamw":
            raise ValueError("schedulefree_adamw averages already: set ema to null")
        return value

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
