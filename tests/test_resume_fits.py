"""A checkpoint that does not fit is refused by name, before anything of the run is touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunekit
from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.progress import Silent
from tunekit.recipe import Recipe, dump_yaml, recipe_from
from tunekit.resume import find
from tunekit.run import Run

Tree = dict[str, dict[str, Any]]
Sets = dict[str, dict[str, torch.Tensor]]


def smaller(name: str, like: str) -> Callable[[Sets], None]:
    """Cut the first tensor whose name ends so in half."""

    def change(sets: Sets) -> None:
        key = next(key for key in sorted(sets[name]) if key.endswith(like))
        sets[name][key] = sets[name][key].flatten()[: sets[name][key].numel() // 2].clone()

    return change


def another(name: str, key: str) -> Callable[[Sets], None]:
    """Add a tensor that nobody wrote."""

    def change(sets: Sets) -> None:
        sets[name][key] = torch.ones(3)

    return change


def forgetful(sets: Sets) -> None:
    """Say of every parameter that no step has moved it, as of one whose gradient never came."""
    optimizer = sets["optimizer"]
    for key in list(optimizer):
        kind, _, place = key.partition("/")
        if kind in ("tensor", "int", "float", "bool"):
            del optimizer[key]
            optimizer[f"none/{'.'.join(place.split('.')[:2])}"] = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (forgetful, "has learned nothing, though steps were taken"),
        (smaller("adapter", ".weight"), "has another shape of"),
        (another("adapter", "unet.nothing"), "holds unknown unet.nothing"),
        (smaller("optimizer", ".exp_avg"), "optimizer state does not fit: tensor/0.0.exp_avg"),
        (another("optimizer", "tensor/0.99999.exp_avg"), "tensor/0.99999.exp_avg is none"),
        (another("optimizer", "strange"), "strange is none of this recipe's"),
        (another("guards", "more"), "state of the guards"),
    ],
)
def test_state_that_does_not_fit_leaves_the_finished_run_as_it_is(
    tree: Callable[..., Tree],
    run: Run,
    tmp_path: Path,
    change: Callable[[Sets], None],
    says: str,
) -> None:
    """The checkpoint is whole by its manifest; export, report and curve stay."""
    out = tmp_path / "run"
    shutil.copytree(run.folder, out)
    last = checkpoint.steps(out / "checkpoints")[-1]
    saved = checkpoint.read(last)
    change(saved.tensors)
    checkpoint.save(last, saved.tensors, saved.meta)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    longer = tree(train={"steps": 6, "checkpoint_every": 0, "sample_every": 0})
    with pytest.raises(UserError) as caught:
        tunekit.train(longer, out=out, reporter=Silent(), resume=True)
    line = str(caught.value)
    assert line.startswith(f"{last}: ")
    assert says in line
    assert line.endswith("take another checkpoint")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_without_the_weights_that_train_nothing_goes_on(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    """Schedule-free draws with other weights than it trains; even where it is not said so."""
    made = recipe_from(tree(train={"optimizer": "schedulefree_adamw"}))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(made))
    tensors = {name: {"a": torch.ones(1)} for name in ("adapter", "optimizer", "guards")}
    checkpoint.save(tmp_path / "checkpoints" / "step-000002", tensors, {"step": 2})
    with pytest.raises(UserError, match=r"step-000002: has no trained state, so nothing can go on"):
        find(tmp_path, None, made, False, finished=False)


def test_a_checkpoint_of_another_step_than_its_name_says(
    tree: Callable[..., Tree], run: Run, tmp_path: Path
) -> None:
    """What comes after the step would be cleared away: the checkpoint itself."""
    out = tmp_path / "run"
    shutil.copytree(run.folder, out)
    last = checkpoint.steps(out / "checkpoints")[-1]
    saved = checkpoint.read(last)
    checkpoint.save(last, saved.tensors, saved.meta | {"step": 1})
    with pytest.raises(UserError, match=r"step-000004: does not say .* the step of its name"):
        tunekit.train(tree(train={"steps": 6}), out=out, reporter=Silent(), resume=True)
    assert last.is_dir()


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"schedule": "cosine"}},
        {"train": {"schedule": "warmup_stable_decay", "decay_steps": 4}},
        {"data": {"trigger": "<zorp>"}, "tokens": [{"name": "<zorp>", "stop_at": 0.25}]},
    ],
)
def test_more_steps_change_the_past_where_it_hangs_on_them(
    tree: Callable[..., Tree], tmp_path: Path, sections: Tree
) -> None:
    def made(steps: int) -> Recipe:
        trained = {**sections.get("train", {}), "steps": steps, "sample_every": 0}
        recipe: Any = tree(data=sections.get("data", {}), train=trained)
        return recipe_from(recipe | {"tokens": sections.get("tokens", [])})

    (tmp_path / "recipe.yaml").write_text(dump_yaml(made(4)))
    tensors = {name: {"a": torch.ones(1)} for name in ("adapter", "optimizer", "guards")}
    checkpoint.save(tmp_path / "checkpoints" / "step-000002", tensors, {"step": 2})
    assert find(tmp_path, None, made(4), False, finished=False).step == 2
    with pytest.raises(UserError, match=r"train\.steps: 4 -> 8\n.*would have been others: "):
        find(tmp_path, None, made(8), False, finished=False)
    assert find(tmp_path, None, made(8), True, finished=False).step == 2


def test_more_steps_are_free_until_the_rate_falls(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    def made(steps: int) -> Recipe:
        train = {"schedule": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 2}
        return recipe_from(tree(train={**train, "steps": steps, "sample_every": 0}))

    (tmp_path / "recipe.yaml").write_text(dump_yaml(made(6)))
    tensors = {name: {"a": torch.ones(1)} for name in ("adapter", "optimizer", "guards")}
    for step in (5, 6):
        checkpoint.save(tmp_path / "checkpoints" / f"step-00000{step}", tensors, {"step": step})
    early = Path("step-000005")
    assert find(tmp_path, early, made(9), False, finished=False).step == 5
    with pytest.raises(UserError, match=r"train\.steps: 6 -> 9\n  \(the 6 steps that were taken"):
        find(tmp_path, None, made(9), False, finished=False)


def test_an_fp16_checkpoint_without_its_scale_is_refused(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    """Also where its meta.json says that none was saved: the recipe tells that there was one."""
    recipe = recipe_from(tree(train={"precision": "fp16"}))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    sets = {name: {"a": torch.ones(2)} for name in ("adapter", "optimizer", "guards", "scaler")}

    def found() -> None:
        facts = {"step": 1, "sets": sorted(sets)}
        checkpoint.save(tmp_path / "checkpoints" / "step-000001", sets, facts)
        find(tmp_path, None, recipe, allow_changed=False, finished=False)

    found()
    del sets["scaler"]
    with pytest.raises(UserError, match="step-000001: has no scaler state"):
        found()
