"""What counts as a spike of the loss: not a hard timestep, not a slow rise, not a first step."""

from __future__ import annotations

import math
import random

import pytest

from tunekit.spikes import WARM, Spikes

STEPS = 1000


def usual(timestep: int) -> float:
    """Return a loss that falls by a factor of 100 over the timesteps, as that of the noise does."""
    return math.exp(-4.6 * timestep / STEPS)


class Training:
    """Steps of some pictures at random timesteps, with a loss that scatters by a third."""

    def __init__(self, pictures: int = 4, seed: int = 0) -> None:
        self.spikes, self.random, self.pictures = Spikes(STEPS), random.Random(seed), pictures

    def step(self, times: float = 1.0) -> bool:
        """Take a step whose loss is `times` the usual, and return whether it is a spike."""
        timesteps = [self.random.randrange(STEPS) for _ in range(self.pictures)]
        scatter = [self.random.lognormvariate(0, 0.3) for _ in timesteps]
        losses = [times * usual(t) * s for t, s in zip(timesteps, scatter, strict=True)]
        excess = self.spikes.excess(losses, timesteps)
        found = self.spikes.is_spike(excess)
        self.spikes.take(losses, timesteps, excess)
        return found


@pytest.mark.parametrize(("pictures", "times"), [(1, 60.0), (4, 10.0)])
def test_a_jump_is_found_and_chance_is_not(pictures: int, times: float) -> None:
    for seed in range(5):
        training = Training(pictures, seed)
        assert not any(training.step() for _ in range(400))
        assert training.step(times)
        assert not any(training.step() for _ in range(50))
        assert training.step(times), "and the next one as well"


def test_a_loss_that_falls_or_creeps_up_is_no_spike() -> None:
    training = Training()
    assert not any(training.step(times=0.99**step) for step in range(300))
    assert not any(training.step(times=0.05 * 1.01**step) for step in range(300))


def test_nothing_is_judged_before_enough_was_seen() -> None:
    training = Training()
    assert not any(training.step(times=50 if step % 7 == 3 else 1) for step in range(WARM))


def test_a_loss_that_stays_high_is_the_usual_one_after_a_while() -> None:
    training = Training()
    for _ in range(300):
        training.step()
    high = [training.step(times=30) for _ in range(300)]
    assert high[0]
    assert not any(high[-100:])


def test_what_is_remembered_can_be_taken_up() -> None:
    one, other = Training(), Training()
    for _ in range(200):
        one.step()
    other.spikes.load_state(one.spikes.state())
    other.random.setstate(one.random.getstate())
    for times in (1, 1, 20, 1, 9, 1):
        assert one.step(times) == other.step(times)
    assert one.spikes.state() == other.spikes.state()


def test_a_loss_of_0_is_no_error() -> None:
    training = Training()
    for _ in range(100):
        training.step(times=0)
    assert training.step(times=1)
