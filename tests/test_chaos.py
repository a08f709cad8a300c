"""A reduced form of benchmarks/chaos.py: what is killed at random instants ends bit-equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KILLS = 10


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    result, work = tmp_path / "chaos.json", tmp_path / "work"
    words = ["--runs", "1", "--kills", str(KILLS), "--most", "5", "--seed", "1"]
    words += ["--work", str(work), "--result", str(result)]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *words]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(result.read_text())
    assert told["faults"] == []
    assert told["kills"] >= KILLS
    assert told["ended_bit_equal"] == told["runs"] >= 1
    assert told["compared"] > 20
    assert told["checkpoints_verified_after_kills"] > 0
    assert len(list(work.glob("run-*/report.html"))) == told["runs"]
