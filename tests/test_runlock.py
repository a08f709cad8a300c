"""Whose a run's folder is, with real processes: living, killed, and of another machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunekit import runlock, runs, runstate
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


def test_a_lock_of_another_machine_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that other machines may have as well."""
    monkeypatch.setattr(runlock, "_OWN_DISKS", frozenset())
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a disk is")
def test_a_lock_of_another_name_on_a_disk_of_this_machine_has_ended(tmp_path: Path) -> None:
    """What a killed container leaves: the next one has another name, and the lock is free."""
    left = {"pid": 1, "host": "8f3c2a", "since": "2026-01-02T03:04:05+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(left))
    with (tmp_path / ".lock").open() as file:
        if not runlock._on_own_disk(file.fileno()):
            pytest.skip("the tests' folder is on a disk that others may have")
    assert runlock.taken(tmp_path) is None
    with runlock.hold(tmp_path) as killed:
        assert killed is not None
        assert killed.host == "8f3c2a"
        # While it is held, a name of another machine changes nothing.
        (tmp_path / ".lock").write_text(json.dumps(left))
        held = runlock.taken(tmp_path)
        assert held is not None
        assert held.host == "8f3c2a"


def test_who_only_looks_is_waited_for_and_never_called_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlock, "_PATIENCE", 4)
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="no run is writing here") as caught:  # noqa: SIM117
            with runlock.hold(tmp_path):
                raise AssertionError("held beside one that looks")
        assert str(os.getpid()) not in str(caught.value)
        threading.Timer(0.15, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with runlock.hold(tmp_path) as left:
            assert left is None


def test_a_lock_that_may_not_be_read_is_named() -> None:
    with anothers_folder() as folder:
        (folder / ".lock").touch(mode=0o200)
        with nobody(), pytest.raises(UserError, match=r"\.lock: cannot be read: Permission denied"):
            runlock.taken(folder)


@contextlib.contextmanager
def anothers_folder() -> Iterator[Path]:
    """Give a folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="tunekit-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Be a user without rights meanwhile, where the tests are root's."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_run_that_may_not_be_looked_into_is_listed_and_named() -> None:
    """Beside one that may: `tunekit runs` goes on."""
    with anothers_folder() as parent:
        for name in ("closed", "locked", "open"):
            (parent / name / "checkpoints" / "step-000001").mkdir(parents=True)
            with Keeper(parent / name, 0, 4).keeping():
                pass
            (parent / name / ".lock").touch()
        (parent / "closed").chmod(0o700 if os.geteuid() == 0 else 0)
        (parent / "locked" / ".lock").chmod(0o200)
        (parent / "locked" / "checkpoints").chmod(0o700 if os.geteuid() == 0 else 0)
        with nobody():
            closed, locked, there = runs.listed(parent)
            told = runs.verified(parent)
        for path in (parent / "closed", parent / "locked" / "checkpoints"):
            path.chmod(0o755)
    assert (closed.state, locked.state, there.state) == ("unknown", "unknown", "finished")
    for run, name in ((closed, "closed"), (locked, "locked")):
        assert run.note is not None
        assert name in run.note
        assert "Permission denied" in run.note
    assert [bool(one.faults) for one in told] == [True, True, True]
    assert "Permission denied" in told[0].faults[0]
    assert "checkpoints: cannot be read: Permission denied" in told[1].faults[0]
    assert "has no manifest.json" in told[2].faults[0]


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
