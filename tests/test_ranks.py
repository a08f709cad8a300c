"""Several processes train as one: the same pictures, gradients and files, and one end for all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import HAT, TOLD, WORD, draw_pictures, recipe_of
from two_ranks import STOP, Taken, take

import tunekit
from tunekit import checkpoint, launch
from tunekit.errors import UserError
from tunekit.progress import Silent
from tunekit.ranks import ALONE, Ranks, joined
from tunekit.recipe import Recipe, RecipeError, dump_yaml, load_recipe, recipe_from

# Two processes and what starts them, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1800)

Tree = dict[str, dict[str, Any]]
TEXT = {"kind": "lora", "rank": 2, "text_encoder": True}
STEPS = 4
WAYS: dict[str, Tree] = {
    "much": {
        "data": {
            **TOLD,
            "captions": {**TOLD["captions"], "shuffle": True, "dropout": 0.3},
            "mask": {"background_weight": 0.2},
            "crop": "random",
            "flip": True,
            "prior": {"count": 3, "steps": 1, "weight": 0.5},
        },
        "tokens": [{**WORD, "stop_at": 0.5}, HAT],
        "adapter": TEXT,
        "train": {"gradient_accumulation": 2, "ema": 0.9, "gradient_checkpointing": True},
    },
    "skips.nan": {"adapter": {**TEXT, "dropout": 0.3}, "train": {"on_nonfinite": "skip"}},
    "parts": {
        "base": {"model": "toybox"},
        "data": {"resolution": 32},
        "adapter": {"kind": "full", "targets": "attention"},
        "train": {"fsdp": True, "ema": 0.9, "gradient_accumulation": 2},
    },
    "whole.run": {
        "adapter": {"kind": "full"},
        "train": {"steps": 2, "fsdp": True, "sample_every": 1, "keep_best": True},
    },
}


@pytest.fixture(scope="module")
def recipes(
    tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Recipe]:
    folder = draw_pictures(tmp_path_factory.mktemp("pictures"))
    made = {}
    for name, way in WAYS.items():
        train = {"steps": STEPS, "learning_rate": 1e-3, **way.get("train", {})}
        made[name] = recipe_of(tree, folder, {**way, "train": train})
    return made


@pytest.fixture(scope="module")
def two(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what two processes did, which torchrun started."""
    folder = tmp_path_factory.mktemp("two")
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(dump_yaml(recipe))
    job = [str(Path(__file__).parent / "two_ranks.py"), str(folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *job], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-14000:]
    return folder


def told(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


STEPPED = [name for name in WAYS if not name.endswith(".run")]


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe]) -> Callable[[str], Taken]:
    """Return what gives the same run by one process, of the same batches."""
    made: dict[str, Taken] = {}

    def taken(name: str) -> Taken:
        if name not in made:
            made[name] = take(ALONE, recipes[name], nan=name.endswith(".nan"))
        return made[name]

    return taken


@pytest.mark.parametrize("name", ["much", "parts"])
def test_two_processes_learn_what_one_learns(
    two: Path, alone: Callable[[str], Taken], name: str
) -> None:
    """One process whose batch is as large as theirs together: gradients to 1e-6, then weights."""
    one = alone(name)
    found = checkpoint.read(two / f"{name}-state").tensors
    gradients = found.pop("gradients")
    assert gradients.keys() == one.gradients.keys()
    assert any(float(grad.abs().max()) > 1e-3 for grad in gradients.values())
    for part, grad in gradients.items():
        assert torch.allclose(grad, one.gradients[part], rtol=0, atol=1e-6), part
    assert found.keys() == one.state.keys()
    for part, tensor in found["adapter"].items():
        assert float((tensor - one.state["adapter"][part]).abs().mean()) < 1e-5, part
    for mine, theirs in zip(told(two, name)["one"]["records"], one.records, strict=True):
        for key, value in mine.items():
            near = isinstance(value, float)
            assert value == (pytest.approx(theirs[key], rel=1e-3) if near else theirs[key]), key


@pytest.mark.parametrize("name", ["much", "parts"])
def test_each_computes_its_half_of_the_same_order(
    two: Path, alone: Callable[[str], Taken], name: str
) -> None:
    """Every picture is seen as often as one process would see it, and by one of the two."""
    halves = [told(two, name, rank)["one"]["seen"] for rank in (0, 1)]
    whole = alone(name).seen
    assert [len(half) for half in halves] == [len(whole)] * 2
    for (place, *rows), (_, *first), (_, *second) in zip(whole, *halves, strict=True):
        names, words = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        assert [first[0], second[0]] == names, place
        assert [first[1], second[1]] == words, place


@pytest.mark.parametrize("name", STEPPED)
def test_both_hold_the_same_and_going_on_is_exact(two: Path, name: str) -> None:
    first, second = (told(two, name, rank) for rank in (0, 1))
    assert first["one"]["digest"] == second["one"]["digest"]
    assert first["one"]["records"] == second["one"]["records"]
    for both in (first, second):
        assert both["again"]["digest"] == both["one"]["digest"]
        assert both["again"]["records"] == both["one"]["records"][STOP:]


def test_a_number_that_is_none_is_found_by_both(two: Path) -> None:
    for rank in (0, 1):
        second = told(two, "skips.nan", rank)["one"]["records"][1]
        assert second["skipped"]
        assert second["skips"] == 1
        assert "the loss is nan" in second["noticed"]


def test_one_process_goes_on_with_the_order_of_two(
    two: Path, alone: Callable[[str], Taken], recipes: dict[str, Recipe]
) -> None:
    before = checkpoint.read(two / "much-stopped").tensors
    later = take(ALONE, recipes["much"], before, STOP)
    whole = alone("much")
    assert later.seen == [row for row in whole.seen if int(row[0].split(".")[0]) >= STOP]
    assert later.records[-1]["loss"] == pytest.approx(whole.records[-1]["loss"], rel=1e-3)


def test_each_holds_a_part_of_what_trains(two: Path) -> None:
    """What is saved is whole, and any number of processes can go on from it."""
    held = [told(two, "parts", rank)["one"]["held"] for rank in (0, 1)]
    saved = checkpoint.read(two / "parts-state").tensors["adapter"]
    total = sum(tensor.numel() for tensor in saved.values())
    assert sum(held) == total
    assert max(held) < 0.6 * total


def test_a_whole_run_in_parts_leaves_what_one_process_leaves(two: Path) -> None:
    folder = two / "whole.run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [path.name for path in checkpoint.steps(folder / "checkpoints")]
    assert list((folder / "export").glob("*.safetensors"))
    assert (folder / "report.html").is_file()
    for step in (0, 1, 2):
        assert (folder / "samples" / f"step-{step:06d}.png").is_file()


@pytest.fixture(scope="module")
def written(tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a recipe that takes many steps and saves each of them."""
    path = tmp_path_factory.mktemp("typed") / "recipe.yaml"
    train = {"steps": 300, "checkpoint_every": 1, "keep_last": 2, "sample_every": 0, "ema": 0.9}
    path.write_text(dump_yaml(recipe_from(tree(train=train, evaluate={"steps": 1}))))
    return path


@contextlib.contextmanager
def typed(*words: object) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start `tunekit` in a process of its own, and give it with the folder of its run."""
    command = [sys.executable, "-m", "tunekit", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, Path(str(words[words.index("--out") + 1]))
    finally:
        process.kill()
        process.wait()


def saved(folder: Path, after: int = 0) -> int:
    """Wait until a step later than `after` is saved, and return it."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            steps = checkpoint.steps(folder / "checkpoints")
            if steps and (step := checkpoint.step_of(steps[-1])) > after:
                return step
        time.sleep(0.05)
    raise AssertionError("no step was saved")


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the processes that one has started, by their rank."""
    found = {}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((int(one[5:]) for one in told if one.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = int(child)
    return found


def end_by_killing(words: tuple[object, ...], rank: int) -> int:
    """Kill a process of a run that saves each step, hold its end to what is promised of it.

    Returns the last step that is saved.
    """
    with typed(*words) as (launcher, folder):
        saved(folder)
        pids = ranks_of(launcher.pid)
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        _, said = launcher.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert launcher.returncode == 2
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    left = checkpoint.steps(folder / "checkpoints")
    for path in left:
        checkpoint.verify(path)
    last = checkpoint.step_of(left[-1])
    assert said.endswith(
        f"\nprocess {rank} of 2 (pid {pids[rank]}) was killed by SIGKILL, and the run has ended "
        f"with it; step-{last:06d} is saved: --resume goes on from there\n"
    )
    assert said.count("is saved") == said.count(" ended") == 1, "it is told once"
    assert "Traceback" not in said
    return last


BY_PROC = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes by /proc"
)


@BY_PROC
def test_killing_the_first_process_ends_the_run(written: Path, tmp_path: Path) -> None:
    """The one that saves: nobody else can, and what was saved before is whole."""
    end_by_killing(("train", written, "--out", tmp_path / "run", "--processes", 2), 0)


@BY_PROC
def test_a_killed_process_ends_the_run_and_what_is_saved_goes_on(
    written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ("train", written, "--out", folder, "--processes", 2)
    last = end_by_killing(words, 1)

    with typed(*words, "--resume") as (again, _):
        step = saved(folder, last)
        again.send_signal(signal.SIGTERM)
        _, said = again.communicate(timeout=600)
    assert again.returncode == 143, said
    stopped = checkpoint.step_of(checkpoint.steps(folder / "checkpoints")[-1])
    assert stopped >= step
    assert f"stopped after step {stopped} of 300, which is saved" in said

    # One process alone goes on, to an earlier end.
    recipe = [f"train.steps={stopped + 1}"]
    run = tunekit.train(written, recipe, out=folder, resume=True, reporter=Silent())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, stopped + 2)), "one writer, each once"
    assert "2 processes" in run.report.read_text()
    assert run.files


def test_what_another_process_said_of_its_end_is_told(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first waits for it in vain, and is ended when its time is over."""
    fault = 'import os\nif os.environ.get("RANK") == "1":\n'
    fault += '    os.write(2, b"no luck here\\n")\n    os._exit(3)\n'
    (tmp_path / "sitecustomize.py").write_text(fault)
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(launch, "GRACE", 1.0)
    out = tmp_path / "run"
    words = ["train", str(written), "--out", str(out)]
    with pytest.raises(UserError) as error:
        launch.start(2, [*words, "--processes", "2"], out)
    assert re.fullmatch(
        r"no luck here\nprocess 1 of 2 \(pid \d+\) ended so, and the run with it; "
        "nothing was saved yet",
        str(error.value),
    )


def test_what_several_processes_cannot_train_is_refused(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_recipe(written).train
    with pytest.raises(UserError, match=r"batch_size: 2 pictures .* over 3 processes"):
        Ranks(0, 3).check(train)
    fused = train.model_copy(update={"fused_backward": True})
    with pytest.raises(UserError, match="fused_backward: takes its steps before"):
        Ranks(0, 2).check(fused)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--processes N"):
        tunekit.train(written, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="3 were asked for, and 2 started"), joined(3):
        pass


@pytest.mark.parametrize(
    ("way", "key"),
    [
        ({"adapter": {"kind": "lora"}}, "train.fsdp"),
        ({"adapter": {"kind": "full", "text_encoder": True}}, "train.fsdp"),
        ({"tokens": [WORD]}, "train.fsdp"),
        ({"train": {"optimizer": "adamw8bit"}}, "train.optimizer"),
        ({"train": {"fused_backward": True}}, "train.fused_backward"),
        ({"train": {"precision": "fp16"}}, "train.precision"),
        ({"base": {"quantize": "nf4"}}, "base.quantize"),
    ],
    ids=str,
)
def test_what_cannot_be_held_in_parts_is_refused_in_the_recipe(
    tree: Callable[..., Tree], pictures: Path, way: Tree, key: str
) -> None:
    train = {"fsdp": True, **way.get("train", {})}
    with pytest.raises(RecipeError) as error:
        recipe_of(tree, pictures / "train", {"adapter": {"kind": "full"}, **way, "train": train})
    assert key in {fault.key for fault in error.value.faults}
