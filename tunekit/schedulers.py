"""Samplers by the names that people type, each for the bases whose prediction it can follow.

All of them are diffusers' own, made of the configuration of the base's scheduler. Whatever
diffusers calls compatible with that is accepted under its class name too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.errors import UserError, did_you_mean
from tunekit.modelfolder import loading

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
    "dpm++_2m_karras": "DPMSolverMultistepScheduler",
    "dpm++_2m_sde": "DPMSolverMultistepScheduler",
    "dpm++_2m_sde_karras": "DPMSolverMultistepScheduler",
    "dpm++_2s": "DPMSolverSinglestepScheduler",
    "dpm++_sde": "DPMSolverSinglestepScheduler",
    "dpm++_sde_karras": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""For bases of diffusion."""
FLOW_SCHEDULERS: Mapping[str, str] = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""For bases that are a flow, whose levels of noise the others do not know."""
NAMES: tuple[str, ...] = tuple(sorted(SCHEDULERS.keys() | FLOW_SCHEDULERS.keys()))
STOCHASTIC = frozenset({"ddpm", "euler_a", "lcm"} | {name for name in NAMES if "_sde" in name})
"""Those that add noise on the way: with more steps, what they draw does not settle."""

_KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
_SINGLE: Mapping[str, Any] = {"lower_order_final": True}  # what diffusers would set, and warn
# Names that stand for a class with settings of its own.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dpm++_2m_karras": _KARRAS,
    "dpm++_2m_sde": _SDE,
    "dpm++_2m_sde_karras": {**_SDE, **_KARRAS},
    "dpm++_2s": _SINGLE,
    "dpm++_sde": {**_SINGLE, **_SDE},
    "dpm++_sde_karras": {**_SINGLE, **_SDE, **_KARRAS},
}
# diffusers has not written these for bases that predict the picture itself.
_NOT_OF_SAMPLES = frozenset(
    f"{name}Scheduler"
    for name in ("EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
)


def make_scheduler(default: Any, name: str | None) -> Any:
    """Return a fresh scheduler with `default`'s configuration: of its class, or the one named.

    Raises UserError, with what there is, for a name that is not known, and with the reason for one
    that cannot follow what the base predicts.
    """
    if name is None:
        return type(default).from_config(default.config)
    flow = type(default).__name__.startswith("FlowMatch")
    named, others = (FLOW_SCHEDULERS, SCHEDULERS) if flow else (SCHEDULERS, FLOW_SCHEDULERS)
    word = name.lower()
    there = f"there is: {', '.join(named)}, or a diffusers class name"
    if word in others and word not in named:
        why = (
            f"it predicts the velocity of a flow, whose levels of noise {word} does not know"
            if flow
            else f"it predicts {default.config.prediction_type}, and {word} follows a flow"
        )
        raise UserError(f"scheduler: {word} is none for this base: {why}; {there}")
    kind = _kind(default, named.get(word, name), {*named.values()})
    if kind is None:
        known = [*named, *(one.__name__ for one in default.compatibles)]
        raise UserError(
            f'there is no scheduler "{name}" for this base{did_you_mean(name, known)}; {there}'
        )
    options = dict(_OPTIONS.get(word, {}))
    if kind.__name__ == SCHEDULERS["heun"] or "use_karras_sigmas" in options:
        _refuse_pure_noise(default, name)
    if not flow and default.config.prediction_type == "sample" and kind.__name__ in _NOT_OF_SAMPLES:
        raise UserError(
            f"scheduler: {name} cannot draw with this base, which predicts the picture itself; "
            "ddim, dpm++_2m, euler and unipc can"
        )
    if flow and not kind.__name__.startswith("FlowMatch"):
        shift = default.config.get("shift", 1.0)
        options |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }
    with loading(f"scheduler: {name}"):  # some need packages of their own
        return kind.from_config(default.config, **options)


def _kind(default: Any, wanted: str, named: set[str]) -> Any:
    """Return the class called `wanted` if this base's scheduler may become one; None if not."""
    import diffusers

    known = {kind.__name__: kind for kind in [type(default), *default.compatibles]}
    if wanted in named:
        return getattr(diffusers, wanted)
    return known.get(wanted)


def _refuse_pure_noise(default: Any, name: str) -> None:
    """Refuse schedulers that reckon with the highest noise level where it is next to infinite.

    Heun's method corrects a step by its slope at the end, and Karras et al. 2022 space the levels
    by their size. Pure noise breaks both: the one draws false colours, the other counts past its
    last level.
    """
    left = getattr(default, "alphas_cumprod", None)
    if left is not None and float(left[-1]) < 1e-4:
        raise UserError(
            f"scheduler: {name} cannot draw with this base, whose noising ends in pure noise; "
            "ddim, dpm++_2m, euler and unipc can"
        )
