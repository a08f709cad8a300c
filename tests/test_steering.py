"""A run that cannot be lost: what stays of its checkpoints, and what is saved when it fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_resume import KillAt, Killed, assert_same
from told import Told

import tunekit
from tunekit import checkpoint, keeping, outofmemory, runstate
from tunekit.errors import UserError
from tunekit.export import ExportError
from tunekit.outofmemory import OutOfMemoryError
from tunekit.progress import Silent, Ticker
from tunekit.recipe import dump_yaml, recipe_from
from tunekit.run import Run

Tree = dict[str, dict[str, Any]]


def saved(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.steps(folder / "checkpoints")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestKeeping:
    @pytest.mark.parametrize(
        ("last", "every", "best", "gone"),
        [
            (None, None, None, []),
            (None, None, 3, []),
            (1, None, None, [1, 2, 3, 4, 5]),
            (2, 3, None, [1, 2, 4]),
            (1, None, 2, [1, 3, 4, 5]),
            (1, 2, 1, [3, 5]),
            (9, None, None, []),
        ],
    )
    def test_what_stays(
        self, last: int | None, every: int | None, best: int | None, gone: list[int]
    ) -> None:
        assert keeping.superfluous([6, 1, 2, 3, 4, 5], last, every, best) == gone

    def test_the_best_is_the_first_of_equals(self) -> None:
        assert keeping.best({}) is None
        assert keeping.best({100: 0.5, 200: 0.7, 300: 0.7, 400: 0.6}) == 200

    def test_old_checkpoints_go_and_the_run_goes_on_exactly(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        recipe = tree(train={"steps": 6, "keep_last": 1, "keep_every": 3, "checkpoint_every": 1})
        whole = tunekit.train(recipe, out=tmp_path / "whole", reporter=Silent())
        assert saved(whole.folder) == [3, 6]
        with pytest.raises(Killed):
            tunekit.train(recipe, out=tmp_path / "run", reporter=KillAt(4))
        assert saved(tmp_path / "run") == [3, 4]
        tunekit.train(recipe, out=tmp_path / "run", reporter=Silent(), resume=True)
        assert_same(whole.folder, tmp_path / "run")

    def test_other_rules_may_hold_when_it_goes_on(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        train = {"steps": 4, "checkpoint_every": 1, "sample_every": 0}
        with pytest.raises(Killed):
            tunekit.train(tree(train=train), out=tmp_path / "run", reporter=KillAt(3))
        assert saved(tmp_path / "run") == [1, 2, 3]
        fewer = tree(train={**train, "keep_last": 2})
        tunekit.train(fewer, out=tmp_path / "run", reporter=Silent(), resume=True)
        assert saved(tmp_path / "run") == [3, 4]

    def test_an_old_one_stays_where_the_new_one_cannot_be_written(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        """Every try to save fails, that at the end too: no file grows beyond some bytes."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = Spoil(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
        recipe = tree(train={"checkpoint_every": 1, "sample_every": 0, "keep_last": 1})
        try:
            with pytest.raises(UserError) as caught:
                tunekit.train(recipe, out=tmp_path / "run", reporter=full)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        line = str(caught.value)
        assert re.search(r"step-000002: cannot be written: .*File too large.* needed\)$", line)
        assert saved(tmp_path / "run") == [1]
        checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-000001")


@pytest.fixture(scope="module")
def overdone(
    tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Told]:
    """Return a run that breaks what it learned: a rate far too high."""
    prompts = ["a {trigger} {class}, red", "a {trigger}", "a {trigger} at night"]
    recipe = tree(
        adapter={"targets": "full"},
        train={"steps": 5, "sample_every": 1, "checkpoint_every": 2, "keep_best": True}
        | {"keep_last": 1, "learning_rate": 0.1},
        evaluate={"prompts": prompts},
    )
    told = Told()
    out = tmp_path_factory.mktemp("best") / "run"
    return tunekit.train(recipe, out=out, reporter=told), told


class TestBest:
    def test_every_sample_is_judged(self, overdone: tuple[Run, Told]) -> None:
        run, _ = overdone
        likeness = keeping.judged(metrics(run.folder))
        assert list(likeness) == [1, 2, 3, 4, 5]
        assert len(list((run.folder / "samples").glob("step-000003_*.png"))) == 3

    def test_a_judgement_can_be_made_again_from_the_pictures(
        self, overdone: tuple[Run, Told]
    ) -> None:
        """By the definition: the mean cosine of the kept samples to the held-out pictures."""
        from tunekit.evaluation.judges import load_judges
        from tunekit.preparation import prepare

        run, _ = overdone
        like = load_judges(run.recipe.evaluate).likeness.embed_images
        kept = sorted((run.folder / "samples").glob("step-000002_*.png"))
        drawn = like([Image.open(path) for path in kept])
        _, held_out = prepare(run.recipe, Silent()).references
        real = like([reference.image for reference in held_out])
        found = keeping.judged(metrics(run.folder))[2]
        assert (drawn @ real.T).mean().item() == pytest.approx(found, abs=1e-5)

    def test_the_best_stays_and_is_what_is_exported(self, overdone: tuple[Run, Told]) -> None:
        run, told = overdone
        likeness = keeping.judged(metrics(run.folder))
        best = keeping.best(likeness)
        assert best != 5, "this run does not get worse, and proves nothing"
        assert saved(run.folder) == [best, 5]
        assert run.scores["run"]["step"] == best
        assert run.scores["run"]["chosen_by"] == "likeness of samples"
        trained, last = (
            checkpoint.read(run.folder / "checkpoints" / f"step-00000{step}").tensors["adapter"]
            for step in (best, 5)
        )
        written, _ = checkpoint.read_safetensors(run.files[0].path)
        for name, tensor in written.items():
            if "lora_B" not in name:
                continue
            alike = [v for v in trained.values() if v.shape == tensor.shape]
            off = min((v - tensor.float()).abs().max().item() for v in alike)
            assert off < 1e-2 * max(1.0, tensor.abs().max().item()), name
        assert any(not torch.equal(trained[name], last[name]) for name in trained)
        [note] = [note for note in told.notes if "the files are those of step" in note]
        assert f"step {best}: of all samples its are most like the held-out pictures" in note
        assert f"the files are those of step {best}" in run.report.read_text()
        card = (run.folder / "export" / "README.md").read_text()
        assert f"| made after step | {best} of 5: its samples were the most alike |" in card
        _, metadata = checkpoint.read_safetensors(run.files[0].path)
        assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == (str(best), "5")

    def test_it_is_chosen_the_same_after_a_stop(
        self, overdone: tuple[Run, Told], tmp_path: Path
    ) -> None:
        run, _ = overdone
        for number, tick in enumerate((3, 1)):
            with pytest.raises(Killed):
                tunekit.train(
                    run.recipe, out=tmp_path / "run", reporter=KillAt(tick), resume=number > 0
                )
        again = tunekit.train(run.recipe, out=tmp_path / "run", reporter=Silent(), resume=True)
        assert again.scores["run"]["step"] == run.scores["run"]["step"]
        assert keeping.judged(metrics(again.folder)) == keeping.judged(metrics(run.folder))
        assert_same_files(run, again)

    def test_without_it_the_last_step_is_exported(self, run: Run) -> None:
        assert (run.scores["run"]["step"], run.scores["run"]["chosen_by"]) == (4, "last step")
        assert not keeping.judged(metrics(run.folder))


def assert_same_files(one: Run, other: Run) -> None:
    for mine, yours in zip(one.files, other.files, strict=True):
        tensors, others = (checkpoint.read_safetensors(file.path)[0] for file in (mine, yours))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


class Spoil(Silent):
    """Does something at a tick of training."""

    def __init__(self, tick: int, action: Callable[[], object]) -> None:
        self.left, self.action = tick, action
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        def tick(told: str = "") -> None:
            if name == "training":
                self.left -= 1
                if self.left == 0:
                    self.action()

        yield tick


_LITTLE = """
import resource, sys
import tunekit.cli, tunekit.train, tunekit.preparation, tunekit.export, tunekit.evaluation.judges
import diffusers, transformers, accelerate, peft
import tunekit.steering as steering
from tunekit.cli import main
take = steering.Course._steps
def short(*arguments):
    size = int(next(line.split()[1] for line in open("/proc/self/status") if "VmSize" in line))
    room = size * 1024 + 200_000_000
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    return take(*arguments)
steering.Course._steps = short
sys.argv = ["tunekit", "train", sys.argv[1], "--out", sys.argv[2]]
main()
"""


class TestMemory:
    def test_a_run_that_runs_out_says_what_lowers_it(
        self, tree: Callable[..., Tree], tmp_path: Path
    ) -> None:
        """A process that may not take 200 MB more, and a batch that needs some GB."""
        huge = tree(train={"batch_size": 4096, "steps": 2, "checkpoint_every": 0})
        path, out = tmp_path / "recipe.yaml", tmp_path / "run"
        path.write_text(dump_yaml(recipe_from(huge)))
        done = subprocess.run(
            [sys.executable, "-c", _LITTLE, str(path), str(out)],
            capture_output=True,
            text=True,
            env=os.environ,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        lines = done.stderr.splitlines()
        [at] = [n for n, line in enumerate(lines) if line.startswith("out of memory")]
        assert "out of memory in step 1 of 2 (train.batch_size 4096 of 32 pixels): " in lines[at]
        assert "bytes more were asked for; what lowers it, the cheapest first:" in lines[at]
        assert lines[at + 1].startswith(
            "  train.batch_size=2048 train.gradient_accumulation=2: the same steps in smaller parts"
        )
        assert any(line.startswith("  train.precision=bf16: ") for line in lines[at + 2 :])
        state = runstate.read(out)
        assert state is not None
        assert state.outcome == "failed"
        assert state.error is not None
        assert state.error.startswith("out of memory in step 1 of 2")

    def test_what_was_asked_for_is_read_from_torchs_own_words(
        self, tree: Callable[..., Tree]
    ) -> None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**50)
        assert outofmemory.is_out_of_memory(caught.value)
        assert outofmemory.asked(caught.value) == 2**52
        recipe = recipe_from(tree())

        def ask() -> None:
            with outofmemory.told(lambda: "in step 3 of 4", recipe, 512):
                torch.empty(2**50)

        with pytest.raises(OutOfMemoryError, match=rf"in step 3 of 4 .*: {2**52:,} bytes") as told:
            ask()
        assert told.value.asked == 2**52

    @pytest.mark.parametrize(
        ("error", "size"),
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0"),
                3 * 2**29,
            ),
            (MemoryError("Unable to allocate 2.00 MiB for an array with shape"), 2**21),
            (MemoryError(), None),
            (RuntimeError("std::bad_alloc"), None),
        ],
    )
    def test_every_way_of_saying_it_is_known(self, error: BaseException, size: int | None) -> None:
        assert outofmemory.is_out_of_memory(error)
        assert outofmemory.asked(error) == size

    def test_another_error_stays_what_it_is(self, tree: Callable[..., Tree]) -> None:
        recipe = recipe_from(tree())
        with pytest.raises(RuntimeError, match="shapes"), outofmemory.told(str, recipe):
            raise RuntimeError("shapes do not fit")


def test_a_failed_export_leaves_a_state_that_says_so(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    still = tree(train={"learning_rate": 0.0, "steps": 1, "sample_every": 0})
    with pytest.raises(ExportError):
        tunekit.train(still, out=tmp_path / "run", reporter=Silent())
    state = runstate.read(tmp_path / "run")
    assert state is not None
    assert state.outcome == "failed"
    assert state.error is not None
    assert "nothing was learned" in state.error


def test_a_sample_that_a_stop_left_out_is_drawn_when_it_goes_on(
    tree: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint of step 2 was saved, before its samples were drawn."""
    from tunekit.samples import Samples

    recipe = tree(train={"checkpoint_every": 2, "sample_every": 2})
    whole = tunekit.train(recipe, out=tmp_path / "whole", reporter=Silent())
    at_step = Samples.at_step

    def killed(self: Samples, painter: Any, step: int) -> Any:
        if step == 2:
            raise Killed
        return at_step(self, painter, step)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "at_step", killed)
        with pytest.raises(Killed):
            tunekit.train(recipe, out=tmp_path / "run", reporter=Silent())
    assert saved(tmp_path / "run") == [2]
    tunekit.train(recipe, out=tmp_path / "run", reporter=Silent(), resume=True)
    assert_same(whole.folder, tmp_path / "run")
