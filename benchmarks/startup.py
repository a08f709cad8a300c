"""How long `tunekit --help` and `tunekit validate` take beyond a bare `python -c pass`.

    python benchmarks/startup.py [--runs 20]

The three are timed in turn, so that whatever else the machine does falls on all alike. Writes
benchmarks/results/startup.json; exits with 1 where a median exceeds its allowance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "startup.json"
BARE = "python -c pass"
COMMANDS = {
    BARE: [sys.executable, "-c", "pass"],
    "tunekit --help": [sys.executable, "-m", "tunekit", "--help"],
    "tunekit validate": [
        *(sys.executable, "-m", "tunekit"),
        *("validate", "recipes/character-lora.yaml"),
    ],
}
ALLOWED = {"tunekit --help": 0.3, "tunekit validate": 0.6}  # seconds beyond the bare interpreter


def seconds(command: list[str]) -> float:
    """Return the wall time of `command`, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Time every command `runs` times, in turn, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # compiles and brings files into the cache
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    bare = statistics.median(times[BARE])
    return {
        name: {
            "median_s": round(statistics.median(taken), 4),
            "min_s": round(min(taken), 4),
            "max_s": round(max(taken), 4),
            "beyond_bare_s": round(statistics.median(taken) - bare, 4),
        }
        for name, taken in times.items()
    }


def main() -> int:
    """Measure, print, write the result, and compare with what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    measured = measure(runs)
    for name, row in measured.items():
        allowed = f"  (allowed {ALLOWED[name]})" if name in ALLOWED else ""
        print(
            f"{name:<18} {row['median_s']:.3f} s  beyond bare {row['beyond_bare_s']:.3f}{allowed}"
        )
    result = {
        "what": "wall time; medians of runs taken in turn",
        "runs": runs,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "allowed_beyond_bare_s": ALLOWED,
        "commands": measured,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(measured[name]["beyond_bare_s"] > limit for name, limit in ALLOWED.items()))


if __name__ == "__main__":
    sys.exit(main())
