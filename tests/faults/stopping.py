"""Real processes that train and are stopped, with secrets in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tree = dict[str, dict[str, Any]]

# What no file of a run may hold. Parts are put together, so that this file is no find either.
SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7" * 11,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Vk4" * 11,
    "TRACKER_API_KEY": "tracker" + "-9x8y7z" * 3,
    "DATABASE_PASSWORD": "opensesame" + "-12345",
}
STEPS = 40


@dataclass(frozen=True)
class Stopped:
    """A run that SIGTERM stopped, and that went on. logs: all that both processes printed."""

    recipe: Tree
    folder: Path
    codes: tuple[int, int]
    saved: int
    """Lines of metrics.jsonl, and the step of the only checkpoint, when it had stopped."""
    logs: str


def process(words: list[str], log: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start a real `tunekit`; what it prints goes to `log`."""
    environment: Mapping[str, str] = {**os.environ, **SECRETS}
    return subprocess.Popen(
        [sys.executable, "-m", "tunekit", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        **options,
    )


def lines_of(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def until_stopped(command: list[str], out: Path, path: Path) -> tuple[str, int]:
    with path.open("w") as log:
        running = process(command, log)
        try:
            until = time.monotonic() + 200
            while len(lines_of(out)) < 2:
                assert running.poll() is None, path.read_text()
                assert time.monotonic() < until, "no step in all this time"
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            code = running.wait(120)
        finally:
            running.kill()
    return path.read_text(), code
