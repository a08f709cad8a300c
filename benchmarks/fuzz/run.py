"""Feed every reader of other people's files thousands of spoilt inputs, each under a watch.

    python benchmarks/fuzz/run.py [--inputs 10000] [--seed 0] [--reader "recipe text"]

The readers and the ways to spoil are those of tests/faults; input N of a seed is always the same
one. Each reader has a process of its own. What counts as a fault: any exception but the one-line
refusal, a process that dies, more than 5 seconds of processor time (120 of waiting), more than
1.5 GB of memory, a file written outside of the input's folder, a socket, a subprocess, an unpickled
class. Writes benchmarks/results/fuzz.json, with --reader these rows of it; exits with 1 where there
is a fault.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests")]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
PROCESSOR, WAIT = 5.0, 120.0  # seconds an input; others may have the processor meanwhile
MEMORY = 1_500_000_000  # bytes an input, beyond what the process had
LAST = "last"
_MOST_KINDS = 20  # faults of a reader told


def main(about: str, result: Path, work: Callable[..., None]) -> int:
    """Fuzz, print a line a reader, write the table.

    about: the page of what is typed. work: what a process of its own does, as `_work`.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", "--reader", action="append", default=[])
    parser.add_argument("--result", type=Path, default=result)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunekit-fuzz-") as scratch:
        _stay_in(Path(scratch))
        from targets import DATA
        from targets_files import FILES

        named = {target.name: target for target in (*DATA, *FILES)}
        if unknown := set(options.only) - named.keys():
            parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(named)}")
        rows: dict[str, dict[str, Any]] = {}
        if options.only and options.result.exists():  # the others' rows stay
            rows |= json.loads(options.result.read_text())["readers"]
        table = {
            "seed": options.seed,
            "limits": {"processor_s": PROCESSOR, "wait_s": WAIT, "memory_bytes": MEMORY},
            "python": platform.python_version(),
            "readers": rows,
        }
        for name in options.only or named:
            target = named[name]
            rows[name] = fuzz(target, options.inputs, options.seed, Path(scratch), work)
            print(f"{name:20} {_told(rows[name])}", flush=True)
            options.result.write_text(json.dumps(table, indent=2) + "\n")
    return int(any(row["faults"] for row in rows.values()))


def _stay_in(scratch: Path) -> None:
    """Let nothing that a library keeps be written elsewhere, or asked of the network."""
    for name, folder in {
        "HOME": "home",
        "TMPDIR": "tmp",
        "HF_HOME": "hf",
        "TUNEKIT_CACHE": "c",
    }.items():
        (scratch / folder).mkdir()
        os.environ[name] = str(scratch / folder)
    tempfile.tempdir = None
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def fuzz(
    target: Any, inputs: int, seed: int, scratch: Path, work: Callable[..., None]
) -> dict[str, Any]:
    """Return what came of `inputs` inputs; a process that dies or hangs is replaced by another.

    A fault has the bytes that led to it, where `work` sends them as `data`, or leaves them in the
    file LAST of `scratch`, for inputs that end their process.
    """
    began = time.monotonic()
    told: Counter[str] = Counter()
    first: dict[str, dict[str, Any]] = {}

    def found(what: str, trace: list[str], data: str | None) -> None:
        told[what] += 1
        led = {} if data is None else {"bytes": data}
        first.setdefault(what, {"input": done, "trace": trace, **led})

    refused, done, slowest, largest = 0, 0, (0.0, 0), (0, 0)
    kept: dict[str, int] = {}
    while done < inputs:
        start = done
        ours, theirs = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=work, args=(target, done, inputs, seed, scratch, theirs)
        )
        worker.start()
        theirs.close()
        fault = None
        while done < inputs:
            if not _answers(ours, worker.pid or 0, imports=done == start):
                worker.kill()
                fault = "hung"
                break
            try:
                answer = ours.recv()
            except EOFError:
                worker.join()
                fault = f"died (exit code {worker.exitcode})"
                break
            slowest = max(slowest, (answer["seconds"], done))
            largest = max(largest, (answer["bytes"], done))
            refused += answer["refused"]
            kept = {"kept": answer["kept"]} if "kept" in answer else {}
            if what := answer["fault"]:
                found(what, answer["trace"], answer.get("data"))
            done += 1
        if fault is not None:
            last = scratch / LAST
            found(fault, [], last.read_bytes().hex() if last.exists() else None)
            done += 1
        worker.join()
    return {
        "inputs": done,
        "refused": refused,
        **kept,
        "seconds": round(time.monotonic() - began, 1),
        "slowest": {"processor_s": round(slowest[0], 3), "input": slowest[1]},
        "largest": {"bytes": largest[0], "input": largest[1]},
        "faults": [
            {"what": what, "count": count, **first[what]}
            for what, count in told.most_common(_MOST_KINDS)
        ],
    }


def _answers(pipe: Connection, pid: int, imports: bool) -> bool:
    """Wait for an answer; False where the process had the processor, or the time, for too long.

    imports: it has to import first, which counts as waiting alone.
    """
    began, busy = time.monotonic(), time.clock_gettime((~pid << 3) | 2)  # Linux's clock of another
    while not pipe.poll(PROCESSOR):
        used = time.clock_gettime((~pid << 3) | 2) - busy
        if time.monotonic() - began > WAIT or (used > PROCESSOR and not imports):
            return False
    return True


def _work(target: Any, start: int, end: int, seed: int, scratch: Path, answers: Connection) -> None:
    feed = prepared(target, seed, scratch)
    for number in range(start, end):
        answers.send(feed(Random(f"{seed} {target.name} {number}")))
    os._exit(0)


def prepared(target: Any, seed: int, scratch: Path) -> Callable[[Random], dict[str, Any]]:
    """Make this process one that may be lost, and return what feeds `target` one input."""
    from targets import emptied

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # libtiff and diffusers say a lot
    sys.dont_write_bytecode = True
    seeds = target.prepare(emptied(scratch / "good"))
    here = scratch / "here"
    os.chdir(emptied(here))
    # brings what is imported on the way
    _feed(target, Random(f"{seed} {target.name} -1"), seeds, here, scratch)
    return lambda rng: _limited(_feed(target, rng, seeds, here, scratch))


def _limited(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in which too much time and memory are faults too."""
    slow, large = answer["seconds"] > PROCESSOR, answer["bytes"] > MEMORY
    return answer | {"fault": answer["fault"] or ("slow" if slow else "large" if large else "")}


def _feed(target: Any, rng: Random, seeds: Any, here: Path, scratch: Path) -> dict[str, Any]:
    from targets import emptied, run_once
    from watch import watched

    os.chdir(emptied(here))
    before, began = _memory("VmRSS"), time.process_time()
    refused, fault, trace = False, "", []
    try:
        with watched(scratch) as seen:
            refused = run_once(target, rng, seeds, here)
        fault = seen[0] if seen else ""
    except BaseException as error:  # whatever it is, it is what is looked for
        calls = traceback.extract_tb(error.__traceback__)
        trace = [f"{Path(call.filename).name}:{call.lineno}" for call in calls][-12:]
        own = [call for call in calls if "/tunekit/" in call.filename] or calls
        fault = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    seconds, most = time.process_time() - began, max(0, _memory("VmHWM") - before)
    return {
        "seconds": seconds, "bytes": most, "refused": refused, "fault": fault, "trace": trace
    }  # fmt: skip


def _memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes; asked for what is held now, forget the peak."""
    if name == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def _told(row: dict[str, Any]) -> str:
    faults = "; ".join(f"{fault['what']} ({fault['count']})" for fault in row["faults"]) or "none"
    return (
        f"{row['inputs']:,} inputs, {row['refused']:,} refused, {row['seconds']:.0f} s, slowest "
        f"{row['slowest']['processor_s']:.2f} s, largest {row['largest']['bytes'] / 1e6:.0f} MB, "
        f"faults: {faults}"
    )


if __name__ == "__main__":
    sys.exit(main(__doc__, RESULT, _work))
