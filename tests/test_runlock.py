"""Whose a run's folder is, with real processes: living, killed, and of another machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunekit import runlock, runstate
from tunekit.errors import UserError
from tunekit.runstate import Keeper
from tunekit.runwriter import RunWriter

_HOLDS = """
import sys, time
from pathlib import Path
from tunekit import runlock
from tunekit.runstate import Keeper
folder = Path(sys.argv[1])
with runlock.hold(folder), Keeper(folder, 3, 10).keeping():
    (folder / "held").touch()
    time.sleep(60)
"""


def holding(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDS, str(folder)])
    until = time.monotonic() + 60
    while not (folder / "held").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    (folder / "held").unlink()
    return process


def test_a_living_process_holds_and_a_killed_one_does_not(tmp_path: Path) -> None:
    process = holding(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"writing here \(process {process.pid} on ") as caught:
            RunWriter(tmp_path).check(overwrite=True)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="writing here"), runlock.hold(tmp_path):
            raise AssertionError("held by two")
    finally:
        process.kill()
        process.wait()
    assert runlock.taken(tmp_path) is None
    with runlock.hold(tmp_path) as left:
        assert left is not None
        assert (left.pid, left.host) == (process.pid, socket.gethostname())
    state = runstate.read(tmp_path)
    assert state is not None
    assert (state.outcome, state.pid, state.step) == ("running", process.pid, 3)
    with runlock.hold(tmp_path) as left:
        assert left is None, "it was given back"


def test_a_lock_of_another_machine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    other = {"pid": os.getpid(), "host": "node-7", "since": "2026-01-02T03:04:05+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    for resume in (False, True):
        with pytest.raises(UserError) as caught:
            RunWriter(tmp_path).check(overwrite=not resume, resume=resume)
        line = str(caught.value)
        assert f"process {os.getpid()} on node-7 since 2026-01-02T03:04:05" in line
        assert f"if it has ended, remove {tmp_path / '.lock'}" in line
    (tmp_path / ".lock").unlink()
    RunWriter(tmp_path).check(overwrite=False)


@pytest.mark.parametrize("text", ["", "123\n", "[]", "{", '{"pid": "x"}'])
def test_what_no_run_wrote_into_the_lock_holds_nobody_back(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with runlock.hold(tmp_path) as left:
        assert left is None
        held = runlock.holder(tmp_path)
        assert held is not None
        assert held.pid == os.getpid()
        assert held.lives()


class TestState:
    def ended(self, folder: Path, error: BaseException | None) -> runstate.State:
        def run() -> None:
            with Keeper(folder, 0, 4).keeping():
                if error is not None:
                    raise error

        if error is None:
            run()
        else:
            with pytest.raises(type(error)):
                run()
        state = runstate.read(folder)
        assert state is not None
        return state

    def test_how_a_run_ended(self, tmp_path: Path) -> None:
        done = self.ended(tmp_path, None)
        assert (done.outcome, done.step, done.steps, done.error) == ("finished", 4, 4, None)
        assert self.ended(tmp_path, KeyboardInterrupt("x")).outcome == "interrupted"
        failed = self.ended(tmp_path, UserError("a: is wrong\n  b"))
        assert (failed.outcome, failed.error) == ("failed", "a: is wrong")
        assert self.ended(tmp_path, RuntimeError("odd")).error == "RuntimeError: odd"

    def test_an_error_is_told_without_secrets_and_without_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "abcdefgh12345678")
        line = "/home/ann/pics/7.png: is gone: https://u:pw@hub.co/a (abcdefgh12345678), ~/b/c.png"
        error = self.ended(tmp_path, UserError(line)).error
        assert error is not None
        assert error.startswith("7.png: is gone: https://")
        assert error.endswith(", c.png")
        assert "hub.co/a" in error
        for secret in ("ann", "pics", "pw", "abcdefgh"):
            assert secret not in error

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"outcome": "well"}', '{"outcome": "failed"}']
    )
    def test_a_damaged_state_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json: is damaged"):
            runstate.read(tmp_path)
