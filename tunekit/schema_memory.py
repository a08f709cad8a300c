"""What of the training section saves memory or time and changes nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from tunekit.section import Section, also

# Key of the training section -> what fused_backward leaves it at, and why.
_ALONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_grad_norm": ((0,), "the whole gradient is never there to be measured before a step"),
    "gradient_accumulation": ((1,), "every pass takes its steps at once; raise batch_size"),
    "precision": (
        ("fp32", "bf16"),
        "the loss scale of fp16 is only known to be wrong when steps are taken",
    ),
    "optimizer": (
        ("adamw", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "adafactor", "came", "muon"),
        "each parameter steps alone, and this one looks at all of them or has modes",
    ),
    "on_nonfinite": (("stop",), "steps are taken when a gradient is found wrong"),
    "on_spike": (("warn",), "steps are taken when the loss is found wrong"),
}
# Key of the training section -> what fsdp leaves it at, and why.
_IN_PARTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "fused_backward": ((False,), "a part's gradient is only there once all processes have met"),
    "compile": ((False,), "blocks are put together from their parts between compiled ones"),
    "optimizer": (
        ("adamw",),
        "others look at whole matrices, or at numbers in blocks of their own",
    ),
    "precision": (
        ("fp32", "bf16"),
        "each process would find fp16's loss scale wrong by its own parts alone",
    ),
}


def grad_norm(values: dict[str, Any]) -> float:
    """The usual limit of the gradient's norm; none where it is never whole."""
    return 0.0 if values.get("fused_backward") else 1.0


class Memory(Section):
    """Keys of the training section, which begins with them."""

    gradient_checkpointing: bool = Field(
        False,
        description="Whether activations inside the denoiser are computed twice and not kept: less "
        "memory, a third to two thirds more time, the same gradient to the bit.",
        json_schema_extra=also("activation_checkpointing", "use_gradient_checkpointing"),
    )
    fsdp: bool = Field(
        False,
        description="Whether the processes of `--processes` share out the weights that learn, "
        "their gradient and the optimizer's state, instead of holding a copy each (FSDP2). For "
        "kind full without a text encoder; with adamw.",
        json_schema_extra=also("fully_shard", "use_fsdp", "zero_stage"),
    )
    fused_backward: bool = Field(
        False,
        description="Whether each parameter takes its step within the backward pass, and its "
        "gradient is gone at once: memory where whole weights learn. Not with max_grad_norm, "
        "gradient_accumulation, fp16 or data.prior.",
        json_schema_extra=also("fused_backward_pass", "fused_optimizer_groups"),
    )
    compile: bool = Field(
        False,
        description="Whether the blocks that the denoiser repeats are compiled for training "
        "(torch.compile): a minute at the start, faster steps; needs a C++ compiler. Not the same "
        "to the last bit.",
        json_schema_extra=also("torch_compile", "compile_model", "dynamo_backend"),
    )

    @field_validator(*_ALONE, *_IN_PARTS, check_fields=False)
    @classmethod
    def _suits_what_saves_memory(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        for key, table in (("fsdp", _IN_PARTS), ("fused_backward", _ALONE)):
            left, why = table.get(name, ((value,), ""))
            if info.data.get(key) and value not in left:
                allowed = " or ".join(map(_yaml, left))
                raise ValueError(
                    f"{_yaml(value)} and {key} exclude each other: {why}; set {allowed}, or "
                    f"{key}: false"
                )
        return value


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
