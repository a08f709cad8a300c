"""Every way to train goes on as if never stopped: all that is drawn, learned and remembered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from resumed import (
    EVERYTHING,
    HAT,
    LORA,
    NOISY,
    STEPS,
    STOP,
    TEXT,
    TOLD,
    WORD,
    Live,
    assert_ended_alike,
    assert_same,
    digest,
    draw_pictures,
    recipe_of,
)
from tiny import FAMILIES
from told import Killed
from torch._dynamo.utils import counters

from tunekit import adapters, checkpoint
from tunekit.recipe import Recipe, dump_yaml
from tunekit.schema import Quantized
from tunekit.schema_train import OptimizerName
from tunekit.train import StepRecord

Tree = dict[str, dict[str, Any]]


def kinds() -> Iterator[tuple[str, Tree]]:
    """Yield every adapter kind as it comes, and with each of its choices taken otherwise."""
    for kind, settings in adapters.settings_types().items():
        fields = settings.model_fields
        yield kind, {"adapter": {"kind": kind}}
        drops = {name: 0.3 for name in fields if name.endswith("dropout")}
        yield f"{kind}, with text encoder", {"adapter": {"kind": kind, "text_encoder": True}}
        if drops:
            yield f"{kind}, dropout", {"adapter": {"kind": kind, **drops}}
        for name, field in fields.items():
            if name in ("kind", "targets", "text_encoder"):
                continue
            choices: tuple[Any, ...] = ()
            if field.annotation is bool:
                choices = (True, False)
            elif get_origin(field.annotation) is Literal:
                choices = get_args(field.annotation)
            for value in choices:
                if value != field.default:
                    more = {"kind": kind, name: value}
                    yield f"{kind}, {name}: {value}", {"adapter": more}


def optimizers() -> Iterator[tuple[str, Tree]]:
    """Yield every optimizer, with tensors large enough for states of 8 bits."""
    for name in get_args(OptimizerName):
        train: dict[str, Any] = {"optimizer": name, "warmup_steps": 2}
        if name != "schedulefree_adamw":
            train["schedule"] = "cosine"
        train["learning_rate"] = 1.0 if name == "prodigy" else 1e-3
        yield name, {"train": train, "adapter": {"kind": "lora", "rank": 64}}


def quantized() -> Iterator[tuple[str, Tree]]:
    for name in get_args(Quantized):
        yield f"base of {name}", {"base": {"quantize": name}, "adapter": {**LORA, "dropout": 0.2}}


WAYS: dict[str, Tree] = {
    **dict(kinds()),
    **dict(optimizers()),
    **dict(quantized()),
    "words alone": {"tokens": [WORD, HAT], "adapter": None, "data": TOLD},
    "words until half of the steps": {
        "tokens": [{**WORD, "stop_at": 0.5}],
        "adapter": TEXT,
        "data": TOLD,
    },
    "words until a third of the steps": {
        "tokens": [{**WORD, "stop_at": 0.3}, HAT],
        "adapter": LORA,
        "data": TOLD,
    },
    "pictures of the class": {"data": {"prior": {"count": 3, "steps": 1}}},
    "masks": {"data": {"mask": {"background_weight": 0.2}, "flip": True, "crop": "random"}},
    "parts of a step": {"train": {"batch_size": 1, "gradient_accumulation": 3}},
    "an epoch's end within a batch": {"train": {"batch_size": 3}},
    "an epoch a step": {"train": {"batch_size": 4}},
    "an average": {"train": {"ema": 0.9}},
    "an average that does not draw": {"train": {"ema": 0.9, "ema_export": False}},
    "activations computed twice": {"train": {"gradient_checkpointing": True}, "adapter": TEXT},
    "steps within the backward pass": {"train": {"fused_backward": True, "ema": 0.9}},
    "muon within the backward pass": {"train": {"fused_backward": True, "optimizer": "muon"}},
    "captions by chance": {
        "data": {
            "captions": {
                "template": ["a {trigger} {class}", "{trigger}", "a red {trigger}"],
                "dropout": 0.3,
                "tag_dropout": 0.3,
                "shuffle": True,
            }
        }
    },
    "crops and mirrors by chance": {"data": {"crop": "random", "flip": True}},
    "shapes and sizes": {"data": {"buckets": {"step": 8}, "resolution": [32, 24], "upscale": True}},
    "noise of every sort": {"train": {"objective": NOISY}},
    "half the bits": {"train": {"precision": "bf16"}, "base": {"dtype": "bf16"}},
}


@pytest.fixture(scope="module")
def made(
    tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recipe]:
    """Give a maker of recipes: what a way says, over a small run."""
    pictures = draw_pictures(tmp_path_factory.mktemp("drawn"))
    return partial(recipe_of, tree, pictures)


@pytest.mark.parametrize("way", WAYS)
def test_what_goes_on_ends_bit_equal(made: Callable[..., Recipe], tmp_path: Path, way: str) -> None:
    recipe = made(WAYS[way])
    whole = Live(recipe, tmp_path)
    start = whole.loop.adapter.state()
    records = whole.go(0, STEPS, saving=True)
    state = whole.loop.state()
    assert any(not torch.equal(start[name], state["adapter"][name]) for name in start)
    if recipe.train.optimizer.endswith("8bit"):
        assert any(value.dtype == torch.uint8 for value in state["optimizer"].values())
    resumed = Live(recipe, tmp_path)
    resumed.take_up(STOP)
    assert_ended_alike(whole, records, resumed, resumed.go(STOP, STEPS))


def test_another_process_goes_on_with_each_kind(
    made: Callable[..., Recipe], tmp_path: Path
) -> None:
    """One with other hashes, so that the order of no set of names can matter."""
    names = [*adapters.names(), "words alone", "pictures of the class", "came"]
    folders, wanted = [], []
    for number, name in enumerate([*names, "everything"]):
        whole = Live(made(WAYS.get(name, EVERYTHING)), tmp_path / str(number))
        whole.go(0, STEPS, saving=True)
        (whole.folder / "recipe.yaml").write_text(dump_yaml(whole.recipe))
        folders.append(str(whole.folder))
        wanted.append(f"ended {digest([whole.seen[STEPS - 1], whole.loop.state()])}")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "resumed.py"), *folders],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on(
    made: Callable[..., Recipe], tiny_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    recipe = made({"adapter": TEXT}, tiny_folder(family))
    whole = Live(recipe, tmp_path)
    records = whole.go(0, STEPS, saving=True)
    resumed = Live(recipe, tmp_path)
    resumed.take_up(STOP)
    assert_ended_alike(whole, records, resumed, resumed.go(STOP, STEPS))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings(  # torch's own, when it compiles
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
def test_compiled_blocks_go_on(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part compiles its own, as another process would; dropout draws within the blocks."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    way: Tree = {
        "adapter": {**LORA, "dropout": 0.3},
        "train": {"compile": True, "ema": 0.9},
    }
    recipe = made(way)
    torch._dynamo.reset()
    counters.clear()
    whole = Live(recipe, tmp_path)
    records = whole.go(0, STEPS, saving=True)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    resumed = Live(recipe, tmp_path)
    resumed.take_up(STOP)
    assert_ended_alike(whole, records, resumed, resumed.go(STOP, STEPS))


@pytest.mark.parametrize("way", ["everything", "prodigy", "schedulefree_adamw"])
def test_stopped_after_every_single_step(
    made: Callable[..., Recipe], tmp_path: Path, way: str
) -> None:
    recipe = made(WAYS.get(way, EVERYTHING))
    whole = Live(recipe, tmp_path)
    records = whole.go(0, STEPS)
    for step in range(STEPS):
        resumed = Live(recipe, tmp_path)
        if step:
            resumed.take_up(step)
        assert resumed.go(step, step + 1) == records[step : step + 1]
        resumed.save(step + 1)
    assert whole.seen[STEPS - 1] == resumed.seen[STEPS - 1]
    assert_same(whole.loop.state(), resumed.loop.state())


@pytest.fixture(scope="module")
def undisturbed(
    made: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Live, list[StepRecord]]:
    """Return a run of everything that was never stopped, saved after step STOP, and its steps."""
    whole = Live(made(EVERYTHING), tmp_path_factory.mktemp("whole"))
    return whole, whole.go(0, STEPS, saving=True)


@pytest.mark.parametrize("error", [RuntimeError, Killed])
@pytest.mark.parametrize(("place", "micro"), [("pictures", 1), ("denoiser", 2), ("backward", 2)])
def test_what_fails_in_the_middle_of_a_step_leaves_the_last_finished_one(
    made: Callable[..., Recipe],
    undisturbed: tuple[Live, list[StepRecord]],
    tmp_path: Path,
    place: str,
    micro: int,
    error: type[BaseException],
) -> None:
    recipe, (whole, records) = made(EVERYTHING), undisturbed

    def fault(where: str, step: int, part: int) -> None:
        if (where, step, part) == (place, STOP, micro):
            raise error

    failing = Live(recipe, tmp_path)
    failing.fault = fault
    for parameter in failing.loop.parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: failing.fault("backward", failing.step, failing.micro)
        )
    with pytest.raises(error):
        failing.go(0, STEPS)
    assert failing.loop.whole
    saved = checkpoint.read(whole.folder / f"step-{STOP:06d}").tensors
    assert_same(saved, failing.loop.state())
    failing.save(STOP)
    resumed = Live(recipe, tmp_path)
    resumed.take_up(STOP)
    assert_ended_alike(whole, records, resumed, resumed.go(STOP, STEPS))


@pytest.mark.parametrize(("place", "is_whole"), [("denoiser", True), ("backward", False)])
def test_a_half_taken_step_is_known_as_such(
    made: Callable[..., Recipe], tmp_path: Path, place: str, is_whole: bool
) -> None:
    """Where steps are taken within the backward pass, one that fails there cannot be saved."""
    recipe = made(WAYS["steps within the backward pass"])
    failing = Live(recipe, tmp_path)

    def fault(where: str, step: int, part: int) -> None:
        if (where, step) == (place, STOP):
            raise RuntimeError

    failing.fault = fault
    last = failing.loop.parameters[0]
    last.register_post_accumulate_grad_hook(lambda _: failing.fault("backward", failing.step, 0))
    steps = failing.loop.run(failing.asked)
    for _ in range(STOP):
        next(steps)
    before = failing.loop.state()
    with pytest.raises(RuntimeError):
        next(steps)
    assert failing.loop.whole is is_whole
    after = failing.loop.state()
    moved = any(
        not torch.equal(before["trained"][k], after["trained"][k]) for k in after["trained"]
    )
    assert moved is not is_whole
