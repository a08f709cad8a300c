"""Does an adapter file, in a pipeline that never saw the training, do what the trained model does?

Three measurements, none of which the others could replace. Counting finds tensors that a loader
dropped in silence. Weight changes, module by module, find a wrong strength or a missing module
however small its part in the whole. The prediction is what people get, whatever the adapter kind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import seeding
from tunekit.errors import some
from tunekit.loading import Loaded, VerificationError, combined, load_file, undisturbed

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.adapters import Adapter
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


@dataclass(frozen=True)
class Parity:
    """What was measured, each as a share (0: none, 1: as large as what it is compared with).

    change: the learned change of the prediction against the base's prediction. error: distance of
    the file's prediction from the trained one, against that change. module_error: the same of
    weight changes, for the worst module. modules: how many weights were compared. tensors: how many
    tensors the loader took up.
    """

    change: float
    error: float
    module_error: float
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
    """The trained model's answer [B, C, h, w] to a probe, and what gives its weights' changes.

    base: the answer before training, where a fresh base would read other tokens in the prompts.
    Nothing here holds the trained base, which may go.
    """

    probe: Probe
    prediction: Tensor
    changes: Mapping[str, Callable[[Family], Tensor]]
    base: Tensor | None = None


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


def measure(
    family: Family, adapter: Adapter, probe: Probe, *, new_words: bool = False
) -> Reference:
    """Return what `family`, with its trained `adapter` attached, makes of `probe`.

    new_words: whether it has words that an untouched base does not know; then what they add is
    told from what they were before training.
    """
    with undisturbed(family):
        before = None
        if new_words:
            adapter.set_scale(0.0)
            try:
                before = ask(family, probe)
            finally:
                adapter.set_scale(1.0)
        return Reference(probe, ask(family, probe), adapter.changes(), before)


def compare(
    paths: Sequence[Path],
    fresh: Family,
    trained: Reference,
    file_dtype: str,
    base_dtype: str,
) -> Parity:
    """Load the files at `paths` into `fresh`, a base that was not trained; compare with `trained`.

    file_dtype, base_dtype: the number formats of the file and of the base ("fp32", "fp16", "bf16").
    Raises VerificationError at the first check that fails.
    """
    with undisturbed(fresh):
        base = ask(fresh, trained.probe) if trained.base is None else trained.base
        size, change = float(base.norm()), float((trained.prediction - base).norm())
        if not change > LEAST_CHANGE * size:
            raise VerificationError(
                "differs from the base",
                "what was trained predicts what the untouched base predicts: nothing was learned "
                "(a learning rate of 0, or too few steps?)",
            )
        loaded = combined([load_file(fresh, p, f"verified_{n}") for n, p in enumerate(paths)])
        tolerance = TOLERANCE[file_dtype]
        if base_dtype != "fp32":  # diffusers holds the file's tensors in the base's format
            tolerance += TOLERANCE[base_dtype]
        floor = FLOOR[file_dtype] + (FLOOR[base_dtype] if base_dtype != "fp32" else 0.0)
        wanted = {name: partial(change, fresh) for name, change in trained.changes.items()}
        worst, lost = _compare_changes(loaded, wanted, tolerance, floor)
        predicted = ask(fresh, trained.probe)
    distance = float((predicted - trained.prediction).norm())
    tolerance += lost
    if not distance <= tolerance * change + NOISE[base_dtype] * size:  # NaN fails too
        raise VerificationError(
            "predicts as trained",
            f"its prediction is off by {distance / change:.1%} of what was learned, and "
            f"{file_dtype} explains {tolerance:.1%}",
        )
    return Parity(change / size, distance / change, worst, len(trained.changes), loaded.tensors)


def _compare_changes(
    loaded: Loaded, trained: Mapping[str, Callable[[], Tensor]], tolerance: float, floor: float
) -> tuple[float, float]:
    """Return the worst module's error, and the share of the whole change that rounding explains.

    tolerance: allowed error as a share of a module's change; floor: absolute error that any number
    in the file may have.
    """
    check = "changes the weights as trained"
    unmoved = {name for name in trained.keys() - loaded.changes.keys() if not trained[name]().any()}
    if missing := sorted(trained.keys() - loaded.changes.keys() - unmoved):
        raise VerificationError(check, f"nothing in the file is for {some(missing, 2)}")
    if extra := sorted(loaded.changes.keys() - trained.keys()):
        raise VerificationError(check, f"the file changes {some(extra, 2)}, which was not trained")
    sizes, distances, floors = {}, {}, {}
    for name in sorted(trained.keys() - unmoved):
        wanted = trained[name]()  # one module at a time: all of them are as large as the model
        sizes[name] = float(wanted.norm())
        distances[name] = float((loaded.changes[name]() - wanted).norm())
        floors[name] = loaded.rounding(name, floor)
    whole = math.hypot(*sizes.values())
    least = max(LEAST_SHARE * whole / math.sqrt(len(sizes)), sys.float_info.min)
    scales = {name: max(size, least) for name, size in sizes.items()}
    errors = {name: distances[name] / scale for name, scale in scales.items()}
    excess = {name: errors[name] - floors[name] / scale for name, scale in scales.items()}
    off = sorted((name for name in errors if not excess[name] <= tolerance), key=excess.__getitem__)
    if off:
        raise VerificationError(
            check,
            f"the change of {some(off[::-1], 2)} is off by {errors[off[-1]]:.1%}, and rounding "
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
