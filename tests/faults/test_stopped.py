"""Stopped, killed, out of room: what was saved is whole, and the run ends as if nothing was."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import STEPS, Stopped, process
from told import Typed

import tunekit
from tunekit import checkpoint
from tunekit.progress import Silent

Tree = dict[str, dict[str, Any]]


def test_sigterm_and_going_on_end_bit_equal(stopped: Stopped, tmp_path: Path) -> None:
    """Fault 1: the step in hand is finished and saved, and what was interrupted does not show."""
    assert stopped.codes == (143, 0), stopped.logs
    assert f"after step {stopped.saved} of {STEPS}" in stopped.logs
    assert 0 < stopped.saved < STEPS, "it was stopped too late to prove anything"
    assert "Traceback" not in stopped.logs
    whole = tunekit.train(stopped.recipe, out=tmp_path / "whole", reporter=Silent())
    last = f"checkpoints/step-{STEPS:06d}"
    one, other = (checkpoint.read(folder / last) for folder in (stopped.folder, whole.folder))
    assert {"adapter", "optimizer"} < one.tensors.keys(), "the average of the weights as well"
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), (group, name)
    exported = sorted((stopped.folder / "export").glob("*.safetensors"))
    assert exported
    for path in exported:
        mine, _ = checkpoint.read_safetensors(path)
        yours, _ = checkpoint.read_safetensors(whole.folder / "export" / path.name)
        assert all(torch.equal(tensor, yours[name]) for name, tensor in mine.items())


@pytest.fixture
def copied(stopped: Stopped, tmp_path: Path) -> Path:
    """A finished run of one's own, made to look unfinished."""
    run = tmp_path / "run"
    shutil.copytree(stopped.folder, run)
    (run / "report.html").unlink()
    return run


def sign(folder: Path) -> None:
    """Let the manifest fit whatever files the checkpoint now has."""
    import hashlib

    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def again(typed: Typed, run: Path, *words: object) -> Any:
    """Go on with a run under its own recipe, with more steps left."""
    return typed("train", run / "recipe.yaml", f"train.steps={STEPS + 2}", "--out", run, "--resume")


@pytest.mark.parametrize("state", ["optimizer", "adapter", "step", "ema", "trained"])
def test_state_that_is_missing_is_an_error(typed: Typed, copied: Path, state: str) -> None:
    """Fault 4: order and noise come from the seed and the step, and so the step must be known."""
    last = copied / "checkpoints" / f"step-{STEPS:06d}"
    if state == "step":
        meta = json.loads((last / "meta.json").read_text())
        del meta["step"]
        (last / "meta.json").write_text(json.dumps(meta))
    else:
        (last / f"{state}.safetensors").unlink()
    sign(last)
    before = contents(copied)
    again(typed, copied).refusal(last.name)
    assert contents(copied) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_full_disk_keeps_what_was_saved(copied: Path, tmp_path: Path) -> None:
    """Fault 5: a real process whose files may not grow to the size of a checkpoint."""
    last = copied / "checkpoints" / f"step-{STEPS:06d}"
    largest = max(path.stat().st_size for path in last.iterdir())
    kept = contents(copied / "checkpoints")

    def smaller() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    words = ["train", str(copied / "recipe.yaml"), f"train.steps={STEPS + 2}"]
    with (tmp_path / "log").open("w") as log:
        running = process([*words, "--out", str(copied), "--resume"], log, preexec_fn=smaller)
        code = running.wait(240)
    said = (tmp_path / "log").read_text()
    assert code == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "bytes needed" in line]
    assert f"checkpoints/step-{STEPS + 2:06d}: cannot be written: " in line
    assert "File too large" in line
    now = contents(copied / "checkpoints")
    assert kept == {name: now.get(name) for name in kept}
    assert not [name for name in now if f"step-{STEPS + 2:06d}/" in name]
    checkpoint.verify(last)


def test_a_second_run_names_the_first(typed: Typed, copied: Path) -> None:
    """Fault 18: the lock is another process's, which is named by its number."""
    import subprocess
    import sys

    script = (
        "import sys, time; from pathlib import Path; from tunekit import runlock\n"
        "with runlock.hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(copied)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (line,) = again(typed, copied).refusal(f"process {holder.pid}")
        assert str(copied) in line
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def test_a_changed_recipe_is_a_diff_of_keys(typed: Typed, copied: Path) -> None:
    """Fault 18: every key that changed, from what to what."""
    words = ["train.learning_rate=0.5", "train.seed=7", "data.flip=false"]
    told = typed("train", copied / "recipe.yaml", *words, "--out", copied, "--resume")
    told.refusal(
        "train.learning_rate: 0.01 -> 0.5", "train.seed: 0 -> 7", "data.flip: True -> False"
    )


def test_a_flipped_byte_offers_the_checkpoint_before(
    typed: Typed, stopped: Stopped, copied: Path
) -> None:
    """Fault 3: told before anything is loaded, with the file and what to do."""
    last = copied / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    data = last.read_bytes()
    last.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (line,) = again(typed, copied).refusal(str(last))
    assert f"--resume {copied / 'checkpoints' / f'step-{stopped.saved:06d}'}" in line
    last.write_bytes(data[: len(data) // 2])
    again(typed, copied).refusal(str(last), f"has {len(data) // 2} bytes instead of {len(data)}")


@pytest.fixture
def malicious(copied: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that plants something in a run's folder; it gives its victim."""
    from hostile import Canary

    def plant(what: str) -> Path:
        victim = tmp_path / "victim"
        last = copied / "checkpoints" / f"step-{STEPS:06d}"
        if what == "pickle as tensors":
            torch.save({"a": Canary(victim)}, last / "adapter.safetensors")
        elif what == "pickle beside them":
            torch.save({"a": Canary(victim)}, last / "random_states.pkl")
        elif what == "other shapes":
            tensors, _ = checkpoint.read_safetensors(last / "adapter.safetensors")
            other = {name: torch.zeros(3, 5) for name in tensors}
            checkpoint.write_safetensors(last / "adapter.safetensors", other)
        elif what == "optimizer of another":
            shutil.copy(last / "adapter.safetensors", last / "optimizer.safetensors")
        sign(last)
        if what == "path out of it":
            manifest = json.loads((last / "manifest.json").read_text())
            manifest["files"]["../../../victim"] = {"bytes": 0, "sha256": ""}
            (last / "manifest.json").write_text(json.dumps(manifest))
        elif what == "link":
            victim.write_text("precious")
            (copied / "metrics.jsonl").unlink()
            (copied / "metrics.jsonl").symlink_to(victim)
        elif what == "lock that is a link":
            victim.write_text("precious")
            (copied / ".lock").unlink(missing_ok=True)
            (copied / ".lock").symlink_to(victim)
        return victim

    return plant


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("pickle as tensors", "adapter.safetensors: is a pickle"),
        ("other shapes", "it comes from another base or other adapter settings"),
        ("optimizer of another", "it is of another optimizer or of other parameters"),
        ("path out of it", '"../../../victim" is no file of this checkpoint'),
        ("link", "metrics.jsonl: is a link"),
        ("lock that is a link", ".lock: is a link"),
    ],
)
def test_malicious_state_is_refused(
    typed: Typed, copied: Path, malicious: Callable[[str], Path], what: str, named: str
) -> None:
    """Fault 10: a run's folder from somebody else, with a manifest that fits what was planted."""
    victim = malicious(what)
    before = contents(copied / "checkpoints")
    again(typed, copied).refusal(named)
    assert contents(copied / "checkpoints") == before
    assert not victim.exists() or victim.read_text() == "precious"


def test_a_pickle_beside_the_tensors_is_never_opened(
    typed: Typed, copied: Path, malicious: Callable[[str], Path]
) -> None:
    """Fault 10: it is left alone; only tensors and JSON are read."""
    victim = malicious("pickle beside them")
    checkpoint.read(copied / "checkpoints" / f"step-{STEPS:06d}")
    assert not victim.exists()
