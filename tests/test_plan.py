"""What a run will take, told beforehand: parameters, steps, memory, and what would lower it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from tunekit import adapters, tokens
from tunekit.adapters.base import Adapter
from tunekit.advice import lower_memory
from tunekit.cli import app
from tunekit.errors import UserError
from tunekit.plan import Plan, plan, walk
from tunekit.plan.memory import LIBRARIES
from tunekit.plan.outline import Outline
from tunekit.recipe import Recipe, dump_yaml, recipe_from
from tunekit.schema_train import OptimizerName

Tree = Callable[..., dict[str, dict[str, Any]]]
Load = Callable[..., Any]

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
        {"train": {"optimizer": "muon", "betas": [0.9, 0.95]}},
        {"train": {"optimizer": "adamw", "optimizer_args": {"amsgrad": True}}},
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


def planned(tree: dict[str, Any], folder: Path) -> Plan:
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(recipe_from(tree)))
    return plan(path)


def attached(recipe: Recipe, family: Any) -> Adapter:
    words = (recipe.adapter, recipe.tokens, recipe.data.class_noun, recipe.train.seed)
    return tokens.attach(family, *words)


KINDS = [*adapters.names()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoder too"])
def test_counts_what_really_trains(kind: str, text: bool, tree: Tree, load_tiny: Load) -> None:
    made = recipe_from(tree() | {"adapter": {"kind": kind, "text_encoder": text}})
    outline = Outline.of(made)
    real = attached(made, load_tiny())
    assert {n: tuple(p.shape) for n, p in outline.trained.items()} == {
        name: tuple(parameter.shape) for name, parameter in real.trained().items()
    }
    assert sum(outline.counts().values()) == real.parameter_count()
    assert set(outline.counts()) == {"denoiser"} | ({"text_encoder"} if text else set())


def test_counts_new_words(tree: Tree, load_tiny: Load) -> None:
    made = recipe_from(tree(data={"trigger": "<zorp>"}) | {"tokens": PIVOTAL})
    outline, real = Outline.of(made), attached(made, load_tiny())
    assert outline.trained.keys() == real.trained().keys()
    assert outline.counts()["tokens"] == 2 * 32


def test_reads_no_weight(tree: Tree, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    bare = tmp_path / "base"
    for path in tiny_folder().rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            there = bare / path.relative_to(tiny_folder())
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
    made = planned(tree(base={"model": str(bare)}), tmp_path)
    assert made.ok
    assert made.trained == planned(tree(), tmp_path).trained


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_optimizers_state_is_as_large_as_it_is_said(name: str) -> None:
    """Measured after a real step, over matrices, convolutions, vectors and rows of words."""
    import torch
    from torch import nn

    from tunekit.optim import ParameterGroup, build_optimizer, state_bytes
    from tunekit.optim.state import members

    train = recipe(train={"optimizer": name}).train
    shapes = [(64, 64), (128, 96), (8, 16), (32, 16, 3, 3), (70,), (5000,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    rows = [nn.Parameter(torch.randn(2, 32))]
    groups = [ParameterGroup("weights", ours), ParameterGroup("word", rows, rows=True)]
    made = build_optimizer(train, groups)
    for parameter in [*ours, *rows]:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    held: dict[int, int] = {}
    for member in members(made):
        for state in member.state.values():
            for key, value in state.items():
                # Tables of 256 numbers are one for all; a step's count is a number.
                if isinstance(value, torch.Tensor) and value.ndim and "qmap" not in key:
                    held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert sum(state_bytes(train, groups)) == sum(held.values())


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_the_base_is_as_large_as_it_is_said(kind: str | None, tree: Tree) -> None:
    from tunekit import families
    from tunekit.quantize import bytes_held

    made = recipe_from(tree(base={"quantize": kind}))
    told = Outline.of(made).base
    real = families.load(made.base).components()
    assert {n: sum(kinds.values()) for n, kinds in told.items()} == {
        name: bytes_held(module) for name, module in real.items()
    }


@pytest.mark.parametrize(
    "sizes",
    [
        walk.Sizes((32, 32)),
        walk.Sizes((32, 32), (32, 32)),
        walk.Sizes((32, 32), (32, 32), together=True),
        walk.Sizes((24, 32), (32, 32), together=True),
    ],
    ids=str,
)
def test_activations_are_those_of_a_real_pass(
    tree: Tree, load_tiny: Load, sizes: walk.Sizes
) -> None:
    """What is saved for the backward pass, against torch's own hooks around a real one."""
    import torch

    made = recipe_from(tree())
    count = 2 * made.train.batch_size if sizes.together else made.train.batch_size
    ledger = walk.walk(Outline.of(made), made, sizes)
    training = next(phase for phase in ledger.phases if phase.name == walk.TRAINING)

    family = load_tiny()
    adapter = attached(made, family)
    adapter.train()
    with torch.no_grad():
        told = family.encode_prompt(["a"] * count)
    frozen = {
        tensor.untyped_storage().data_ptr()
        for module in family.components().values()
        for tensor in (*module.parameters(), *module.buffers())
    }
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noise = torch.randn(count, 4, 8, 8)
        predicted = family.predict(noise, torch.ones(count, dtype=torch.int64), told)
        loss = ((predicted.float() - noise) ** 2).mean()
    real = sum(storage.nbytes() for storage in saved.values())
    assert loss.requires_grad
    assert training.peak["saved for backward"] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("smaller", "part"),
    [
        ({"train": {"batch_size": 1}}, "saved for backward"),
        ({"train": {"precision": "bf16"}}, "saved for backward"),
        ({"train": {"gradient_checkpointing": True}}, "saved for backward"),
        ({"train": {"optimizer": "adafactor"}}, "optimizer state"),
        ({"adapter": {"rank": 1}}, "what trains"),
        ({"train": {"ema": None}}, "average of the weights"),
    ],
)
def test_settings_lower_the_part_they_are_said_to(
    smaller: dict[str, Any], part: str, tree: Tree
) -> None:
    def training(sections: dict[str, Any]) -> dict[str, int]:
        whole = {"train": {"ema": 0.9, "batch_size": 4}, "adapter": {"kind": "lora", "rank": 4}}
        merged = {key: value | sections.get(key, {}) for key, value in whole.items()}
        made = recipe_from(tree(**merged))
        ledger = walk.walk(Outline.of(made), made, walk.Sizes((32, 32)))
        return next(phase for phase in ledger.phases if phase.name == walk.TRAINING).peak

    assert training(smaller).get(part, 0) < 0.8 * training({})[part]


def test_what_training_refuses_of_the_base_plan_refuses_too(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe_from(tree(train={"gradient_checkpointing": True}))
    outline = Outline.of(made)
    monkeypatch.setattr(type(outline.family.denoiser), "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"^train\.gradient_checkpointing: "):
        walk.walk(outline, made, walk.Sizes((32, 32)))


def test_says_steps_epochs_and_memory(tree: Tree, tmp_path: Path) -> None:
    made = planned(tree(train={"steps": 6, "batch_size": 2, "gradient_accumulation": 2}), tmp_path)
    told = made.as_dict()
    assert told["steps"]["epochs"] == 6 * 2 * 2 / 4
    assert told["steps"]["pictures"] == {"pictures": 4, "repeated": 4}
    assert told["memory"]["peak"] == max(
        sum(parts.values()) for parts in told["memory"]["phases"].values()
    )
    assert told["memory"]["phases"]["training"][LIBRARIES] > 100e6
    assert told["memory"]["enough"]
    text = "\n".join(made.lines())
    assert "6 steps of 4: 6 epochs" in text
    assert "in 2 parts" in text
    assert "would lower it" in text


def test_says_where_the_machine_has_less(tree: Tree, tmp_path: Path) -> None:
    from dataclasses import replace

    made = planned(tree(), tmp_path)
    assert not any(line.startswith("warning") for line in made.lines())
    small = replace(made, room=1 << 20)
    assert any(line.startswith("warning: this machine has 1 MiB") for line in small.lines())
    assert not small.as_dict()["memory"]["enough"]


def test_pictures_that_training_refuses_are_told_as_inspect_tells_them(
    tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty" / "broken.txt").write_text("a zorp robot")
    path = tmp_path / "recipe.yaml"
    made = tree(data={"source": str(tmp_path / "empty")})
    path.write_text(dump_yaml(recipe_from(made)))
    verbs = [CliRunner().invoke(app, [verb, str(path), "--json"]) for verb in ("inspect", "plan")]
    assert [result.exit_code for result in verbs] == [2, 2]
    found = [json.loads(result.stdout)["findings"] for result in verbs]
    assert found[0] == found[1]
    assert any(finding["severity"] == "error" for finding in found[0])
    assert "to mend" in CliRunner().invoke(app, ["plan", str(path)]).stdout


def test_a_wrong_recipe_is_refused(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: {model: toybox}\n")
    with pytest.raises(ValueError, match="data"):
        plan(path)


def test_probe_takes_steps_and_tells_the_time(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe_from(tree(train={"steps": 40, "sample_every": 20}))))
    times = plan(path, probe=True).times
    assert times is not None
    assert times.steps_taken == 5
    assert times.training == pytest.approx(40 * times.step)
    # One prompt, before, at 20 and at 40; the evaluation draws at least one before and one after.
    assert times.samples == pytest.approx(3 * times.picture)
    assert times.evaluating >= 2 * times.picture
    assert not list(tmp_path.glob("runs*"))
