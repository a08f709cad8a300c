"""A saved optimizer state that lost a part, or has one of another size, is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from test_optim import Teacher, chosen
from torch import Tensor, nn

from tunekit.errors import UserError
from tunekit.optim import ParameterGroup, build_optimizer, load_state_tensors, state_tensors
from tunekit.schema_train import OptimizerName

OPTIMIZERS = get_args(OptimizerName)


def stepped(name: str) -> Teacher:
    teacher = Teacher(chosen(name, schedule="constant"))
    teacher.run(0, 2)
    return teacher


def refused(name: str, state: dict[str, Tensor]) -> str:
    """Return what is said of a state, by an optimizer that it leaves as it was."""
    fresh = Teacher(chosen(name, schedule="constant"))
    before = state_tensors(fresh.optimizer)
    with pytest.raises(UserError) as caught:
        load_state_tensors(fresh.optimizer, state)
    after = state_tensors(fresh.optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(caught.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_part_of_it_may_be_missing(name: str) -> None:
    saved = state_tensors(stepped(name).optimizer)
    assert not any(key.startswith("none/") for key in saved)
    load_state_tensors(Teacher(chosen(name, schedule="constant")).optimizer, saved)
    for gone in saved:
        said = refused(name, {key: value for key, value in saved.items() if key != gone})
        assert "not whole: it has no" in said or gone.startswith(("kind/", "shape/")), gone
    bare = {k: v for k, v in saved.items() if k.startswith(("kind/", "shape/"))}
    assert "not whole" in refused(name, bare), "one without moments is no fresh one"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_part_of_it_has_one_size(name: str) -> None:
    saved = state_tensors(stepped(name).optimizer)
    for key, value in saved.items():
        if key.startswith("tensor/"):
            wider = torch.cat([value.flatten(), value.flatten()[:1]])
            assert f"{key} is none of this recipe's" in refused(name, {**saved, key: wider})
    for key in ("tensor/0.0.exp_avg_sqq", "tensor/0.0.__class__"):
        assert key in refused(name, {**saved, key: torch.ones(1)})


def test_a_parameter_that_no_step_has_moved_is_told_apart_from_one_that_was_lost() -> None:
    def made() -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        both = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        return build_optimizer(chosen("adamw"), [ParameterGroup("a", both)]), both

    one, (used, _) = made()
    used.grad = torch.ones(3)
    one.step()
    saved = state_tensors(one)
    assert "none/0.1" in saved
    load_state_tensors(made()[0], saved)
    del saved["none/0.1"]
    with pytest.raises(UserError, match="it has no step and exp_avg and exp_avg_sq of parameter 1"):
        load_state_tensors(made()[0], saved)
