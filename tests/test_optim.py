"""Optimizers and schedules against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tunekit.optim import ParameterGroup, build_optimizer, build_schedule, rate_factor
from tunekit.schema import Train


def settings(**values: Any) -> Train:
    return Train(**{"steps": 3, "batch_size": 4, "learning_rate": 1e-3} | values)


class TestSchedules:
    def factors(self, **values: Any) -> list[float]:
        chosen = settings(**values)
        return [rate_factor(chosen, step) for step in range(chosen.steps)]

    def test_constant(self) -> None:
        assert self.factors(steps=5) == [1.0] * 5

    def test_warm_up_reaches_the_peak_and_wastes_no_step(self) -> None:
        assert self.factors(steps=6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    def test_linear(self) -> None:
        assert self.factors(steps=4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
        assert self.factors(steps=6, schedule="linear", warmup_steps=2) == [
            0.5, 1.0, 1.0, 0.75, 0.5, 0.25,
        ]  # fmt: skip

    def test_cosine(self) -> None:
        wanted = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
        assert self.factors(steps=8, schedule="cosine") == pytest.approx(wanted)

    def test_every_group_keeps_its_own_peak(self) -> None:
        chosen = settings(
            steps=4, schedule="linear", learning_rate=1.0, text_encoder_learning_rate=0.1
        )
        groups = [
            ParameterGroup("denoiser", [nn.Parameter(torch.ones(1))]),
            ParameterGroup("text", [nn.Parameter(torch.ones(1))], "text_encoder_learning_rate"),
        ]
        optimizer = build_optimizer(chosen, groups)
        set_rates = build_schedule(chosen, optimizer)
        assert set_rates(2) == 0.5
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.05])
        assert set_rates(0) == 1.0

    def test_adamw_equals_its_definition(self) -> None:
        """Three steps of Loshchilov & Hutter's algorithm 2 by hand, in float64."""
        chosen = settings(learning_rate=0.1, weight_decay=0.2, betas=[0.8, 0.9])
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = build_optimizer(chosen, [ParameterGroup("all", [parameter])])
        x, m, v = torch.tensor([1.0, -2.0]).double(), torch.zeros(2), torch.zeros(2)
        for step, gradient in enumerate(torch.tensor([[0.5, -1.0], [0.1, 2.0], [-0.3, 0.7]]), 1):
            parameter.grad = gradient.clone()
            optimizer.step()
            m, v = 0.8 * m + 0.2 * gradient.double(), 0.9 * v + 0.1 * gradient.double() ** 2
            ahead = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
            x = x - 0.1 * (ahead + 0.2 * x)
            torch.testing.assert_close(parameter.detach().double(), x, atol=1e-6, rtol=0)
