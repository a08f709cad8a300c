"""`tunekit runs`: how runs stand, told from what real ones left, and what in them is damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from told import KillAt, Killed, Typed

import tunekit
from tunekit import runlock, runs
from tunekit.errors import UserError
from tunekit.export import ExportError
from tunekit.progress import Silent
from tunekit.recipe import dump_yaml, recipe_from
from tunekit.run import Run

Tree = dict[str, dict[str, Any]]
SHORT = {"steps": 2, "sample_every": 0, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def shelf(run: Run, tree: Callable[..., Tree], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of each kind, and with things that are none."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(run.folder, folder / "finished")
    with pytest.raises(Killed):
        tunekit.train(tree(train=SHORT), out=folder / "stopped", reporter=KillAt(1))
    still = tree(train={**SHORT, "learning_rate": 0.0})
    with pytest.raises(ExportError):
        tunekit.train(still, out=folder / "failed", reporter=Silent())
    (folder / "notes").mkdir()
    (folder / "a.txt").write_text("")
    return folder


def by_name(folder: Path) -> dict[str, runs.Listed]:
    return {one.folder.name: one for one in runs.listed(folder)}


def test_each_run_is_told_as_it_stands(shelf: Path, run: Run) -> None:
    found = by_name(shelf)
    assert {name: one.state for name, one in found.items()} == {
        "finished": "finished",
        "stopped": "interrupted",
        "failed": "failed",
    }
    assert {name: (one.step, one.steps) for name, one in found.items()} == {
        "finished": (4, 4),
        "stopped": (1, 2),
        "failed": (2, 2),
    }
    likeness = run.scores["scores"]["likeness"]
    assert found["finished"].likeness == likeness["score"]
    assert found["finished"].closed == likeness["closed"]
    assert found["failed"].note is not None
    assert "nothing was learned" in found["failed"].note
    assert found["stopped"].likeness is None
    assert [one.folder.name for one in runs.listed(shelf / "stopped")] == ["stopped"]
    lines = runs.table(list(found.values()))
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert any(line.startswith("stopped") and " 1 of 2 " in line for line in lines)


def test_a_run_without_a_state_is_told_by_its_files(shelf: Path, tmp_path: Path) -> None:
    for name in ("finished", "stopped"):
        shutil.copytree(shelf / name, tmp_path / name)
        (tmp_path / name / "state.json").unlink()
    found = by_name(tmp_path)
    assert found["finished"].state == "finished"
    assert found["stopped"].state == "interrupted"
    assert (found["stopped"].step, found["stopped"].steps) == (1, None)


def test_the_samples_of_a_run_are_told_where_they_were_judged(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "stopped", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for step, value in ((1, 0.25), (2, 0.5), (3, 0.375)):
            file.write(json.dumps({"step": step, "sample_likeness": value}) + "\n")
    [one] = runs.listed(tmp_path)
    assert (one.best_sample, one.last_sample) == ((2, 0.5), (3, 0.375))
    assert one.as_dict()["best_sample"] == {"step": 2, "likeness": 0.5}


def test_a_run_is_running_while_its_process_lives(
    tree: Callable[..., Tree], tmp_path: Path
) -> None:
    """A real run, seen from outside, and again when SIGKILL has ended it."""
    endless = tree(train={"steps": 100_000, "checkpoint_every": 0, "sample_every": 0})
    path, out = tmp_path / "recipe.yaml", tmp_path / "runs" / "endless"
    path.write_text(dump_yaml(recipe_from(endless)))
    command = [sys.executable, "-m", "tunekit", "train", str(path), "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ)
        try:
            until = time.monotonic() + 120
            while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            [one] = runs.listed(tmp_path / "runs")
            assert one.state == "running"
            assert one.steps == 100_000
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    [one] = runs.listed(tmp_path / "runs")
    assert one.state == "interrupted"
    assert one.step > 0


def test_a_run_of_another_machine_is_taken_at_its_word(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that other machines may have as well."""
    monkeypatch.setattr(runlock, "_OWN_DISKS", frozenset())
    shutil.copytree(shelf / "stopped", tmp_path / "run")
    lock = {"pid": 1, "host": "node-7", "since": "2026-01-02T03:04:05+00:00"}
    (tmp_path / "run" / ".lock").write_text(json.dumps(lock))
    [one] = runs.listed(tmp_path)
    assert one.state == "running"
    assert one.note == "on node-7, as its lock says"


class TestVerify:
    @pytest.fixture
    def folder(self, run: Run, tmp_path: Path) -> Path:
        shutil.copytree(run.folder, tmp_path / "runs" / "one")
        return tmp_path / "runs" / "one"

    def test_a_whole_run_is_whole(self, folder: Path) -> None:
        [found] = runs.verified(folder.parent)
        assert (found.checkpoints, found.files, found.faults) == (4, 2, [])
        assert found.lines() == [f"{folder}: 4 checkpoints and 2 files, all whole"]

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("checkpoints/step-000002/adapter.safetensors", "its content has changed"),
            ("checkpoints/step-000003/meta.json", "its content has changed"),
            ("export/FIRST", "its content has changed"),
            ("state.json", "is damaged"),
            ("scores.json", "is damaged"),
            ("metrics.jsonl", "cannot be read"),
        ],
    )
    def test_a_flipped_byte_is_found_and_the_file_named(
        self, folder: Path, run: Run, name: str, says: str
    ) -> None:
        path = folder / name.replace("FIRST", run.files[0].path.name)
        data = bytearray(path.read_bytes())
        place = 0 if path.suffix in (".json", ".jsonl") else -1
        data[place] ^= 0x81
        path.write_bytes(data)
        [found] = runs.verified(folder)
        [fault] = found.faults
        assert str(path) in fault
        assert says in fault
        assert found.lines() == [fault]

    def test_all_that_is_damaged_is_told_at_once(self, folder: Path, run: Run) -> None:
        (folder / "checkpoints" / "step-000001" / "manifest.json").unlink()
        with (folder / "checkpoints" / "step-000004" / "optimizer.safetensors").open("ab") as file:
            file.write(b"x")
        (folder / "export" / run.files[1].path.name).unlink()
        [found] = runs.verified(folder)
        assert found.checkpoints == 2
        assert [line.partition(": ")[2].partition(" ")[0] for line in found.faults] == [
            "is", "has", "is",
        ]  # fmt: skip
        assert "step-000001: is no checkpoint: it has no manifest.json" in found.faults[0]
        assert found.faults[2].endswith("is missing")

    def test_scores_that_name_other_files_are_not_followed(self, folder: Path) -> None:
        told = json.loads((folder / "scores.json").read_text())
        told["run"]["files"][0]["path"] = "../../etc/passwd"
        (folder / "scores.json").write_text(json.dumps(told))
        [found] = runs.verified(folder)
        assert "../../etc/passwd is no file of this run" in found.faults[0]

    def test_where_there_is_nothing_to_verify(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no run"):
            runs.verified(tmp_path)
        with pytest.raises(UserError, match="there is no such folder"):
            runs.verified(tmp_path / "none")


def test_list_verify_and_their_exit_codes(
    typed: Typed, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for words in ((), ("list",), ("runs",), ("list", "runs")):
        told = typed("runs", *words)
        assert (told.code, told.err) == (0, "")
        assert [line.split()[0] for line in told.out.splitlines()] == [
            "run", "failed", "finished", "stopped",
        ]  # fmt: skip
    listed = json.loads(typed("runs", "--json").out)
    assert [one["state"] for one in listed] == ["failed", "finished", "interrupted"]
    told = typed("runs", "verify", "--json")
    assert told.code == 0
    assert all(one["ok"] for one in json.loads(told.out))
    damaged = tmp_path / "runs" / "stopped" / "checkpoints" / "step-000001" / "meta.json"
    damaged.write_text("{}")
    told = typed("runs", "verify")
    assert (told.code, told.err) == (1, "")
    assert f"{damaged.relative_to(tmp_path)}: has 2 bytes instead of " in told.out
    assert typed("runs", "verify", "nowhere").code == 2
    assert typed("runs", "nowhere").code == 2
    assert typed("runs", "--help").code == 0


STATE = {"outcome": "running", "pid": 1, "host": "h", "started": "", "updated": "", "step": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", json.dumps({**STATE, "steps": "many"})),
        ("state.json", json.dumps({**STATE, "steps": 2, "updated": 7})),
        ("scores.json", json.dumps({"scores": []})),
        ("scores.json", json.dumps({"scores": {"likeness": {"closed": "half"}}})),
        ("scores.json", json.dumps({"run": {"files": ["a.safetensors"]}})),
        ("metrics.jsonl", '{"step": 1, "sample_likeness": "high"}\n'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_files_of_another_form_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / name).write_text(content)
    [found] = runs.listed(tmp_path)
    assert found.state == "unknown"
    assert found.note is not None
    assert name in found.note
    assert runs.table([found])
    [verified] = runs.verified(tmp_path)
    assert any(name in fault for fault in verified.faults)
