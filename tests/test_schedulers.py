"""Samplers: those of flows follow the same flow, and what cannot follow a base says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.recipe import RecipeError, recipe_from
from tunekit.schedulers import FLOW_SCHEDULERS, NAMES, SCHEDULERS

Load = Callable[..., Family]
FLOWS = [name for name, how in tiny.FAMILIES.items() if how.schedulers is not None]


def latents(family: Family, scheduler: str | None, steps: int) -> torch.Tensor:
    pipeline = family.pipeline(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn: torch.Tensor = pipeline(
            **family.drawing("a zorp robot", "", 3.0),
            num_inference_steps=steps,
            width=32,
            height=32,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
    return drawn


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_ends_where_it_ends(name: str, load_tiny: Load) -> None:
    """Whichever solver goes along it, with enough steps; LCM, which jumps, ends elsewhere."""
    family = load_tiny(name)
    end = latents(family, None, 40)
    error = {
        word: float((latents(family, word, 10) - end).abs().mean()) for word in FLOW_SCHEDULERS
    }
    assert error["flow_euler"] == error["euler"] > 0
    assert error["euler"] < 0.05
    assert error["unipc"] < error["euler"], "of a higher order"
    assert error["lcm"] > 0.1


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("word", sorted(SCHEDULERS.keys() - FLOW_SCHEDULERS.keys()))
def test_a_flow_refuses_what_follows_no_flow(name: str, word: str, load_tiny: Load) -> None:
    with pytest.raises(UserError) as fault:
        load_tiny(name).pipeline(word)
    assert str(fault.value) == (
        f"scheduler: {word} is none for this base: it predicts the velocity of a flow, whose "
        f"levels of noise {word} does not know; there is: euler, flow_euler, lcm, unipc, or a "
        "diffusers class name"
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_a_denoiser_predicts_decides(prediction: str, load_tiny: Load) -> None:
    family = load_tiny(prediction_type=prediction)
    with pytest.raises(UserError, match=f"it predicts {prediction}, and flow_euler follows a flow"):
        family.pipeline("flow_euler")
    drawn = {
        word: latents(family, word, 6) for word in ("ddim", "lcm", "dpm++_2m_sde", "dpm++_sde")
    }
    assert all(one.isfinite().all() for one in drawn.values())
    assert len({tuple(one.flatten().tolist()) for one in drawn.values()}) == len(drawn)
    if prediction != "sample":
        assert latents(family, "euler_a", 3).isfinite().all()
        return
    for word in ("euler_a", "KDPM2DiscreteScheduler"):
        with pytest.raises(UserError, match=r"which predicts the picture itself; ddim, dpm\+\+"):
            family.pipeline(word)


def test_noise_on_the_way_comes_from_the_seed(load_tiny: Load) -> None:
    family = load_tiny()
    for word in ("dpm++_2m_sde", "dpm++_sde", "dpm++_sde_karras", "lcm", "euler_a", "ddpm"):
        assert torch.equal(latents(family, word, 4), latents(family, word, 4)), word


def test_every_name_may_stand_in_a_recipe(tiny_folder: Callable[..., Path]) -> None:
    def recipe(scheduler: str) -> Any:
        tree = {"name": "x", "base": {"model": str(tiny_folder())}, "adapter": {"kind": "lora"}}
        data = {"source": str(tiny_folder()), "trigger": "zorp", "class": "robot"}
        return recipe_from(tree | {"data": data, "evaluate": {"scheduler": scheduler}})

    for name in NAMES:
        assert recipe(name).evaluate.scheduler == name
    with pytest.raises(RecipeError, match=r'did you mean "dpm\+\+_2m_sde"'):
        recipe("dpm++_2m_sd")


def test_lcm_says_how_many_steps_it_can(load_tiny: Load) -> None:
    from tunekit.inference import DrawSettings, Painter

    with pytest.raises(UserError, match="scheduler: lcm cannot draw in 60 steps"):
        Painter(load_tiny()).draw("a robot", 1, DrawSettings(steps=60, scheduler="lcm"))
