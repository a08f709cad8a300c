"""Runs killed at random instants and gone on with until they end: does any end another way?

    python benchmarks/chaos.py [--runs 200] [--kills 0] [--most 4] [--minutes 120] [--seed 0]
                               [--journal FILE] [--result FILE] [--work FOLDER]

One run of a tiny base (of the real classes, as the tests make it) goes undisturbed. Every other one
is a process that gets SIGKILL, up to --most times: at any time, at the n-th file it touches, or -
half of them - a moment after it began to touch a checkpoint. What is left is looked at: each
checkpoint that a run would go on from must be whole. Then the run goes on (or begins anew, where
nothing was saved), and in the end its curve, samples, checkpoints, files and scores must be
those of the undisturbed one, to the bit. Every fourth run begins with an empty cache, so that it is
killed while pictures are encoded too. Processes are forked from one that has imported everything.

Goes on until there were so many runs and so many kills, or the minutes are over. Writes
benchmarks/results/chaos.json; exits with 1 where a run differs, fails, or leaves a damaged
checkpoint. About seven seconds of one core a run; Linux alone. --work keeps the runs' folders.
--journal writes down each run as it ends; the same command goes on after those that stand there, if
neither the package nor the seed is another one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from chaos_run import FILE, ROOT, SAVING, STEPS, Touches, facts, make_recipe, train, version

RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
ANY = "at any time"
KINDS = (ANY, FILE, SAVING, SAVING)
_LATER = 0.03  # seconds at most from the touch of a checkpoint to the kill
_ENOUGH = 10  # faults


@dataclass
class Tally:
    """What was seen of one run, or of all so far. seconds: that were spent on it."""

    runs: int = 0
    equal: int = 0
    seconds: float = 0
    kills: int = 0
    attempts: int = 0
    begun_anew: int = 0
    checkpoints: int = 0
    leftovers: int = 0
    landed: dict[str, Counter[str]] = field(
        default_factory=lambda: {kind: Counter() for kind in dict.fromkeys(KINDS)}
    )
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count what was seen of others too."""
        for name, value in vars(other).items():
            if name == "landed":
                for kind, counted in value.items():
                    self.landed[kind].update(counted)
            else:
                setattr(self, name, getattr(self, name) + value)


class Journal:
    """The runs that have ended, a line each, after one that says of what. path: None for none."""

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self.path = path
        told = {"version": version(), "seed": options.seed, "most": options.most, "steps": STEPS}
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.done = [Tally(**json.loads(line)) for line in lines[1:]]
        if lines and json.loads(lines[0]) != told:
            sys.exit(f"{path}: is of other runs: {lines[0]}, and these are {json.dumps(told)}")
        if not lines:
            self._write(told)

    def add(self, tally: Tally) -> None:
        """Write down what was seen of a run."""
        self._write(vars(tally))

    def _write(self, told: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(told) + "\n")


def main() -> int:
    """Kill and go on, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        work = options.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunekit-chaos-")))
        work.mkdir(parents=True, exist_ok=True)
        _warm(work)
        trial = Trial(work.resolve(), options.seed, options.most, Journal(options.journal, options))
        while trial.tally.runs < options.runs or trial.tally.kills < options.kills:
            if time.monotonic() - began > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over")
                break
            if len(trial.tally.faults) >= _ENOUGH:
                print("enough faults to look into")
                break
            trial.run()
            if options.work is None:
                shutil.rmtree(work / f"run-{trial.tally.runs:04d}", ignore_errors=True)
    told = _told(trial, options)
    options.result.write_text(json.dumps(told, indent=1) + "\n")
    _print(told)
    return 1 if trial.tally.faults else 0


def _warm(work: Path) -> None:
    """Import what runs need, in this process, which starts no thread."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TUNEKIT_CACHE"] = str(work / "cache")
    needed = (
        *("accelerate", "peft", "tiny", "tiny_judges", "torch.utils.tensorboard"),
        *("tunekit.evaluation.judges", "tunekit.evaluation.report", "tunekit.export"),
        *("tunekit.loading", "tunekit.preparation", "tunekit.resume", "tunekit.run"),
        *("tunekit.samples", "tunekit.train"),
    )
    _import(needed)


def _import(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every child copies all of it when it collects garbage
    assert threading.active_count() == 1, "a process with threads cannot be forked"


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, as JSON from a process of its own."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        _end(lambda: os.write(writing, json.dumps(work()).encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the reason stands above"
    return json.loads(told)


def _busy(pid: int) -> float:
    """Return the seconds that a process, ended or not, has had the processor: Linux's own clock.

    Where others want the machine too, this tells how far a run has come.
    """
    return time.clock_gettime((~pid << 3) | 2)


def _end(work: Callable[[], Any]) -> None:
    """Do the work, and end this process without what its parent had open."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Trial:
    """Runs against the one that nobody disturbed. most: kills of a run."""

    def __init__(self, work: Path, seed: int, most: int, journal: Journal) -> None:
        self.work, self.seed, self.most, self.journal = work, seed, most, journal
        self.tally, self.one = Tally(), Tally()
        for done in journal.done:
            self.tally.add(done)
        self.recipe = in_child(lambda: make_recipe(work))
        out, cache = work / "undisturbed", work / "cache"
        began = time.monotonic()

        def undisturbed() -> tuple[dict[str, int], float, list[str]]:
            touched = Touches((out, cache), {})
            train(self.recipe, out, cache)
            modules = [name for name in sys.modules if name.startswith("tunekit.")]
            return touched.counts, time.process_time(), modules

        self.touches, self.busy, modules = in_child(undisturbed)
        self.seconds = time.monotonic() - began
        _import(modules)  # all runs are of one version, whatever is edited meanwhile
        self.wanted = in_child(lambda: facts(out))
        print(
            f"undisturbed: {self.seconds:.1f} s, of which the processor {self.busy:.1f} s; "
            f"{self.touches[FILE]} touches of files"
        )

    def run(self) -> None:
        """Have the next run killed and gone on with until it ends, and look at what came out."""
        number, began = self.tally.runs + 1, time.monotonic()
        self.one = Tally(runs=1)
        self._disturbed(number)
        self.one.seconds = time.monotonic() - began
        self.tally.add(self.one)
        self.journal.add(self.one)
        print(f"run {number}: {self.one.kills} kills, {self.one.seconds:.0f} s", flush=True)

    def _disturbed(self, number: int) -> None:
        tally, name, killed = self.one, f"run-{number:04d}", 0
        out = self.work / name
        cache = self.work / f"{name}-cache" if number % 4 == 0 else self.work / "cache"
        random = Random(f"{self.seed}/{number}")
        while True:
            kind = random.choice(KINDS) if killed < self.most else None
            tally.attempts += 1
            tally.begun_anew += killed > 0 and not self._saved(out)
            code = self._attempt(out, cache, kind, random)
            if code == 0:
                break
            if code != -signal.SIGKILL or kind is None:
                log = out.with_suffix(".log").read_text()
                tally.faults.append(f"{name} ended with {code}: {log[-800:]}")
                return
            killed += 1
            tally.kills += 1
            tally.landed[kind][self._look(out)] += 1
            if (out / "report.html").exists():
                break
        self._judge(name, out)
        if cache != self.work / "cache":
            shutil.rmtree(cache, ignore_errors=True)

    def _judge(self, run: str, out: Path) -> None:
        found = in_child(lambda: facts(out))
        other = [
            key for key in sorted({*found, *self.wanted}) if found.get(key) != self.wanted.get(key)
        ]
        if other:
            self.one.faults.append(f"{run} differs: {', '.join(other)[:1000]}")
        else:
            self.one.equal += 1

    def _attempt(self, out: Path, cache: Path, kind: str | None, random: Random) -> int:
        """Return how one process ended: its exit code, or minus the signal."""
        reading, writing = os.pipe()
        at, later = random.random(), random.random()
        if (pid := os.fork()) == 0:
            os.close(reading)
            log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if kind in (FILE, SAVING):
                acts = {
                    FILE: lambda: os.kill(os.getpid(), signal.SIGKILL),
                    SAVING: lambda: os.write(writing, b"!"),
                }
                place = 1 + int(at * self.touches[kind])
                Touches((out, cache), {kind: (place, acts[kind])})
            _end(lambda: train(self.recipe, out, cache))
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            # The pipe tells that the moment has come, or, by its end, that the process has ended.
            until, ready = at * self.busy if kind == ANY else None, []
            while not ready and (until is None or (left := until - _busy(pid)) > 0):
                ready, _, _ = select.select([pipe], [], [], until and left)
            if not ready or pipe.read(1):
                time.sleep(later * _LATER if ready else 0)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _saved(self, out: Path) -> list[Path]:
        from tunekit import checkpoint

        return checkpoint.steps(out / "checkpoints")

    def _look(self, out: Path) -> str:
        """Check every checkpoint that counts as one, and return where the kill has hit."""
        from tunekit import checkpoint
        from tunekit.errors import UserError

        saved = self._saved(out)
        for folder in saved:
            try:
                checkpoint.verify(folder)
                self.one.checkpoints += 1
            except UserError as error:
                self.one.faults.append(f"a damaged checkpoint counts as one: {error}")
        left = list(self._leftovers(out / "checkpoints"))
        self.one.leftovers += len(left)
        if left:
            return "within a checkpoint"
        if not saved:
            return "before the first checkpoint"
        return "after the last step" if saved[-1].name == f"step-{STEPS:06d}" else "between steps"

    def _leftovers(self, parent: Path) -> Iterator[str]:
        """Yield what lies there and is no checkpoint."""
        for path in parent.iterdir() if parent.is_dir() else ():
            if path not in self._saved(parent.parent):
                yield path.name


def _told(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    tally = trial.tally
    return {
        "runs": tally.runs,
        "runs_asked_for": options.runs,
        "ended_bit_equal": tally.equal,
        "faults": tally.faults,
        "kills": tally.kills,
        "processes": tally.attempts,
        "begun_anew_as_nothing_was_saved": tally.begun_anew,
        "checkpoints_verified_after_kills": tally.checkpoints,
        "half_checkpoints_left_and_ignored": tally.leftovers,
        "kills_by_instant_and_where_they_hit": {k: dict(v) for k, v in tally.landed.items()},
        "compared": len(trial.wanted),
        "seed": options.seed,
        "steps": STEPS,
        "seconds": round(tally.seconds, 1),
        "undisturbed_seconds": round(trial.seconds, 2),
        "undisturbed_processor_seconds": round(trial.busy, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "python": platform.python_version(),
    }


def _print(told: dict[str, Any]) -> None:
    places = ("before the first checkpoint", "between steps", "within a checkpoint")
    places = (*places, "after the last step")
    print(f"\n{'killed':<16}" + "".join(f"{place:>29}" for place in places))
    for kind, landed in told["kills_by_instant_and_where_they_hit"].items():
        print(f"{kind:<16}" + "".join(f"{landed.get(place, 0):>29}" for place in places))
    print(
        f"\n{told['runs']} runs, {told['kills']} kills: {told['ended_bit_equal']} ended bit-equal, "
        f"{len(told['faults'])} faults; {told['checkpoints_verified_after_kills']} checkpoints "
        f"verified, {told['half_checkpoints_left_and_ignored']} halves ignored; "
        f"{told['seconds']:.0f} s"
    )
    for fault in told["faults"]:
        print(fault)


if __name__ == "__main__":
    sys.exit(main())
