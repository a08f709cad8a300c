"""How long `tunekit --help` and `tunekit validate` take beyond a bare `python -c pass`.

    python benchmarks/startup.py [--runs 20] [--recipe recipes/character-lora.yaml]

The three are timed in turn, so that whatever else the machine does falls on all alike. Writes
benchmarks/results/startup.json; exits with 1 where a median exceeds its allowance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "startup.json"
BARE, HELP, VALIDATE = "python -c pass", "tunekit --help", "tunekit validate"
ALLOWED = {HELP: 0.3, VALIDATE: 0.6}  # seconds beyond the bare interpreter


def seconds(command: list[str]) -> tuple[float, float]:
    """Return wall and processor time of `command`, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(commands: dict[str, list[str]], runs: int) -> dict[str, dict[str, float]]:
    """Time every command `runs` times, in turn, after one unmeasured round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)  # compiles and brings files into the cache
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(seconds(command))
    rows = {}
    for name, taken in times.items():
        wall, processor = zip(*taken, strict=True)
        rows[name] = {
            "wall_median_s": round(statistics.median(wall), 4),
            "wall_min_s": round(min(wall), 4),
            "wall_max_s": round(max(wall), 4),
            "processor_median_s": round(statistics.median(processor), 4),
        }
    for row in rows.values():
        beyond = row["wall_median_s"] - rows[BARE]["wall_median_s"]
        row["wall_beyond_bare_s"] = round(beyond, 4)
    return rows


def main() -> int:
    """Measure, print, write the result, and compare with what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--recipe", default="recipes/character-lora.yaml")
    given = parser.parse_args()
    tunekit = [sys.executable, "-m", "tunekit"]
    commands = {
        BARE: [sys.executable, "-c", "pass"],
        HELP: [*tunekit, "--help"],
        VALIDATE: [*tunekit, "validate", given.recipe],
    }
    measured = measure(commands, given.runs)
    for name, row in measured.items():
        allowed = f"  (allowed {ALLOWED[name]})" if name in ALLOWED else ""
        print(
            f"{name:<18} {row['wall_median_s']:.3f} s, "
            f"processor {row['processor_median_s']:.3f} s, "
            f"beyond bare {row['wall_beyond_bare_s']:.3f} s{allowed}"
        )
    result = {
        "what": "wall and processor time; medians of runs taken in turn",
        "runs": given.runs,
        "recipe": Path(given.recipe).name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "allowed_beyond_bare_s": ALLOWED,
        "commands": measured,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(measured[name]["wall_beyond_bare_s"] > limit for name, limit in ALLOWED.items()))


if __name__ == "__main__":
    sys.exit(main())
