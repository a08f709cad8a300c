"""The loop's state: what goes on as if never stopped, and which weights draw meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looped import Load, Pictures, assert_equal, attach, settings, untimed
from safetensors.torch import load, save

from tunekit.errors import UserError
from tunekit.optim import saved_bytes
from tunekit.train import Loop, TrainingError


def loop(load_tiny: Load, **values: Any) -> tuple[Loop, Pictures]:
    family = load_tiny("sd", prediction_type="v_prediction")
    chosen = settings(**{"steps": 6, "schedule": "cosine"} | values)
    return Loop(family, attach(family), chosen), Pictures(family)


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw with an average": {"ema": 0.9},
    "an average that is kept and not drawn": {"ema": 0.9, "ema_export": False},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "muon": {"optimizer": "muon"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedulefree_adamw", "schedule": "constant"},
}


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_and_three_more_are_six(load_tiny: Load, way: str) -> None:
    """Bit for bit, by way of files, with all that is drawn at random."""
    values = WAYS[way] | {"objective": {"input_perturbation": 0.1, "timestep_sampling": "mode"}}
    whole, pictures = loop(load_tiny, **values)
    wanted = list(whole.run(pictures))

    half, pictures = loop(load_tiny, **values)
    steps = half.run(pictures)
    for _ in range(3):
        next(steps)
    saved = {name: load(save(tensors)) for name, tensors in half.state().items()}
    steps.close()

    resumed, pictures = loop(load_tiny, **values)
    resumed.load_state(saved)
    assert_equal(saved["adapter"], resumed.adapter.state())
    assert untimed(list(resumed.run(pictures, 3))) == untimed(wanted[3:])
    ended, other = whole.state(), resumed.state()
    assert ended.keys() == other.keys()
    for name in ended:
        assert_equal(ended[name], other[name])


@pytest.mark.parametrize(("way", "differ"), [
    ("adamw", False),
    ("adamw with an average", True),
    ("an average that is kept and not drawn", False),
    ("schedule-free", True),
])  # fmt: skip
def test_between_steps_the_average_draws(load_tiny: Load, way: str, differ: bool) -> None:
    whole, pictures = loop(load_tiny, **WAYS[way])
    list(whole.run(pictures))
    state = whole.state()
    assert ("trained" in state) is differ
    if differ:
        assert any(
            not torch.equal(state["adapter"][k], state["trained"][k]) for k in state["trained"]
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_as_large_as_it_is_said(load_tiny: Load, way: str) -> None:
    one, pictures = loop(load_tiny, **WAYS[way])
    next(one.run(pictures))
    held = 0
    for name, tensors in one.state().items():
        for key, tensor in tensors.items():
            # Tables of 256 numbers are as good as nothing; a step's count is a number.
            counts = name != "optimizer" or (key.startswith("tensor/") and tensor.ndim)
            if name != "guards" and counts and "qmap" not in key:
                held += tensor.numel() * tensor.element_size()
    assert sum(saved_bytes(one.settings, one.adapter.parameter_groups())) == held


def test_an_average_does_not_change_what_is_trained(load_tiny: Load) -> None:
    plain, pictures = loop(load_tiny)
    records = list(plain.run(pictures))
    averaged, pictures = loop(load_tiny, ema=0.9)
    assert untimed(list(averaged.run(pictures))) == untimed(records)
    assert_equal(averaged.state()["trained"], plain.state()["adapter"])
    assert_equal(averaged.state()["ema"], averaged.state()["adapter"])


def test_an_average_may_begin_with_a_resumed_run(load_tiny: Load) -> None:
    plain, pictures = loop(load_tiny)
    list(plain.run(pictures))
    averaged, _ = loop(load_tiny, ema=0.9)
    averaged.load_state(plain.state())
    assert_equal(averaged.state()["ema"], plain.state()["adapter"])


def test_a_checkpoint_without_the_optimizer_is_refused(load_tiny: Load) -> None:
    one, _ = loop(load_tiny)
    with pytest.raises(UserError, match="holds no optimizer state"):
        one.load_state({"adapter": one.adapter.state()})


def test_a_run_in_which_nothing_moves_stops_however_often_it_goes_on(load_tiny: Load) -> None:
    """What the guards remember of the steps so far is in every checkpoint."""
    family = load_tiny("sd", prediction_type="v_prediction")
    adapter, pictures = attach(family), Pictures(family)
    chosen = settings(steps=30, learning_rate=0.0, batch_size=4)
    saved: dict[str, Any] = {}
    for step in range(20):
        one = Loop(family, adapter, chosen)
        if saved:
            one.load_state(saved)
        next(one.run(pictures, step))
        saved = {name: load(save(tensors)) for name, tensors in one.state().items()}
    one = Loop(family, adapter, chosen)
    one.load_state(saved)
    with pytest.raises(TrainingError, match=r"step 21 of 30: nothing .* 20 steps: .* rate is 0"):
        next(one.run(pictures, 20))


@pytest.mark.parametrize(
    "objective",
    [
        {"zero_terminal_snr": True},
        {"soft_min_snr_gamma": 5.0},
        {"p2_gamma": 1.0},
        {"debiased": True},
        {"loss": "huber", "huber_schedule": "snr"},
        {"loss": "smooth_l1"},
        {"pyramid_noise": 0.8},
        {"input_perturbation": 0.1},
        {"timestep_sampling": "logit_normal"},
        {"timestep_bias": "late"},
        {"max_timestep": 300},
    ],
)
def test_every_objective_is_trained_with(load_tiny: Load, objective: dict[str, Any]) -> None:
    """Another objective is another loss, and the same one the same, at the same untouched base."""
    plain, pictures = loop(load_tiny, steps=1)
    (before,) = plain.run(pictures)
    losses = []
    for _ in range(2):
        other, pictures = loop(load_tiny, steps=1, objective=objective)
        (record,) = other.run(pictures)
        losses.append(record.loss)
    assert losses[0] == losses[1]
    assert losses[0] != before.loss


def test_an_objective_that_contradicts_the_base_is_refused_at_once(load_tiny: Load) -> None:
    with pytest.raises(UserError, match=r"train\.objective\.shift: moves the timesteps of a flow"):
        loop(load_tiny, objective={"shift": 3.0})
