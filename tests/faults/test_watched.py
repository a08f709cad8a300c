"""What Python is asked to do while hostile files are read: nothing but reading."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import Canary
from watch import watched

ROOT = Path(__file__).parents[2]
INPUTS = 30  # of each reader

# Everything that is read from others, good and spoilt, in a process of its own.
_READ = """
import json, os, sys
from pathlib import Path
from random import Random
scratch, inputs = Path(sys.argv[1]), int(sys.argv[2])
from targets import DATA, emptied, run_once
from targets_files import FILES
from watch import watched
found, refused = {}, {}
for target in (*DATA, *FILES):
    good, here = scratch / "good" / target.name, scratch / "here"
    seeds = target.prepare(emptied(good))
    os.chdir(emptied(here))
    run_once(target, Random(0), seeds, here)  # brings what is imported on the way
    refused[target.name] = 0
    for number in range(inputs):
        os.chdir(emptied(here))
        with watched(scratch) as seen:
            refused[target.name] += run_once(target, Random(f"watched {number}"), seeds, here)
        if seen:
            found.setdefault(target.name, []).extend(seen)
print(json.dumps({"found": found, "refused": refused}))
"""


def test_nothing_is_unpickled_started_or_connected(tmp_path: Path) -> None:
    """Recipes, pictures, metadata, shards, tables, captions, tensors, adapters, bases, runs."""
    import os

    folders = {"HOME": "home", "TMPDIR": "tmp", "HF_HOME": "hf", "TUNEKIT_CACHE": "cache"}
    for folder in folders.values():
        (tmp_path / folder).mkdir()
    paths = [str(ROOT / "tests" / "faults"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-B", "-c", _READ, str(tmp_path), str(INPUTS)],
        capture_output=True,
        text=True,
        timeout=280,
        env={
            **os.environ,
            **{name: str(tmp_path / folder) for name, folder in folders.items()},
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == {}
    assert len(told["refused"]) >= 13
    assert sum(told["refused"].values()) > INPUTS * 4, "hardly anything was hostile"
    assert not list(tmp_path.rglob("canary"))


def test_the_watch_sees_each_of_them(tmp_path: Path) -> None:
    """Else nothing seen would say nothing."""
    import os
    import socket

    allowed = tmp_path / "allowed"
    allowed.mkdir()
    spoilt = pickle.dumps(Canary(tmp_path / "canary"))
    with watched(allowed) as seen:
        (allowed / "fine").write_text("x")
        (allowed / "fine").read_text()
        assert not seen
        pickle.loads(spoilt)
        assert "pickle.find_class" in seen[0]
        assert any("os.system" in event for event in seen)
        (tmp_path / "elsewhere").write_text("x")
        assert seen[-1] == f"open {tmp_path.resolve() / 'elsewhere'}"
        (tmp_path / "elsewhere").rename(allowed / "moved")
        assert seen[-1].startswith("os.rename ")
        (allowed / "link").symlink_to(tmp_path / "behind")
        (allowed / "link").write_text("x")
        assert seen[-1] == f"open {tmp_path.resolve() / 'behind'}"
        os.mkdir(tmp_path / "folder")
        assert seen[-1].startswith("os.mkdir ")
        subprocess.run(["true"], check=True)
        assert any("subprocess.Popen" in event for event in seen)
        socket.socket().close()
        assert "socket." in seen[-1]
    (tmp_path / "later").write_text("x")
    assert not any("later" in event for event in seen)


# Calls that run what a file holds. safe_load and the like of ruamel build plain values only.
RUN_CODE = {
    "eval", "exec", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "marshal.loads", "yaml.load",
    "yaml.unsafe_load", "runpy.run_path", "os.system", "os.popen", "numpy.load", "np.load",
    "pandas.read_pickle", "trust_remote_code",
}  # fmt: skip
UNPICKLING_METHODS = {
    "load_state",
    "load_checkpoint",
    "load_checkpoint_and_dispatch",
    "read_pickle",
}


@pytest.mark.parametrize("path", sorted((ROOT / "tunekit").rglob("*.py")), ids=lambda p: p.name)
def test_no_call_could_run_what_a_file_holds(path: Path) -> None:
    """The package's own calls; what libraries do is what the watch is for."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, line = ast.unparse(node.func), f"{path.name}:{node.lineno}"
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        if called in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", line
            continue
        assert called not in RUN_CODE, line
        owner, _, method = called.rpartition(".")
        if method in UNPICKLING_METHODS:  # accelerate's; ours read safetensors
            assert "accelerator" not in owner, line
        assert keywords.get("trust_remote_code", "False") == "False", line
        assert keywords.get("weights_only", "True") == "True", line
        assert keywords.get("use_safetensors", "True") == "True", line
        assert keywords.get("shell", "False") == "False", line
        assert keywords.get("typ", "'safe'") in ("'safe'", "'rt'"), line


def test_pickling_libraries_are_imported_nowhere() -> None:
    """By whatever name."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
    for path in (ROOT / "tunekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
