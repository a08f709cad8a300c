"""The objective of a recipe on a base's schedule: what is refused, drawn and minimised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tunekit import diffusion, objective, seeding
from tunekit.diffusion import FlowSchedule, NoiseSchedule
from tunekit.errors import UserError
from tunekit.objective import Goal, check
from tunekit.schema import Train
from tunekit.schema_objective import Objective

ALPHAS = torch.linspace(0.999, 0.004, 1000)
EPSILON = NoiseSchedule(ALPHAS, "epsilon")
VELOCITY = NoiseSchedule(ALPHAS, "v_prediction")
FLOW = FlowSchedule(torch.arange(1, 1001) / 1000, cells=64)


def wants(**values: Any) -> Objective:
    return Objective(**values)


class TestContradictions:
    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"prediction": "epsilon", "zero_terminal_snr": True}, "needs a v_prediction base"),
            ({"prediction": "flow", "zero_terminal_snr": True}, "by itself"),
            ({"prediction": "flow", "min_snr_gamma": 5.0}, "choose timestep_sampling"),
            ({"prediction": "flow", "debiased": True}, "choose timestep_sampling"),
            ({"min_snr_gamma": 5.0, "debiased": True}, "stands beside min_snr_gamma"),
            ({"prediction": "epsilon", "shift": 3.0}, "timesteps of a flow"),
            ({"prediction": "v_prediction", "resolution_shift": True}, "timesteps of a flow"),
            ({"huber_c": 0.3}, "it belongs to loss: huber or smooth_l1"),
            ({"logit_std": 0.3}, "it belongs to timestep_sampling: logit_normal"),
            ({"timestep_sampling": "beta", "mode_scale": 0.3}, "timestep_sampling: mode"),
            ({"timestep_bias_portion": 0.3}, "it belongs to timestep_bias"),
            ({"noise_offset": 0.1, "pyramid_noise": 0.5}, "stands beside noise_offset"),
            ({"min_timestep": 10, "max_timestep": 9}, "no timestep is left"),
        ],
    )
    def test_what_the_recipe_alone_shows_is_refused_in_it(
        self, values: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ValidationError, match=says):
            wants(**values)

    def test_a_recipe_written_out_in_full_is_good(self) -> None:
        assert wants(**Objective().model_dump()) == Objective()
        assert Train(**Train().model_dump()) == Train()

    @pytest.mark.parametrize(
        ("values", "schedule", "says"),
        [
            ({"zero_terminal_snr": True}, EPSILON, "zero_terminal_snr: cannot be with epsilon"),
            ({"zero_terminal_snr": True}, FLOW, "zero_terminal_snr: a flow ends in pure noise"),
            ({"min_snr_gamma": 5.0}, FLOW, "min_snr_gamma: weighs timesteps"),
            ({"debiased": True}, FLOW, "debiased: weighs timesteps"),
            ({"shift": 3.0}, VELOCITY, "shift: moves the timesteps of a flow"),
            ({"resolution_shift": True}, EPSILON, "resolution_shift: moves the timesteps"),
            (
                {"resolution_shift": True},
                FlowSchedule(FLOW.sigmas),
                "resolution_shift: this base does not say",
            ),
            ({"prediction": "epsilon"}, VELOCITY, r"this base predicts \(v_prediction\)"),
            ({"max_timestep": 1000}, VELOCITY, "1000 is past the last timestep .* 999"),
            (
                {"timestep_sampling": "logit_normal", "logit_std": 0.01, "max_timestep": 5},
                VELOCITY,
                "nearly nothing is drawn",
            ),
        ],
    )
    def test_what_the_base_shows_is_refused(
        self, values: dict[str, Any], schedule: diffusion.Schedule, says: str
    ) -> None:
        with pytest.raises(UserError, match=rf"^train\.objective\..*{says}"):
            check(wants(**values), schedule)

    def test_every_contradiction_at_once(self) -> None:
        with pytest.raises(UserError) as caught:
            check(wants(min_snr_gamma=5.0, zero_terminal_snr=True, max_timestep=5000), FLOW)
        assert len(str(caught.value).splitlines()) == 3

    def test_the_default_suits_every_base(self) -> None:
        for schedule in (EPSILON, VELOCITY, FLOW):
            check(Objective(), schedule)
            assert objective.notes(Objective(), schedule) == []

    def test_the_sampler_of_a_stretched_schedule_is_told(self) -> None:
        stretched = wants(zero_terminal_snr=True)
        assert "rescale_betas_zero_snr" in objective.notes(stretched, VELOCITY)[0]
        done = NoiseSchedule(diffusion.zero_terminal_snr(VELOCITY).alphas_cumprod, "v_prediction")
        assert "already" in objective.notes(stretched, done)[0]


class TestGoal:
    def draw(self, schedule: diffusion.Schedule, cells: list[int], **values: Any) -> torch.Tensor:
        goal = Goal(wants(**values), schedule)
        return goal.timesteps(cells, seeding.generator(3, "timesteps", 7))

    def test_uniform_timesteps_are_the_plain_ones(self) -> None:
        plain = diffusion.sample_timesteps(EPSILON, 8, seeding.generator(3, "timesteps", 7))
        assert torch.equal(self.draw(EPSILON, [64] * 8), plain)

    def test_the_limits_are_part_of_it(self) -> None:
        drawn = self.draw(EPSILON, [64] * 200, min_timestep=100, max_timestep=120)
        assert set(drawn.tolist()) <= set(range(100, 121))
        assert len(set(drawn.tolist())) > 15

    def test_larger_pictures_get_more_noise_where_asked(self) -> None:
        plain = self.draw(FLOW, [64] * 500).float().mean()
        small = self.draw(FLOW, [64] * 500, resolution_shift=True).float().mean()
        large = self.draw(FLOW, [64 * 16] * 500, resolution_shift=True).float().mean()
        assert abs(small - plain) < 60
        assert large > small + 150

    def test_each_picture_is_shifted_by_its_own_size(self) -> None:
        mixed = self.draw(FLOW, [64, 64 * 16] * 4, resolution_shift=True)
        large = self.draw(FLOW, [64 * 16] * 8, resolution_shift=True)
        small = self.draw(FLOW, [64] * 8, resolution_shift=True)
        assert torch.equal(mixed[1::2], large[1::2])
        assert torch.equal(mixed[::2], small[::2])

    def test_what_the_denoiser_sees_is_perturbed_and_the_target_is_not(self) -> None:
        plain, seen = Goal(Objective(), EPSILON).noise((4, 8, 8), seeding.generator(1, "n"))
        assert torch.equal(plain, seen)
        goal = Goal(wants(input_perturbation=0.1), EPSILON)
        asked, seen = goal.noise((4, 8, 8), seeding.generator(1, "n"))
        assert torch.equal(asked, plain)
        assert (seen - asked).std().item() == pytest.approx(0.1, rel=0.2)

    def test_losses_are_weighted_and_bent(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 3, 4, 5, 5, generator=generator)
        t = torch.tensor([5, 500, 990])
        goal = Goal(wants(p2_gamma=0.5, loss="huber", huber_c=0.2, huber_schedule="snr"), VELOCITY)
        c = diffusion.huber_scale(VELOCITY, t, 0.2, "snr")
        wanted = diffusion.loss_weights(VELOCITY, t, p2_gamma=0.5) * diffusion.sample_losses(
            x, y, loss="huber", scale=c
        )
        torch.testing.assert_close(goal.losses(x, y, t), wanted)

    def test_a_stretched_schedule_is_what_is_trained_with(self) -> None:
        goal = Goal(wants(zero_terminal_snr=True), VELOCITY)
        assert goal.schedule.snr[-1] == 0
        assert VELOCITY.snr[-1] > 0
