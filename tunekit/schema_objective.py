"""The objective of a recipe: what is minimised, at which timesteps, with which noise."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tunekit.section import Section, also

WEIGHTINGS = ("min_snr_gamma", "soft_min_snr_gamma", "p2_gamma", "debiased")


class Objective(Section):
    """What is minimised: at which timesteps, with which noise, by which measure of error."""

    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = Field(
        None,
        description="What the base predicts, where the recipe is made for one kind of base: "
        "another base is then refused. null: whatever the base was trained for.",
        json_schema_extra=also("prediction_type", "v_parameterization", "parameterization"),
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Whether the noise schedule is stretched to end in pure noise (Lin et al. "
        "2023), which teaches very dark and very bright pictures; for v_prediction bases.",
        json_schema_extra=also("rescale_betas_zero_snr", "ztsnr", "zero_snr"),
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Loss weight min(SNR, gamma) / SNR per timestep (Hang et al. 2023), above 0, "
        "usually 5; null: every timestep weighs the same.",
        json_schema_extra=also("snr_gamma"),
    )
    soft_min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="The same without its corner: gamma / (SNR + gamma) (Crowson et al. 2024), "
        "above 0, usually 5; null: off.",
    )
    p2_gamma: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Loss weight 1 / (1 + SNR)^gamma (Choi et al. 2022), above 0 to 10, usually "
        "0.5 or 1; null: off.",
        json_schema_extra=also("p2_loss_weight_gamma"),
    )
    debiased: bool = Field(
        False,
        description="Loss weight 1 / sqrt(SNR) (Yu et al. 2023).",
        json_schema_extra=also("debiased_estimation_loss", "debiased_estimation"),
    )
    loss: Literal["mse", "huber", "smooth_l1"] = Field(
        "mse",
        description="Measure of error: the square, or one that outliers (watermarks, odd pictures) "
        "bend less (Khrapov et al. 2024).",
        json_schema_extra=also("loss_type"),
    )
    huber_c: float = Field(
        0.1,
        gt=0,
        le=10,
        description="Error at which the Huber losses turn from square to straight, above 0 to 10.",
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "constant",
        description="How huber_c is reached: everywhere the same, or falling from 1 in a clean "
        "picture to huber_c in pure noise.",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of a constant added to each channel's noise, 0 to 1, usually 0 to "
        "0.1; helps very dark and very bright pictures.",
    )
    pyramid_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of each coarser level of noise against the finer one before (Whitaker "
        "2023), 0 to 1, usually 0.3 to 0.8; 0: plain noise.",
        json_schema_extra=also(
            "multires_noise_discount", "multires_noise_iterations", "pyramid_noise_discount"
        ),
    )
    input_perturbation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of noise that the denoiser sees and is not asked for (Ning et al. "
        "2023), 0 to 1, usually 0.1.",
        json_schema_extra=also("ip_noise_gamma", "input_perturbation_gamma"),
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "beta"] = Field(
        "uniform",
        description="How often which timestep is trained: all alike; logit_normal and mode (Esser "
        "et al. 2024) the middle more often; beta as its two numbers say.",
        json_schema_extra=also("weighting_scheme", "timestep_type", "timestep_distribution"),
    )
    logit_mean: float = Field(
        0.0,
        ge=-10,
        le=10,
        description="Middle of logit_normal, -10 to 10; above 0 more noise.",
    )
    logit_std: float = Field(
        1.0, gt=0, le=10, description="Width of logit_normal, above 0 to 10.",
        json_schema_extra=also("sigmoid_scale"),
    )  # fmt: skip
    mode_scale: float = Field(
        1.29, ge=-1, le=1.75, description="Strength of mode, -1 to 1.75; 0: uniform."
    )
    beta_a: float = Field(
        1.0, gt=0, le=100, description="First number of beta; larger: more noise."
    )
    beta_b: float = Field(
        1.0, gt=0, le=100, description="Second number of beta; larger: less noise."
    )
    timestep_bias: Literal["early", "late"] | None = Field(
        None,
        description="Which end is trained more often: `early` timesteps, with little noise, hold "
        "detail; `late` ones, with much, hold composition.",
        json_schema_extra=also("timestep_bias_strategy", "content_or_style"),
    )
    timestep_bias_multiplier: float = Field(
        2.0, gt=0, le=1000, description="How many times as often, above 0 to 1000."
    )
    timestep_bias_portion: float = Field(
        0.25, gt=0, lt=1, description="Which share of the timesteps, above 0, below 1."
    )
    min_timestep: int = Field(
        0,
        ge=0,
        description="The first timestep that is trained, from 0 (no noise).",
        json_schema_extra=also("timestep_bias_begin"),
    )
    max_timestep: int | None = Field(
        None,
        ge=0,
        description="The last timestep that is trained, such as 999; null: the schedule's last.",
        json_schema_extra=also("timestep_bias_end"),
    )
    shift: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Moves the timesteps of a flow towards the noise (above 1), 0.01 to 100, "
        "usually 1 to 6.",
        json_schema_extra=also("discrete_flow_shift", "flow_shift", "timestep_shift"),
    )
    resolution_shift: bool = Field(
        False,
        description="Whether the timesteps of a flow move further towards the noise the larger a "
        "picture is: as the base itself draws them, or by the square root of their areas.",
        json_schema_extra=also("flux_shift", "dynamic_shift", "use_dynamic_shifting"),
    )

    @field_validator("zero_terminal_snr")
    @classmethod
    def _has_a_terminal(cls, value: bool, info: ValidationInfo) -> bool:
        prediction = info.data.get("prediction")
        if value and (why := zero_terminal_fault(prediction)):
            raise ValueError(why)
        return value

    @field_validator(*WEIGHTINGS)
    @classmethod
    def _one_weighting(cls, value: Any, info: ValidationInfo) -> Any:
        if not value:
            return value
        before = [key for key in WEIGHTINGS if key != info.field_name and info.data.get(key)]
        if before:
            raise ValueError(f"stands beside {before[0]}; one weight a timestep: keep one of them")
        if info.data.get("prediction") == "flow":
            raise ValueError(FLOW_HAS_NO_WEIGHT)
        return value

    @field_validator("huber_c", "huber_schedule")
    @classmethod
    def _belongs_to_huber(cls, value: Any, info: ValidationInfo) -> Any:
        return cls._belongs(value, info, "loss", ("huber", "smooth_l1"))

    @field_validator("logit_mean", "logit_std", "mode_scale", "beta_a", "beta_b")
    @classmethod
    def _belongs_to_sampling(cls, value: Any, info: ValidationInfo) -> Any:
        owner = {"l": "logit_normal", "m": "mode", "b": "beta"}[str(info.field_name)[0]]
        return cls._belongs(value, info, "timestep_sampling", (owner,))

    @field_validator("timestep_bias_multiplier", "timestep_bias_portion")
    @classmethod
    def _belongs_to_bias(cls, value: Any, info: ValidationInfo) -> Any:
        return cls._belongs(value, info, "timestep_bias", ("early", "late"))

    @field_validator("pyramid_noise")
    @classmethod
    def _one_lift(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("noise_offset"):
            raise ValueError(
                "stands beside noise_offset; the pyramid's coarsest level moves the mean already: "
                "keep one of them"
            )
        return value

    @field_validator("max_timestep")
    @classmethod
    def _not_before_min(cls, value: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("min_timestep", 0)
        if value is not None and value < first:
            raise ValueError(f"{value} is below min_timestep ({first}): no timestep is left")
        return value

    @field_validator("shift", "resolution_shift")
    @classmethod
    def _only_flow_shifts(cls, value: Any, info: ValidationInfo) -> Any:
        shifts = value if isinstance(value, bool) else value != 1.0
        if shifts and info.data.get("prediction") not in (None, "flow"):
            raise ValueError(ONLY_FLOW_SHIFTS)
        return value

    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo, key: str, owners: tuple[str, ...]) -> Any:
        """Refuse a value that would have no effect; the default may stand there."""
        assert info.field_name is not None
        default = cls.model_fields[info.field_name].default
        if key in info.data and info.data[key] not in owners and value != default:
            raise ValueError(f"has no effect: it belongs to {key}: {' or '.join(owners)}")
        return value


FLOW_HAS_NO_WEIGHT = (
    "weighs timesteps by the signal-to-noise ratio of diffusion, and a flow's loss is even already "
    "over its straight way; choose timestep_sampling instead"
)
ONLY_FLOW_SHIFTS = (
    "moves the timesteps of a flow; a diffusion schedule has its noise levels built in: choose "
    "timestep_sampling or timestep_bias instead"
)


def zero_terminal_fault(prediction: str | None) -> str | None:
    """Return why a schedule of this prediction cannot end in pure noise; None where it can."""
    if prediction == "epsilon":
        return (
            "cannot be with epsilon: from pure noise the noise says nothing about the picture; it "
            "needs a v_prediction base"
        )
    return "a flow ends in pure noise by itself" if prediction == "flow" else None
