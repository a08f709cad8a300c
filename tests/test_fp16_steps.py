"""Training in fp16, by the real scaler and real fp16: on the CPU, where a run itself refuses it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from looped import Load, Pictures, assert_equal, attach, settings, untimed

from tunekit.data.dataset import Batch
from tunekit.train import Loop, TrainingError

HIGH = 26
SCALE = 2.0**HIGH  # three steps' halving or more too large for this model in fp16


class Spoilt(Pictures):
    """Pictures of which those of some steps are no numbers."""

    at: tuple[int, ...] = ()

    def __call__(self, step: int, micro: int) -> Batch:
        batch = super().__call__(step, micro)
        if step not in self.at:
            return batch
        return dataclasses.replace(batch, latents=torch.full_like(batch.latents, math.nan))


@pytest.fixture
def made(load_tiny: Load, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a maker of loops that do what an fp16 run on a GPU does, by torch's scaler of CPUs."""

    def make(scale: float, **values: Any) -> tuple[Loop, Spoilt]:
        family = load_tiny("sd")
        loop = Loop(family, attach(family), settings(**{"steps": 8} | values))
        accelerator = loop.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.native_amp = True
        accelerator._optimizers.clear()
        loop._stepper = accelerator.prepare(loop.optimizer)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        return loop, Spoilt(family)

    return make


def test_overflows_are_the_scalers_and_no_skips(made: Any) -> None:
    """A scale far too large: steps are left out until it is small enough, then all are taken."""
    loop, pictures = made(SCALE)
    start, records = loop.adapter.state(), []
    for record in loop.run(pictures):
        records.append(record)
        if record.skipped:
            assert_equal(start, loop.adapter.state())
    skipped = [record.skipped for record in records]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True), "first those that overflow, then none"
    assert loop.accelerator.scaler.get_scale() == 2.0 ** (HIGH - sum(skipped))
    assert loop.guards.skips == 0
    assert all(record.noticed is None for record in records)
    assert all(math.isfinite(record.loss) for record in records)
    assert any(not torch.equal(start[k], v) for k, v in loop.adapter.state().items())


def test_a_loss_that_is_no_number_is_skipped_and_counted(made: Any) -> None:
    loop, pictures = made(2.0**8, on_nonfinite="skip", max_skips=1)
    pictures.at = (2,)
    before: dict[str, Any] = {}
    for record in loop.run(pictures):
        if record.step == 3:
            assert record.skipped
            assert record.noticed is not None
            assert "it was not taken (skip 1 of 1)" in record.noticed
            assert_equal(before, loop.adapter.state())
        else:
            assert not record.skipped
        before = loop.adapter.state()
    assert loop.guards.skips == 1
    assert loop.accelerator.scaler.get_scale() == 2.0**8, "the scale was not at fault"
    assert all(bool(value.isfinite().all()) for value in before.values())


def test_past_the_skips_that_are_allowed_it_stops(made: Any) -> None:
    loop, pictures = made(2.0**8, on_nonfinite="skip", max_skips=1)
    pictures.at = (1, 2)
    steps = loop.run(pictures)
    next(steps), next(steps)
    good = loop.adapter.state()
    with pytest.raises(TrainingError, match=r"step 3 of 8: .* raise train\.max_skips: 1 steps"):
        next(steps)
    assert_equal(good, loop.adapter.state())


def test_a_gradient_that_overflows_at_the_lowest_scale_is_a_fault(made: Any) -> None:
    """No scale helps there: the policy of the recipe holds."""
    loop, pictures = made(1.0, on_nonfinite="skip", max_skips=5, steps=3)
    hook = next(iter(loop.adapter.trained().values())).register_hook(
        lambda gradient: gradient * math.inf
    )
    start = loop.adapter.state()
    records = [next(steps := loop.run(pictures))]
    assert records[0].skipped
    assert loop.guards.skips == 1
    assert_equal(start, loop.adapter.state())
    hook.remove()
    records.append(next(steps))
    assert not records[1].skipped
    assert any(not torch.equal(start[k], v) for k, v in loop.adapter.state().items())


def test_it_goes_on_with_its_scale(made: Any) -> None:
    """Bit for bit, from a step in which the scale was still being found."""
    whole, pictures = made(SCALE)
    wanted = list(whole.run(pictures))
    half, pictures = made(SCALE)
    steps = half.run(pictures)
    for _ in range(3):
        next(steps)
    saved = half.state()
    steps.close()
    assert "scaler" in saved
    resumed, pictures = made(2.0**16)
    resumed.load_state(saved)
    assert resumed.accelerator.scaler.get_scale() == SCALE / 2.0 ** sum(
        record.skipped for record in wanted[:3]
    )
    # As text, since a norm that is no number is not equal to itself.
    assert repr(untimed(list(resumed.run(pictures, 3)))) == repr(untimed(wanted[3:]))
    ended, other = whole.state(), resumed.state()
    assert ended.keys() == other.keys()
    for name in ended:
        assert_equal(ended[name], other[name])
