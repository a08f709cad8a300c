"""Optimizers and schedules against their definitions; states bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import (
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from tunekit import optim
from tunekit.errors import UserError
from tunekit.optim import (
    ParameterGroup,
    build_optimizer,
    build_schedule,
    load_state_tensors,
    rate_factor,
    state_tensors,
)
from tunekit.optim.average import Ema, Weights, ema_decay
from tunekit.schema import Train
from tunekit.schema_train import OptimizerName

OPTIMIZERS = get_args(OptimizerName)


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

    def follow(self, make: Any, steps: int) -> list[float]:
        """Return what one of transformers' schedules multiplies the rate with."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = make(optimizer)
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    def test_restarts_equal_those_of_transformers(self) -> None:
        theirs = self.follow(
            lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, 0, 24, num_cycles=3), 24
        )
        ours = self.factors(steps=24, schedule="cosine_with_restarts", cycles=3)
        assert ours == pytest.approx(theirs, abs=1e-9)

    def test_polynomial_equals_that_of_transformers(self) -> None:
        theirs = self.follow(
            lambda o: get_polynomial_decay_schedule_with_warmup(o, 0, 20, lr_end=0.0, power=2.5), 20
        )
        ours = self.factors(steps=20, schedule="polynomial", power=2.5)
        assert ours == pytest.approx(theirs, abs=1e-9)

    def test_warmup_stable_decay_equals_that_of_transformers(self) -> None:
        theirs = self.follow(
            lambda o: get_wsd_schedule(
                o,
                num_warmup_steps=0,
                num_decay_steps=5,
                num_stable_steps=15,
                decay_type="linear",
            ),
            20,
        )
        ours = self.factors(steps=20, schedule="warmup_stable_decay", decay_steps=5)
        assert ours == pytest.approx(theirs, abs=1e-9)
        assert self.factors(steps=6, schedule="warmup_stable_decay", warmup_steps=2) == [
            0.5, 1.0, 1.0, 1.0, 1.0, 0.5,
        ]  # fmt: skip

    def test_a_default_decay_leaves_the_warm_up_alone(self) -> None:
        factors = self.factors(steps=10, schedule="warmup_stable_decay", warmup_steps=9)
        assert factors[8:] == [1.0, 1.0]

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


def model(device: str = "cpu") -> dict[str, nn.Parameter]:
    """A matrix large enough for 8-bit states, a small one, a vector and a convolution."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (96, 64), "small": (6, 4), "vector": (5,), "conv": (3, 2, 3, 3)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device))
        for name, shape in shapes.items()
    }


def groups(parameters: dict[str, nn.Parameter], rate: Any = "learning_rate") -> list[Any]:
    large, *rest = parameters.values()
    return [ParameterGroup("denoiser", [large]), ParameterGroup("text", rest, rate)]


def chosen(name: str, **values: Any) -> Train:
    rate = {} if name == "prodigy" else {"learning_rate": 1e-2}
    return Train(**{"steps": 6, "optimizer": name} | rate | values)


class Teacher:
    """Optimizer, schedule and weights as the loop has them, with gradients by the step's number."""

    def __init__(self, train: Train, *, ema_draws: bool = True) -> None:
        self.parameters = model()
        self.optimizer = build_optimizer(train, groups(self.parameters))
        self.set_rates = build_schedule(train, self.optimizer)
        self.ema = Ema(self.parameters, train.ema) if train.ema is not None else None
        self.weights = Weights(self.parameters, self.optimizer, self.ema, ema_draws=ema_draws)

    def run(self, first: int, last: int, draw: bool = False) -> None:
        for step in range(first, last):
            self.weights.train()
            self.set_rates(step)
            for i, p in enumerate(self.parameters.values()):
                draws = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=draws) + 0.3 * p.detach()
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(step)
            if draw:
                self.weights.draw()

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class TestOptimizers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("ema", [None, 0.9])
    def test_three_steps_and_three_more_are_six(self, name: str, ema: float | None) -> None:
        """Bit for bit, by way of a safetensors file, drawing or not."""
        if ema is not None and name == "schedulefree_adamw":
            return
        train = chosen(name, schedule="constant" if "free" in name else "cosine", ema=ema)
        whole = Teacher(train)
        whole.run(0, 6)
        half = Teacher(train)
        half.run(0, 3, draw=True)
        trained = half.weights.state_tensors() or half.values()
        saved = [load(save(state)) for state in (state_tensors(half.optimizer), trained)]
        resumed = Teacher(train)
        with torch.no_grad():
            for key, parameter in resumed.parameters.items():
                parameter.copy_(saved[1][key])
        load_state_tensors(resumed.optimizer, saved[0])
        if ema is not None:
            assert resumed.ema is not None
            assert half.ema is not None
            resumed.ema.load_state_tensors(load(save(half.ema.state_tensors())))
        resumed.run(3, 6, draw=True)
        whole.weights.draw()
        assert_equal(whole.values(), resumed.values())
        for one in (whole, resumed):
            one.weights.train()
        assert_equal(whole.values(), resumed.values())
        assert_equal(state_tensors(whole.optimizer), state_tensors(resumed.optimizer))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_it_finds_the_least_of_a_bowl(self, name: str) -> None:
        train = chosen(name, steps=200, weight_decay=0.0)
        if name == "prodigy":
            train = chosen(name, steps=200, weight_decay=0.0, optimizer_args={"d0": 1e-3})
        parameters = model()
        optimizer = build_optimizer(train, groups(parameters))
        weights = Weights(parameters, optimizer)

        def height() -> float:
            return sum(float(p.detach().square().sum()) for p in parameters.values())

        before = height()
        for _ in range(200):
            for p in parameters.values():
                p.grad = 2 * p.detach()
            optimizer.step()
        weights.draw()
        assert height() < 0.6 * before

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_each_group_has_its_own_rate(self, name: str) -> None:
        if name == "prodigy":
            return
        train = chosen(name, text_encoder_learning_rate=0.0)
        parameters = model()
        before = {key: p.detach().clone() for key, p in parameters.items()}
        optimizer = build_optimizer(train, groups(parameters, "text_encoder_learning_rate"))
        set_rates = build_schedule(train, optimizer)
        for step in range(2):
            assert set_rates(step) == pytest.approx(1e-2)
            for p in parameters.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moved = {key for key, p in parameters.items() if not torch.equal(p, before[key])}
        assert moved == {"large"}

    def test_a_scale_multiplies_the_rate(self) -> None:
        parameter = nn.Parameter(torch.ones(2, 2))
        for name in ("adamw", "muon"):
            group = ParameterGroup("b", [parameter], scale=16.0)
            optimizer = build_optimizer(chosen(name), [group])
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.16)

    def test_lion_equals_its_definition(self) -> None:
        """Chen et al. 2023, algorithm 2, by hand and in float64."""
        train = chosen("lion", learning_rate=0.1, weight_decay=0.2, betas=[0.8, 0.9])
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = build_optimizer(train, [ParameterGroup("all", [parameter])])
        x, m = torch.tensor([1.0, -2.0]).double(), torch.zeros(2).double()
        for gradient in torch.tensor([[0.5, -1.0], [0.1, 2.0], [-0.9, 0.7]]).double():
            parameter.grad = gradient.float()
            optimizer.step()
            update = (0.8 * m + 0.2 * gradient).sign()
            x, m = x - 0.1 * (update + 0.2 * x), 0.9 * m + 0.1 * gradient
            torch.testing.assert_close(parameter.detach().double(), x, atol=1e-6, rtol=0)

    def test_schedule_free_draws_with_the_average(self) -> None:
        """Defazio et al. 2024, eq. 3 to 5 by hand: gradients at y, drawn with x."""
        train = chosen("schedulefree_adamw", learning_rate=0.1, weight_decay=0.0, betas=[0.9, 0.99])
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = build_optimizer(train, [ParameterGroup("all", [parameter])])
        weights = Weights({"p": parameter}, optimizer)
        x = z = torch.tensor([1.0, -2.0]).double()
        v = torch.zeros(2).double()
        for step in range(1, 5):
            weights.train()
            y = 0.1 * z + 0.9 * x
            torch.testing.assert_close(parameter.detach().double(), y, atol=1e-6, rtol=0)
            gradient = torch.tensor([0.3 * step, -1.0]).double()
            parameter.grad = gradient.float()
            optimizer.step()
            v = 0.99 * v + 0.01 * gradient**2
            z = z - 0.1 * gradient / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            x = (1 - 1 / step) * x + z / step
            weights.draw()
            torch.testing.assert_close(parameter.detach().double(), x, atol=1e-5, rtol=0)

    def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_as_adamw(self) -> None:
        parameters = model()
        optimizer = build_optimizer(chosen("muon", weight_decay=0.0), groups(parameters))
        other = model()
        plain = build_optimizer(chosen("adamw", weight_decay=0.0), groups(other))
        before = {key: p.detach().clone() for key, p in parameters.items()}
        for one, own in ((parameters, optimizer), (other, plain)):
            for i, p in enumerate(one.values()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            own.step()
        step = (parameters["large"].detach() - before["large"]) / 1e-2
        scale = 0.2 * math.sqrt(96)
        values = torch.linalg.svdvals(step / scale)
        assert values.min() > 0.6
        assert values.max() < 1.3
        for name in ("vector", "conv"):
            torch.testing.assert_close(parameters[name], other[name])

    def test_eight_bits_are_eight_bits(self) -> None:
        for name in ("adamw8bit", "lion8bit", "paged_adamw8bit"):
            teacher = Teacher(chosen(name))
            teacher.run(0, 1)
            state = state_tensors(teacher.optimizer)
            assert state["tensor/0.0.state1"].dtype == torch.uint8
            assert state["tensor/0.1.state1"].dtype == torch.float32, "too small to gain by it"

    def test_paging_without_a_gpu_is_told(self) -> None:
        assert "adamw8bit" in optim.notes(chosen("paged_adamw8bit"), "cpu")[0]
        assert optim.notes(chosen("paged_adamw8bit"), "cuda") == []
        assert optim.notes(chosen("adamw"), "cpu") == []


class TestArguments:
    def refused(self, name: str, **args: Any) -> list[str]:
        with pytest.raises(UserError) as caught:
            build_optimizer(chosen(name, optimizer_args=args), groups(model()))
        return str(caught.value).splitlines()

    def test_they_reach_the_optimizer(self) -> None:
        made = build_optimizer(
            chosen("adamw", optimizer_args={"eps": 1e-3, "amsgrad": True}), groups(model())
        )
        assert (made.param_groups[0]["eps"], made.param_groups[0]["amsgrad"]) == (1e-3, True)
        came = build_optimizer(
            chosen("came", optimizer_args={"betas": [0.8, 0.9, 0.95]}), groups(model())
        )
        assert came.param_groups[0]["betas"] == (0.8, 0.9, 0.95)
        build_optimizer(chosen("adamw", optimizer_args={"foreach": True}), groups(model()))

    def test_every_fault_is_named_with_what_was_meant(self) -> None:
        assert self.refused("adamw", epps=1e-3, amsgrad="yes", maximize=True) == [
            'train.optimizer_args.epps: adamw has no such parameter (did you mean "eps"?)',
            "train.optimizer_args.amsgrad: must be true or false, not 'yes'",
            "train.optimizer_args.maximize: adamw has no such parameter; it has: eps, amsgrad, "
            "foreach, fused",
        ]
        assert self.refused("adafactor", eps=1e-3) == [
            "train.optimizer_args.eps: must be a list of 2 numbers, not 0.001"
        ]
        assert "no such parameter" in self.refused("adafactor", relative_step=True)[0]
        assert "no such parameter" in self.refused("lion", anything=1)[0]

    def test_a_value_out_of_range_is_one_line(self) -> None:
        (line,) = self.refused("adamw", eps=-1.0)
        assert line.startswith("train.optimizer: adamw does not take these settings: ")
        assert "-1.0" in line

    def test_the_extra_is_named_where_it_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr("importlib.import_module", missing)
        (line,) = self.refused("lion")
        assert line.endswith("pip install 'tunekit[optimizers]'")

    def test_prodigy_has_one_rate(self) -> None:
        train = chosen("prodigy", text_encoder_learning_rate=0.5)
        with pytest.raises(UserError, match=r"prodigy finds one rate .*\(denoiser 1, text 0\.5\)"):
            build_optimizer(train, groups(model(), "text_encoder_learning_rate"))

    def test_muon_without_matrices_is_refused(self) -> None:
        group = ParameterGroup("words", [nn.Parameter(torch.ones(3))])
        with pytest.raises(UserError, match="trains matrices"):
            build_optimizer(chosen("muon"), [group])

    def test_a_recipe_is_checked_without_torch(self) -> None:
        code = (
            "import sys; from tunekit.schema import Train; import tunekit.optim;"
            "Train(optimizer='lion', optimizer_args={'foreach': True});"
            "sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestState:
    def test_another_optimizers_state_is_refused_and_nothing_changed(self) -> None:
        lion = Teacher(chosen("lion"))
        lion.run(0, 2)
        adamw = Teacher(chosen("adamw"))
        adamw.run(0, 1)
        before = state_tensors(adamw.optimizer)
        with pytest.raises(UserError, match="does not fit"):
            load_state_tensors(adamw.optimizer, state_tensors(lion.optimizer))
        assert_equal(before, state_tensors(adamw.optimizer))

    def test_other_parameters_are_refused(self) -> None:
        one = Teacher(chosen("adamw"))
        one.run(0, 1)
        other = build_optimizer(
            chosen("adamw"), [ParameterGroup("a", [nn.Parameter(torch.ones(3))])]
        )
        with pytest.raises(UserError, match="other parameters"):
            load_state_tensors(other, state_tensors(one.optimizer))

    def test_the_recipes_settings_hold(self) -> None:
        one = Teacher(chosen("adamw", weight_decay=0.1))
        one.run(0, 1)
        other = Teacher(chosen("adamw", weight_decay=0.3, learning_rate=0.5))
        load_state_tensors(other.optimizer, state_tensors(one.optimizer))
        group = other.optimizer.param_groups[0]
        assert (group["weight_decay"], group["lr"]) == (0.3, 0.5)


class TestAverage:
    def test_it_equals_its_definition(self) -> None:
        parameter = nn.Parameter(torch.tensor([1.0]))
        ema = Ema({"p": parameter}, 0.5)
        wanted = 1.0
        for step, value in enumerate([2.0, 4.0, -3.0, 5.0, 1.0, 7.0, 2.0, 3.0, 8.0, 9.0]):
            with torch.no_grad():
                parameter.fill_(value)
            ema.update(step)
            keep = min(0.5, (1 + step + 1) / (10 + step + 1))
            wanted = keep * wanted + (1 - keep) * value
            assert ema.average["p"].item() == pytest.approx(wanted, rel=1e-6)

    def test_the_decay_rises_to_its_value(self) -> None:
        rising = [ema_decay(0.99, step) for step in range(2000)]
        assert rising == sorted(rising)
        assert rising[0] < 0.2
        assert rising[-1] == 0.99

    @pytest.mark.parametrize(("name", "ema"), [("adamw", 0.9), ("schedulefree_adamw", None)])
    def test_drawing_in_between_changes_no_bit(self, name: str, ema: float | None) -> None:
        plain, drawn = (Teacher(chosen(name, ema=ema)) for _ in range(2))
        plain.run(0, 6)
        drawn.run(0, 6, draw=True)
        averaged = drawn.values()
        drawn.weights.train()
        assert_equal(plain.values(), drawn.values())
        assert not torch.equal(averaged["large"], plain.values()["large"])
        assert_equal(state_tensors(plain.optimizer), state_tensors(drawn.optimizer))

    def test_the_average_may_be_kept_without_drawing_with_it(self) -> None:
        teacher = Teacher(chosen("adamw", ema=0.9), ema_draws=False)
        teacher.run(0, 3)
        before = teacher.values()
        teacher.weights.draw()
        assert_equal(before, teacher.values())
        assert teacher.ema is not None
        assert not torch.equal(teacher.ema.state_tensors()["large"], before["large"])

    def test_a_state_that_does_not_fit_is_refused(self) -> None:
        ema = Ema(model(), 0.9)
        with pytest.raises(UserError, match=r"average of the weights does not fit .* conv"):
            ema.load_state_tensors({k: v for k, v in ema.state_tensors().items() if k != "conv"})
