"""What saves memory in training changes nothing of what is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._dynamo.utils import counters

from tunekit import adapters, forward
from tunekit.adapters.base import Adapter
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.families.base import Family
from tunekit.objective import Goal
from tunekit.passes import passes_of
from tunekit.ranks import ALONE
from tunekit.recipe import RecipeError, recipe_from
from tunekit.run import Run
from tunekit.schema import Train
from tunekit.train import Loop, StepRecord, train

Load = Callable[..., Family]
Tree = dict[str, dict[str, Any]]


def attach(family: Family, kind: str = "lora", **settings: Any) -> Adapter:
    made = adapters.get(kind)
    rank = {"rank": 4} if "rank" in made.Settings.model_fields else {}
    return made.attach(family, made.Settings(kind=kind, **{**rank, **settings}), 0)


def batch(family: Family) -> Batch:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    captions = ("a zorp robot", "a red robot")
    with torch.no_grad():
        conditioning = family.encode_prompt(captions)
    return Batch(latents, conditioning, ("a", "b"), captions)


def settings(**values: Any) -> Train:
    return Train(**{"steps": 3, "batch_size": 2, "learning_rate": 1e-2} | values)


def curve(records: list[StepRecord]) -> list[tuple[float, float]]:
    return [(record.loss, record.grad_norm) for record in records]


def learned(
    load_tiny: Load, adapter: dict[str, Any], **values: Any
) -> tuple[dict[str, Tensor], list[StepRecord]]:
    """Train afresh and return what was learned and the records."""
    family = load_tiny("sd")
    attached, pictures = attach(family, **adapter), batch(family)
    encode = family.encode_prompt if attached.trains_text_encoder else None
    records = train(family, attached, lambda s, m: pictures, settings(**values), encode=encode)
    done = list(records)
    return attached.state(), done


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def kept_bytes(load_tiny: Load, **values: Any) -> int:
    """Return the bytes that a forward pass leaves behind for its backward pass."""
    family = load_tiny("sd")
    attached, pictures = attach(family), batch(family)
    chosen = settings(**values)
    loop = Loop(family, attached, chosen)
    goal = Goal(chosen.objective, family.schedule)
    (one,) = passes_of(0, lambda s, m: pictures, chosen, goal, ALONE)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loop._losses(one)
    return sum(held.values())


class TestGradientCheckpointing:
    @pytest.mark.parametrize(
        "adapter",
        [
            {},
            {"targets": "full", "dropout": 0.3, "rank_dropout": 0.2},
            {"dora": True},
            {"text_encoder": True},
            {"kind": "lokr", "dropout": 0.3},
            {"kind": "oft", "block_size": 4},
            {"kind": "full"},
        ],
        ids=str,
    )
    def test_loss_gradient_and_what_is_learned_are_equal_to_the_bit(
        self, load_tiny: Load, adapter: dict[str, Any]
    ) -> None:
        plain, records = learned(load_tiny, adapter)
        twice, again = learned(load_tiny, adapter, gradient_checkpointing=True)
        assert_equal(plain, twice)
        assert curve(records) == curve(again)

    def test_less_is_kept(self, load_tiny: Load) -> None:
        assert kept_bytes(load_tiny, gradient_checkpointing=True) < 0.5 * kept_bytes(load_tiny)

    def test_the_next_training_of_the_same_base_is_as_it_is_told(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        denoiser: Any = family.denoiser
        forward.arrange(family, settings(gradient_checkpointing=True))
        assert denoiser.is_gradient_checkpointing
        forward.arrange(family, settings())
        assert not denoiser.is_gradient_checkpointing

    def test_a_denoiser_that_cannot_is_refused(
        self, load_tiny: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = load_tiny("sd")
        monkeypatch.setattr(type(family.denoiser), "_supports_gradient_checkpointing", False)
        with pytest.raises(UserError, match=r"^train\.gradient_checkpointing: UNet2DCondition"):
            forward.arrange(family, settings(gradient_checkpointing=True))


OPTIMIZERS = ["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "came", "muon"]


class TestFusedBackward:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_the_steps_are_those_after_the_backward_pass(
        self, load_tiny: Load, optimizer: str
    ) -> None:
        adapter = {"targets": "full", "dropout": 0.2}
        common = {"optimizer": optimizer, "learning_rate": 1e-3, "schedule": "linear"}
        plain, records = learned(load_tiny, adapter, max_grad_norm=0.0, **common)
        fused, again = learned(load_tiny, adapter, fused_backward=True, **common)
        assert_equal(plain, fused)
        assert [r.loss for r in records] == [r.loss for r in again]
        for one, other in zip(records, again, strict=True):
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)

    @pytest.mark.parametrize(
        "adapter",
        [{"kind": "full"}, {"kind": "loha"}, {"kind": "oft", "block_size": 4}, {"dora": True}],
        ids=str,
    )
    def test_for_every_way_to_learn(self, load_tiny: Load, adapter: dict[str, Any]) -> None:
        common = {"learning_rate": 1e-3, "ema": 0.9, "gradient_checkpointing": True}
        plain, _ = learned(load_tiny, adapter, max_grad_norm=0.0, **common)
        fused, _ = learned(load_tiny, adapter, fused_backward=True, **common)
        assert_equal(plain, fused)

    def test_never_is_more_than_one_gradient_there(self, load_tiny: Load) -> None:
        most = {}
        for fused in (False, True):
            family = load_tiny("sd")
            attached, pictures = attach(family), batch(family)
            seen = []

            def count(p: Tensor, seen: list[int] = seen, attached: Adapter = attached) -> None:
                seen.append(sum(q.grad is not None for q in attached.trained().values()))

            for parameter in attached.trained().values():
                parameter.register_post_accumulate_grad_hook(count)
            chosen = settings(steps=1, fused_backward=fused, max_grad_norm=0.0)
            list(train(family, attached, lambda s, m, b=pictures: b, chosen))
            most[fused] = max(seen)
        assert most[True] == 1
        assert most[False] > 50

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_going_on_from_a_state_is_as_if_it_had_not_stopped(
        self, load_tiny: Load, optimizer: str
    ) -> None:
        chosen = settings(
            steps=4, optimizer=optimizer, learning_rate=1e-3, fused_backward=True, seed=3
        )
        whole, _ = learned(
            load_tiny,
            {},
            steps=4,
            optimizer=optimizer,
            learning_rate=1e-3,
            fused_backward=True,
            seed=3,
        )
        family = load_tiny("sd")
        attached, pictures = attach(family), batch(family)
        loop = Loop(family, attached, chosen)
        steps = loop.run(lambda s, m: pictures)
        next(steps), next(steps)
        state = loop.state()
        family = load_tiny("sd")
        attached = attach(family)
        loop = Loop(family, attached, chosen)
        loop.load_state(state)
        list(loop.run(lambda s, m: pictures, 2))
        assert_equal(whole, attached.state())

    def test_a_gradient_that_is_no_number_takes_no_step(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        attached, pictures = attach(family, init="gaussian"), batch(family)
        name, broken = next(iter(attached.trained().items()))
        before = attached.state()[name]
        broken.register_hook(lambda gradient: gradient * float("nan"))
        loop = Loop(family, attached, settings(fused_backward=True))
        with pytest.raises(UserError, match=r"nan .* what the last checkpoint holds is intact"):
            list(loop.run(lambda s, m: pictures))
        assert not loop.whole
        assert torch.equal(attached.state()[name], before)

    def test_the_limit_of_the_gradient_is_left_out_by_itself(self) -> None:
        assert Train().max_grad_norm == 1
        assert Train(fused_backward=True).max_grad_norm == 0

    @pytest.mark.parametrize(
        "values",
        [
            {"max_grad_norm": 1.0},
            {"gradient_accumulation": 2},
            {"precision": "fp16"},
            {"optimizer": "prodigy"},
            {"optimizer": "schedulefree_adamw"},
            {"on_nonfinite": "skip"},
            {"on_spike": "stop"},
        ],
        ids=str,
    )
    def test_what_needs_the_whole_gradient_is_refused(self, values: dict[str, Any]) -> None:
        ((key, value),) = values.items()
        with pytest.raises(ValidationError) as error:
            Train(fused_backward=True, **values)
        fault = next(fault for fault in error.value.errors() if fault["loc"] == (key,))
        assert f"{value} and fused_backward exclude each other" in fault["msg"]

    def test_pictures_of_the_class_beside_it_are_refused(self, tree: Callable[..., Tree]) -> None:
        made = tree(train={"fused_backward": True}, data={"prior": {"count": 2}})
        with pytest.raises(RecipeError, match=r"train\.fused_backward: .*data\.prior"):
            recipe_from(made)


def test_the_report_tells_what_left_the_memory(run: Run) -> None:
    assert "vae and text_encoder (" in run.report.read_text()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings(  # torch's own, when it compiles
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
class TestCompile:
    @pytest.mark.slow
    def test_compiled_steps_are_nearly_those_that_are_not(
        self, load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        torch._dynamo.reset()
        counters.clear()
        adapter, rate = {"targets": "full", "dropout": 0.3}, {"learning_rate": 1e-3}
        plain, records = learned(load_tiny, adapter, **rate)
        compiled, again = learned(
            load_tiny, adapter, **rate, compile=True, gradient_checkpointing=True
        )
        assert counters["stats"]["unique_graphs"] > 0
        for one, other in zip(records, again, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        moved = [(plain[name] - compiled[name]).abs().mean() for name in plain]
        assert max(map(float, moved)) < 1e-4

    def test_drawing_is_not_compiled(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        blocks = list(family.denoiser.modules())
        within = forward.arrange(family, settings(compile=True))
        with within():
            assert any("forward" in vars(block) for block in blocks)
        assert not any("forward" in vars(block) for block in blocks)

    def test_without_a_compiler_one_line_says_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch._inductor import config

        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
        torch._dynamo.reset()
        with pytest.raises(UserError) as error:
            forward.check(settings(compile=True))
        assert str(error.value).startswith("train.compile: torch cannot compile here: ")
        assert "\n" not in str(error.value)
