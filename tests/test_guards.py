"""The guards in the loop: what stops a run, what is skipped, and that both go on exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looped import CAPTIONS, NAMES, Load, Pictures, assert_equal, attach, settings, untimed
from safetensors.torch import load, save

from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.families.base import Family
from tunekit.guards import PATIENCE, TrainingError
from tunekit.spikes import WARM
from tunekit.train import Loop, StepRecord, train


def broken(pictures: Pictures, *steps: int, value: float = math.nan) -> Callable[..., Batch]:
    """Return batches whose second picture holds `value` in some steps (0 is the first)."""

    def batches(step: int, micro: int) -> Batch:
        batch = pictures(step, micro)
        if step not in steps:
            return batch
        latents = batch.latents.clone()
        latents[1] = value
        return dataclasses.replace(batch, latents=latents)

    return batches


def loop(load_tiny: Load, **values: Any) -> tuple[Loop, Pictures]:
    family = load_tiny("sd", prediction_type="v_prediction")
    return Loop(family, attach(family), settings(**values)), Pictures(family)


class TestNonfinite:
    def test_the_message_names_picture_caption_and_timestep(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=5)
        with pytest.raises(TrainingError) as caught:
            list(one.run(broken(pictures, 2)))
        line = str(caught.value)
        assert line.startswith("step 3 of 5: the loss is nan with zorp/1.png (timestep ")
        assert f', "{CAPTIONS[1]}"); stopped before the step was taken' in line
        assert "train.on_nonfinite: skip" in line
        assert one.whole

    def test_a_step_may_be_skipped_and_is_counted(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=6, on_nonfinite="skip")
        records, states = [], []
        for record in one.run(broken(pictures, 1, 4)):
            records.append(record)
            states.append(one.state())
        assert [record.skipped for record in records] == [False, True, False, False, True, False]
        assert [record.skips for record in records] == [0, 1, 1, 1, 2, 2]
        assert math.isnan(records[1].loss)
        assert records[1].noticed is not None
        assert records[1].noticed.startswith("step 2 of 6: the loss is nan with zorp/1.png (time")
        assert records[1].noticed.endswith("it was not taken (skip 1 of 10)")
        assert records[0].noticed is records[2].noticed is None
        for name in ("adapter", "optimizer"):  # nothing of the step is left
            assert_equal(states[0][name], states[1][name])
        before, after = states[1]["adapter"], states[2]["adapter"]
        assert any(not torch.equal(before[name], after[name]) for name in after)

    def test_a_gradient_may_be_skipped_too(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=3, on_nonfinite="skip")
        handles = [
            p.register_hook(lambda grad: torch.full_like(grad, math.inf))
            for p in one.adapter.trained().values()
        ]
        steps = one.run(pictures)
        first = next(steps)
        assert first.skipped
        assert first.loss > 0
        assert first.noticed is not None
        assert "the gradient's norm is" in first.noticed
        for handle in handles:
            handle.remove()
        second = next(steps)
        assert not second.skipped
        assert second.grad_norm > 0

    def test_one_more_than_allowed_stops(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=6, on_nonfinite="skip", max_skips=2)
        steps = one.run(broken(pictures, 0, 1, 3))
        assert [next(steps).skipped for _ in range(3)] == [True, True, False]
        with pytest.raises(TrainingError, match=r"step 4 .*train\.max_skips: 2 steps were skipped"):
            next(steps)

    def test_the_average_of_the_weights_is_left_alone(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=2, on_nonfinite="skip", ema=0.9)
        steps = one.run(broken(pictures, 1))
        next(steps)
        before = one.state()
        next(steps)
        assert_equal(before["ema"], one.state()["ema"])
        assert_equal(before["trained"], one.state()["trained"])

    @pytest.mark.parametrize("optimizer", ["adamw", "schedulefree_adamw"])
    @pytest.mark.parametrize("stop", [1, 2, 3])
    def test_a_run_with_skips_goes_on_bit_for_bit(
        self, load_tiny: Load, stop: int, optimizer: Any
    ) -> None:
        values = {"steps": 5, "on_nonfinite": "skip", "max_skips": 2, "optimizer": optimizer}
        whole, pictures = loop(load_tiny, **values)
        wanted = list(whole.run(broken(pictures, 1, 3)))
        half, pictures = loop(load_tiny, **values)
        steps = half.run(broken(pictures, 1, 3))
        for _ in range(stop):
            next(steps)
        saved = {name: load(save(tensors)) for name, tensors in half.state().items()}
        resumed, pictures = loop(load_tiny, **values)
        resumed.load_state(saved)
        again = list(resumed.run(broken(pictures, 1, 3), stop))
        assert plain(again) == plain(wanted[stop:])
        for name, tensors in whole.state().items():
            assert_equal(tensors, resumed.state()[name])


def plain(records: list[StepRecord]) -> list[StepRecord]:
    """Return records that can be compared: no times, and None for what is no number."""
    return [
        dataclasses.replace(
            record,
            loss=-1.0 if math.isnan(record.loss) else record.loss,
            grad_norm=-1.0 if math.isnan(record.grad_norm) else record.grad_norm,
        )
        for record in untimed(records)
    ]


CALM = 3 * WARM
WILD = CALM + 1


def wild(pictures: Pictures) -> Callable[..., Batch]:
    """Return batches that weigh a thousand times as much in one step, and in the one after it."""

    def batches(step: int, micro: int) -> Batch:
        weight = 1000.0 if step in (WILD, WILD + 1) else 1.0
        return dataclasses.replace(pictures(step, micro), weights=torch.full((4,), weight))

    return batches


class TestSpikes:
    def run(self, load_tiny: Load, policy: str) -> tuple[Loop, list[StepRecord]]:
        one, pictures = loop(load_tiny, steps=WILD + 4, on_spike=policy, learning_rate=1e-5)
        return one, list(one.run(wild(pictures)))

    def test_a_spike_is_told_once_and_taken(self, load_tiny: Load) -> None:
        one, records = self.run(load_tiny, "warn")
        assert not any(record.skipped for record in records)
        assert [record.step for record in records if record.spike] == [WILD + 1, WILD + 2]
        [told] = [record.noticed for record in records if record.noticed]
        assert told.startswith(f"step {WILD + 1} of {WILD + 4}: the loss is ")
        assert "times what it usually is at these timesteps with zorp/0.png (timestep " in told
        assert records[WILD].spike == pytest.approx(1000, rel=0.9)
        assert one.guards.skips == 0

    def test_a_spike_may_be_skipped(self, load_tiny: Load) -> None:
        one, records = self.run(load_tiny, "skip")
        assert [record.step for record in records if record.skipped] == [WILD + 1, WILD + 2]
        assert one.guards.skips == 2

    def test_a_spike_may_stop(self, load_tiny: Load) -> None:
        with pytest.raises(TrainingError, match=rf"^step {WILD + 1} of .*train\.on_spike: skip"):
            self.run(load_tiny, "stop")

    def test_what_is_usual_is_part_of_a_checkpoint(self, load_tiny: Load) -> None:
        values = {"steps": WILD + 4, "on_spike": "skip", "learning_rate": 1e-5}
        first, pictures = loop(load_tiny, **values)
        steps = first.run(wild(pictures))
        for _ in range(WILD + 1):  # with the first spike
            next(steps)
        saved = {name: load(save(tensors)) for name, tensors in first.state().items()}
        resumed, pictures = loop(load_tiny, **values)
        resumed.load_state(saved)
        assert plain(list(resumed.run(wild(pictures), WILD + 1))) == plain(list(steps))
        assert resumed.guards.skips == 2

    def test_a_state_of_another_kind_is_refused(self, load_tiny: Load) -> None:
        one, _ = loop(load_tiny)
        state = one.state()
        for guards in ({"counts": torch.zeros(1)}, {}):
            with pytest.raises(UserError, match="state of the guards"):
                one.load_state(state | {"guards": guards})


class TestNothingMoves:
    def stopped(self, one: Loop, pictures: Any) -> str:
        steps = one.run(pictures)
        for _ in range(PATIENCE):
            next(steps)
        with pytest.raises(TrainingError) as caught:
            next(steps)
        assert one.whole
        return str(caught.value)

    def test_a_rate_of_0_is_found_out(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=100, learning_rate=0.0, weight_decay=0.1)
        line = self.stopped(one, pictures)
        assert line == (
            f"step {PATIENCE + 1} of 100: nothing that trains has moved in {PATIENCE} steps: the "
            "learning rate is 0"
        )

    def test_a_run_that_short_is_left_to_the_verification(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=PATIENCE, learning_rate=0.0)
        assert len(list(one.run(pictures))) == PATIENCE

    def test_a_loss_that_does_not_depend_on_what_trains(self, load_tiny: Load) -> None:
        """Weights of 0 are a loss of 0 whatever is predicted; decay has nothing to take off."""
        one, pictures = loop(load_tiny, steps=100, weight_decay=0.0)

        def weightless(step: int, micro: int) -> Batch:
            return dataclasses.replace(pictures(step, micro), weights=torch.zeros(4))

        assert "the gradient is exactly 0" in self.stopped(one, weightless)

    def test_a_rate_that_is_too_small_for_the_numbers(self, load_tiny: Load) -> None:
        one, pictures = loop(load_tiny, steps=100, learning_rate=1e-30, weight_decay=0.0)
        for parameter in one.adapter.trained().values():
            parameter.data.fill_(1.0)
        assert "a learning rate of 1e-30 is too small to change" in self.stopped(one, pictures)

    def test_once_it_has_moved_it_is_watched_no_more(self, load_tiny: Load) -> None:
        values = {"steps": 2 * PATIENCE + 5, "schedule": "polynomial", "power": 100.0}
        one, pictures = loop(load_tiny, **values)
        assert len(list(one.run(pictures))) == values["steps"]
        resumed, pictures = loop(load_tiny, **values, learning_rate=0.0)
        resumed.load_state(one.state())
        assert len(list(resumed.run(pictures, 5))) == 2 * PATIENCE


class TestGuards:
    def broken(self, family: Family, row: int, value: float) -> Pictures:
        pictures = Pictures(family)
        plain = pictures.__call__

        class Broken(Pictures):
            def __init__(self) -> None:
                self.asked = []

            def __call__(self, step: int, micro: int) -> Batch:
                batch = plain(step, micro)
                if step < 2:
                    return batch
                latents = batch.latents.clone()
                latents[row, 0, 0, 0] = value
                return dataclasses.replace(batch, latents=latents)

        return Broken()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_before_the_step(
        self, load_tiny: Load, value: float
    ) -> None:
        family = load_tiny("sd")
        adapter = attach(family)
        steps = train(family, adapter, self.broken(family, 1, value), settings(steps=5))
        next(steps), next(steps)
        good = adapter.state()
        with pytest.raises(TrainingError) as caught:
            next(steps)
        line = str(caught.value)
        assert line.startswith("step 3 of 5: the loss is ")
        assert "zorp/1.png (timestep " in line
        assert "zorp/0.png" not in line, "only the picture at fault is named"
        assert "train.learning_rate" in line
        assert "\n" not in line
        assert isinstance(caught.value, UserError)
        assert (caught.value.step, caught.value.names) == (3, ("zorp/1.png",))
        assert_equal(good, adapter.state())
        assert all(p.grad is None for p in adapter.trained().values())

    def test_a_gradient_that_is_not_finite_stops_before_the_step(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family)
        steps = train(family, adapter, Pictures(family), settings(steps=5))
        next(steps)
        good = adapter.state()
        parameter = next(iter(adapter.trained().values()))
        parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        with pytest.raises(TrainingError) as caught:
            next(steps)
        line = str(caught.value)
        assert line.startswith("step 2 of 5: the gradient's norm is ")
        assert all(name in line for name in NAMES)
        assert_equal(good, adapter.state())

    def test_weights_blown_up_by_the_rate_are_found(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        steps = train(
            family,
            attach(family, targets="full"),
            Pictures(family),
            settings(learning_rate=10.0, steps=2000),
        )
        with pytest.raises(TrainingError, match="it is 10"):
            list(steps)

    def test_fp16_without_a_gpu_is_refused_at_once(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
            train(family, attach(family), Pictures(family), settings(precision="fp16"))
