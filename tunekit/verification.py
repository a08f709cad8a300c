"""Does an adapter file, in a pipeline that never saw the training, do what the trained model does?

Three measurements, none of which the others could replace. Counting finds tensors that a loader
dropped in silence. Weight changes, module by module, find a wrong strength or a missing module
however small its part in the whole. The prediction is what people get, whatever the adapter kind.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import seeding
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.families import Family

# Allowed distance between file and training, as a share of the change that was learned. Rounding
# to the file's format moves a weight change by about 1e-7 (fp32), 3e-4 (fp16) or 2e-3 (bf16); the
# smallest fault that matters, a strength off by a hundredth, moves it by 1e-2.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 8e-3}
# What two computations of the same prediction may differ by, as a share of the prediction, because
# a base in this format rounds in between. Where that hides the change, weight changes still tell.
NOISE = {"fp32": 5e-6, "fp16": 2e-3, "bf16": 2e-2}
# Below these a format has no finer steps: half the distance of its smallest numbers is what a tiny
# number may be off by, whatever its size (IEEE 754: 2 ** (least exponent - digits)).
FLOOR = {"fp32": 2.0**-150, "fp16": 2.0**-25, "bf16": 2.0**-134}
# The most that these steps may take from the whole of what was learned.
MOST_LOST = 0.1
# A module whose change is less than this share of the usual one is measured as if it were this:
# attention over one place has no gradient, and its change is nothing but the rounding of zero.
LEAST_SHARE = 1e-3
# The least change of the prediction that counts as one. No adapter, or one of zeros, has exactly 0.
LEAST_CHANGE = 1e-6


class VerificationError(UserError):
    """A check of an adapter file failed. `check` is its name, `said` what was found."""

    def __init__(self, check: str, said: str) -> None:
        super().__init__(f'verification failed at "{check}": {said}')
        self.check, self.said = check, said


@dataclass(frozen=True)
class Parity:
    """What was measured, each as a share (0: none, 1: as large as what it is compared with).

    change: the learned change of the prediction against the base's prediction. error: distance of
    the file's prediction from the trained one, against that change. module_error: the same of
    weight changes, for the worst module; None where the kind has no weight changes to compare.
    modules: how many modules were compared. tensors: how many tensors the loader took up.
    """

    change: float
    error: float
    module_error: float | None
    modules: int
    tensors: int


@dataclass(frozen=True, eq=False)
class Probe:
    """What models are asked: noisy latents [B, C, h, w], timesteps [B], and B prompts."""

    prompts: tuple[str, ...]
    noisy: Tensor
    timesteps: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """The trained model's answer [B, C, h, w] to a probe, and its live adapter layers by name."""

    prediction: Tensor
    layers: Mapping[str, Any]


@contextlib.contextmanager
def undisturbed(family: Family, *others: nn.Module) -> Iterator[None]:
    """Compute as in inference and leave no trace: eval mode, no gradient, no autocast.

    Whatever was in training mode is again afterwards. The libraries' warnings are held back
    meanwhile: what they would say of an adapter or a prompt is checked here, or said by us.
    `others`: modules besides denoiser and text encoders.
    """
    import torch
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    components = [family.denoiser, *family.text_encoders.values(), *others]
    training = [m for component in components for m in component.modules() if m.training]
    levels = [log.get_verbosity() for log in logs]
    try:
        for module in training:
            module.training = False
        for log in logs:
            log.set_verbosity_error()
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for module in training:
            module.training = True


def make_probe(family: Family, prompts: Sequence[str], seed: int) -> Probe:
    """Return each of `prompts` at three timesteps: little, half and much noise."""
    import torch

    asked = tuple(prompt for prompt in prompts for _ in range(3))
    last = len(family.schedule) - 1
    timesteps = torch.tensor([last // 10, last // 2, last - last // 10] * len(prompts))
    # A grey picture tells the shape of latents; a small one, because only equality is asked.
    edge = min(family.default_resolution, 32 * family.size_multiple)
    shape = family.encode_image(torch.zeros(1, 3, edge, edge)).shape[1:]
    random = seeding.generator(seed, "verification")
    return Probe(asked, torch.randn(len(asked), *shape, generator=random), timesteps)


def ask(family: Family, probe: Probe) -> Tensor:
    """Return the family's prediction for `probe`: [B, C, h, w] float32 on the CPU."""
    conditioning = family.encode_prompt(probe.prompts)
    return family.predict(probe.noisy, probe.timesteps, conditioning).float().cpu()


def measure(family: Family, probe: Probe) -> Reference:
    """Return what `family`, with its trained adapter attached, makes of `probe`."""
    with undisturbed(family):
        return Reference(ask(family, probe), adapter_layers(family))


def adapter_layers(family: Family) -> dict[str, Any]:
    """Return the peft layers in the denoiser and the text encoders, by component and name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    components = {"denoiser": family.denoiser, **family.text_encoders}
    return {
        f"{component}.{name}": layer
        for component, module in components.items()
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def load_by_diffusers(family: Family, path: Path, name: str) -> int:
    """Load a client's adapter file into `family` by diffusers' own code, as adapter `name`.

    Returns how many tensors it took up: all of the file's. Raises VerificationError where the file
    does not fit, a tensor was left over, or a place for one stayed empty (diffusers only logs the
    second, and draws black pictures after the third); UserError where it is no safetensors file.
    """
    tensors, _ = read_safetensors(path)  # checked here: diffusers would also read a pickle
    with undisturbed(family), warnings.catch_warnings():
        # Several adapters on one base are what is asked for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            family.pipeline().load_lora_weights(
                str(path), adapter_name=name, use_safetensors=True, local_files_only=True
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise VerificationError(
                "loads", f"diffusers cannot load it into {family.label}: {line}"
            ) from fault
    # An alpha is not a place in the model but a number that scales one.
    written = [tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")]
    places = {
        f"{component}.{key}": parameter
        for component, module in {"denoiser": family.denoiser, **family.text_encoders}.items()
        for key, parameter in module.named_parameters()
        if f".{name}." in key
    }
    empty = sorted(key for key, parameter in places.items() if parameter.is_meta)
    if empty:
        raise VerificationError(
            "every tensor is taken up",
            f"the file has nothing for {empty[0].replace(f'.{name}', '')}",
        )
    taken = sum(parameter.numel() for parameter in places.values())
    if len(places) != len(written) or taken != sum(written):
        raise VerificationError(
            "every tensor is taken up",
            f"of {len(written)} tensors ({sum(written)} numbers) diffusers took "
            f"{len(places)} ({taken}) into {family.label}",
        )
    return len(places)


def compare(
    path: Path, fresh: Family, probe: Probe, trained: Reference, file_dtype: str, base_dtype: str
) -> Parity:
    """Load the file at `path` into `fresh`, an untouched base, and compare it with `trained`.

    file_dtype, base_dtype: the number formats of the file and of the base ("fp32", "fp16", "bf16").
    Raises VerificationError at the first check that fails.
    """
    with undisturbed(fresh):
        base = ask(fresh, probe)
        size, change = float(base.norm()), float((trained.prediction - base).norm())
        if not change > LEAST_CHANGE * size:
            raise VerificationError(
                "differs from the base",
                "what was trained predicts what the untouched base predicts: nothing was learned "
                "(a learning rate of 0, or too few steps?)",
            )
        count = load_by_diffusers(fresh, path, "verified")
        tolerance = TOLERANCE[file_dtype]
        if base_dtype != "fp32":  # diffusers holds the file's tensors in the base's format
            tolerance += TOLERANCE[base_dtype]
        floor = FLOOR[file_dtype] + (FLOOR[base_dtype] if base_dtype != "fp32" else 0.0)
        worst, lost = _compare_changes(adapter_layers(fresh), trained.layers, tolerance, floor)
        loaded = ask(fresh, probe)
    distance = float((loaded - trained.prediction).norm())
    tolerance += lost
    if not distance <= tolerance * change + NOISE[base_dtype] * size:  # NaN fails too
        raise VerificationError(
            "predicts as trained",
            f"its prediction is off by {distance / change:.1%} of what was learned, and "
            f"{file_dtype} explains {tolerance:.1%}",
        )
    return Parity(change / size, distance / change, worst, len(trained.layers), count)


def _compare_changes(
    loaded: Mapping[str, Any], trained: Mapping[str, Any], tolerance: float, floor: float
) -> tuple[float | None, float]:
    """Return the worst module's error, and the share of the whole change that rounding explains.

    tolerance: allowed error as a share of a module's change; floor: absolute error that any number
    in the file may have. (None, 0) where the trained adapter is no peft one.
    """
    if not trained:
        return None, 0.0
    check = "changes the weights as trained"
    if missing := sorted(trained.keys() - loaded.keys()):
        raise VerificationError(check, f"nothing in the file is for {_some(missing)}")
    if extra := sorted(loaded.keys() - trained.keys()):
        raise VerificationError(check, f"the file changes {_some(extra)}, which was not trained")
    sizes, distances, floors = {}, {}, {}
    for name, layer in trained.items():
        wanted = _change(layer)  # one module at a time: all of them are as large as the model
        sizes[name] = float(wanted.norm())
        distances[name] = float((_change(loaded[name]) - wanted).norm())
        floors[name] = _rounding(loaded[name], floor)
    whole = math.hypot(*sizes.values())
    least = max(LEAST_SHARE * whole / math.sqrt(len(sizes)), sys.float_info.min)
    scales = {name: max(size, least) for name, size in sizes.items()}
    errors = {name: distances[name] / scale for name, scale in scales.items()}
    excess = {name: errors[name] - floors[name] / scale for name, scale in scales.items()}
    off = sorted((name for name in errors if not excess[name] <= tolerance), key=excess.__getitem__)
    if off:
        raise VerificationError(
            check,
            f"the change of {_some(off[::-1])} is off by {errors[off[-1]]:.1%}, and rounding "
            f"explains {tolerance + errors[off[-1]] - excess[off[-1]]:.1%}",
        )
    lost = math.hypot(*distances.values())
    if not lost <= (tolerance + MOST_LOST) * whole:
        raise VerificationError(
            check,
            f"so little was learned that rounding takes {lost / whole:.0%} of it: "
            "set export.dtype: fp32, or train for longer",
        )
    return max(errors.values()), math.hypot(*floors.values()) / whole if whole else 0.0


def _rounding(layer: Any, floor: float) -> float:
    """Return how far a layer's change moves where each of its numbers is off by `floor`.

    As a norm, of errors that are independent: those of B (out x rank) reach every output through A,
    those of A (rank x in) through B. 0 for kinds of layers that have no such factors.
    """
    moved = [0.0]
    for name in layer.active_adapters if hasattr(layer, "lora_B") else ():
        up, down = (layer.get_submodule(f"{f}.{name}").weight for f in ("lora_B", "lora_A"))
        up, down = up.detach().float().flatten(1), down.detach().float().flatten(1)
        moved.append(len(up) ** 0.5 * float(down.norm()) * abs(layer.scaling[name]))
        moved.append(down.shape[1] ** 0.5 * float(up.norm()) * abs(layer.scaling[name]))
        moved.append((len(up) * down.shape[1]) ** 0.5)  # the product, in the base's format
    return floor * math.hypot(*moved)


def _change(layer: Any) -> Tensor:
    """Return what a peft layer's active adapters add to its weight, float32 on the CPU."""
    total: Tensor = sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
    return total.cpu()


def _some(names: Sequence[str], most: int = 2) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
