"""The training section of a recipe: defaults that hang together, contradictions refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunekit.recipe import RecipeError, recipe_from
from tunekit.schema import Train

RECIPE: dict[str, Any] = {
    "name": "x",
    "base": {"model": "toybox"},
    "data": {"source": "datasets", "trigger": "zorp", "class": "robot"},
    "adapter": {"kind": "lora"},
}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "multiplies it with this one"),
        (
            {"optimizer": "prodigy", "text_encoder_learning_rate": 1e-5},
            "too small for prodigy",
        ),
        ({"optimizer": "adafactor", "betas": [0.9, 0.99]}, "does not have two moment decays"),
        ({"optimizer": "came", "betas": [0.9, 0.99]}, "under optimizer_args.betas"),
        ({"optimizer": "schedulefree_adamw", "schedule": "cosine"}, "leave it constant"),
        ({"optimizer": "schedulefree_adamw", "ema": 0.9}, "averages already"),
        ({"optimizer_args": {"lr": 1.0}}, "the key is train.learning_rate"),
        ({"optimizer_args": {"betas": [0.9, 0.9]}}, "the key is train.betas"),
        ({"optimizer_args": {"weight_decay": 0.1}}, "the key is train.weight_decay"),
        ({"optimizer_args": {"eps": {"a": 1}}}, "eps must be one value or a list"),
        ({"cycles": 3, "schedule": "cosine"}, "belongs to schedule: cosine_with_restarts"),
        ({"power": 2.0}, "belongs to schedule: polynomial"),
        ({"decay_steps": 5}, "belongs to schedule: warmup_stable_decay"),
        (
            {
                "schedule": "warmup_stable_decay",
                "steps": 10,
                "warmup_steps": 4,
                "decay_steps": 7,
            },
            r"7 and warmup_steps \(4\) are more than steps \(10\)",
        ),
        ({"ema": 1.0}, "less than 1"),
        ({"keep_every": 100}, "without keep_last every checkpoint stays"),
        (
            {"keep_last": 2, "keep_every": 150, "checkpoint_every": 100},
            r"150 is not a multiple of checkpoint_every \(100\)",
        ),
        ({"keep_last": 1, "keep_every": 4, "checkpoint_every": 0}, "not a multiple"),
        ({"keep_last": 0}, "greater than or equal to 1"),
        ({"keep_best": True, "sample_every": 0}, "needs samples along the way"),
        ({"max_skips": 3}, "belongs to on_nonfinite: skip and on_spike: skip"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Train(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "prodigy"},
        {"optimizer": "prodigy", "learning_rate": 0.0},
        {"optimizer": "came", "optimizer_args": {"betas": [0.9, 0.99, 0.999]}},
        {"schedule": "cosine_with_restarts", "cycles": 4},
        {"schedule": "polynomial", "power": 0.5},
        {"schedule": "warmup_stable_decay", "decay_steps": 5, "warmup_steps": 5, "steps": 10},
        {"ema": 0.999, "ema_export": False},
        {"keep_last": 2, "keep_every": 200, "checkpoint_every": 100, "keep_best": True},
        {"on_spike": "skip", "max_skips": 3},
    ],
)
def test_what_belongs_together_is_taken(values: dict[str, Any]) -> None:
    assert Train(**Train(**values).model_dump()) == Train(**values)


def test_the_usual_rate_comes_with_the_optimizer() -> None:
    rates = {name: Train(optimizer=name).learning_rate for name in ("adamw", "lion", "prodigy")}  # type: ignore[arg-type]
    assert rates == {"adamw": 1e-4, "lion": 2e-5, "prodigy": 1.0}


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("snr_gamma", "train.objective.min_snr_gamma"),
        ("min_snr_gamma", "train.objective.min_snr_gamma"),
        ("ip_noise_gamma", "train.objective.input_perturbation"),
        ("discrete_flow_shift", "train.objective.shift"),
        ("multires_noise_discount", "train.objective.pyramid_noise"),
        ("loss_type", "train.objective.loss"),
        ("debiased_estimation_loss", "train.objective.debiased"),
        ("optimizer_type", "optimizer"),
        ("lr_scheduler_num_cycles", "cycles"),
        ("use_ema", "ema"),
    ],
)
def test_words_of_other_trainers_lead_to_the_key(word: str, key: str) -> None:
    with pytest.raises(RecipeError, match=rf'train\.{word}: unknown key \(did you mean "{key}"\?'):
        recipe_from(RECIPE | {"train": {word: 1}})


def test_keys_two_sections_deep_can_be_overridden() -> None:
    recipe = recipe_from(
        RECIPE,
        [
            "train.objective.loss=huber",
            "train.objective.huber_c=0.2",
            "train.optimizer_args.eps=1e-6",
        ],
    )
    assert (recipe.train.objective.loss, recipe.train.objective.huber_c) == ("huber", 0.2)
    assert recipe.train.optimizer_args == {"eps": 1e-6}
