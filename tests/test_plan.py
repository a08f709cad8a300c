"""What a run will take, told beforehand: parameters, steps, memory, and what would lower it."""

from __future__ import annotations

from typing import Any

import pytest

from tunekit.advice import lower_memory
from tunekit.recipe import Recipe, recipe_from

PIVOTAL = [{"name": "<zorp>", "vectors": 2, "init": "robot"}]


def recipe(**sections: Any) -> Recipe:
    made: dict[str, Any] = {
        "base": {"model": "toybox"},
        "data": {"source": "datasets/zorp/train", "trigger": "zorp", "class": "robot"},
        "adapter": {"kind": "lora"},
        "train": {"steps": 8},
    }
    for name, values in sections.items():
        made[name] = made.get(name, {}) | values if isinstance(values, dict) else values
    return recipe_from(made | {"name": "planned"})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"adapter": {"text_encoder": True, "text_encoder_rank": 4}},
        {"adapter": {"kind": "full"}, "train": {"ema": 0.99, "batch_size": 9}},
        {"train": {"optimizer": "prodigy", "gradient_accumulation": 3}},
        {"data": {"resolution": 768, "trigger": "<zorp>"}, "tokens": PIVOTAL},
    ],
)
def test_advice_can_be_typed_behind_the_recipe(sections: dict[str, Any]) -> None:
    first = recipe(**sections)
    told = lower_memory(first, 512)
    assert told
    for advice in told:
        changed = recipe_from(first, advice.settings)
        assert changed != first
        assert advice.settings not in [other.settings for other in lower_memory(changed, 512)]


def test_what_costs_nothing_but_time_is_advised_first() -> None:
    told = lower_memory(recipe(train={"batch_size": 6}))
    assert told[0].settings == ("train.batch_size=3", "train.gradient_accumulation=2")
    assert [advice.free for advice in told] == sorted((a.free for a in told), reverse=True)


def test_advice_leaves_out_what_is_set_or_would_be_refused() -> None:
    told = lower_memory(
        recipe(adapter={"kind": "full"}, train={"batch_size": 1, "optimizer": "adafactor"})
    )
    keys = {setting.partition("=")[0] for advice in told for setting in advice.settings}
    assert not keys & {"train.batch_size", "train.optimizer", "base.dtype", "base.quantize"}
