"""Does memory stay the same from 100 to 10,000 pictures, and what does the data engine cost?

    python benchmarks/data_memory.py [--count 10000] [--few 100] [--resolution 128]

Memory: the preflight, the encoding and 20 batches of `--few` and of `--count` pictures of 512 x 512
pixels, each with a caption of its own, in a process of their own. They are trained at
`--resolution`, since neither the index nor the queue of entries knows of the VAE's size and the
bundled VAE takes more than a second for 512 pixels.

Speed: `--speed-count` of the pictures trained at 512 pixels, picture by picture in turn with what
anybody has to do: open the file, make a tensor of it, run the VAE. The index's time a picture is
that of the run with all `--count`, so that whatever grows faster than the pictures shows.

Everything is drawn, cached and deleted in a temporary folder. Writes
benchmarks/results/data_memory.json; exits with 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "data_memory.json"
SIZE = 512  # pixels
BATCHES, BATCH_SIZE = 20, 4
MEMORY_ALLOWED = 50.0  # MB (10^6 bytes) that more pictures may take
SPEED_ALLOWED = 0.9  # of the bare loop's pictures a second
TURN = 5  # pictures before it is the bare loop's turn

# This process imports nothing heavy: a child inherits its parent's peak.


def paint(folder: Path, count: int) -> None:
    """Draw pictures that compress like photographs, each with a caption in metadata.jsonl."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = np.tile(random.integers(-12, 13, (64, 64, 1), dtype=np.int16), (8, 8, 1))
        picture = Image.fromarray((values + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:05}.jpg", quality=85)
        text = f"a {{trigger}} {{class}}, number {number}"
        lines.append(json.dumps({"file_name": f"{number:05}.jpg", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Clock:
    """Wall and processor seconds of the parts of a program; what runs in `other` is not counted."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    @contextlib.contextmanager
    def counting(self, sign: int = 1) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall += sign * (time.perf_counter() - wall)
        self.processor += sign * (time.process_time() - processor)

    def a_picture(self, count: int) -> dict[str, float]:
        """Return milliseconds a picture."""
        return {
            "wall_ms": round(1000 * self.wall / count, 3),
            "processor_ms": round(1000 * self.processor / count, 3),
        }


class Engine:
    """The data engine around the bundled base, as a run uses it."""

    def __init__(self, folder: Path, resolution: int) -> None:
        import torch

        from tunekit import families
        from tunekit.schema import Base, Data

        torch.set_num_threads(1)
        self.data = Data.model_validate(
            {"source": str(folder), "trigger": "zorp", "class": "robot", "resolution": resolution}
        )
        self.family = families.load(Base(model="toybox"))
        self.resolution = resolution

    def preflight(self) -> Any:
        from tunekit.data.sheet import preflight

        return preflight(self.data, multiple=self.family.size_multiple)

    def encode(self, sheet: Any, cache: Any, tick: Callable[[str, int], None]) -> Any:
        """Encode all of it; tick: told (stage, how many are done) after each."""
        from tunekit.data import EncodedDataset, fingerprint

        @contextlib.contextmanager
        def stage(name: str, total: int) -> Iterator[Callable[[], None]]:
            done = 0

            def one() -> None:
                nonlocal done
                done += 1
                tick(name, done)

            yield one

        texts: dict[str, Any] = {}
        for encoder in self.family.text_encoders.values():
            texts |= encoder.state_dict()
        return EncodedDataset.encode(
            sheet.examples,
            self.data,
            resolution=self.resolution,
            seed=0,
            encode_image=self.family.encode_image,
            image_fingerprint=fingerprint(self.family.vae.state_dict()),
            encode_prompt=self.family.encode_prompt,
            text_fingerprint=fingerprint(texts),
            multiple=self.family.size_multiple,
            batch_size=BATCH_SIZE,
            batches=BATCHES,
            cache=cache,
            stage=stage,
        )

    def bare(self, path: Path) -> None:
        """Do what anybody has to do: decode the file and run the VAE."""
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if image.size != (self.resolution, self.resolution):
            size = (self.resolution, self.resolution)
            image = image.resize(size, Image.Resampling.LANCZOS)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
        with torch.no_grad():
            self.family.encode_image(values.float() / 127.5 - 1)


def peak() -> float:
    """Return the most memory this process has held, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory(folder: Path, resolution: int) -> dict[str, Any]:
    """Run preflight, encoding and batches, and return peaks in MB and times."""
    from tunekit.data.cache import Cache

    engine = Engine(folder, resolution)
    engine.bare(next(folder.glob("*.jpg")))  # what the VAE itself takes, before anything is counted
    peaks = {"loaded": peak()}
    index, encoding, batches = Clock(), Clock(), Clock()
    cache = Cache(folder.parent / f"{folder.name}-cache")
    with cache.using():
        with index.counting():
            sheet = engine.preflight()
        peaks["preflight"] = peak()
        with encoding.counting():
            dataset = engine.encode(sheet, cache, lambda stage, done: None)
        peaks["encoding"] = peak()
        give = dataset.batches(BATCH_SIZE)
        with batches.counting():
            for step in range(BATCHES):
                assert give(step, 0).latents.isfinite().all()
        peaks["batches"] = peak()
    count = len(sheet.examples)
    return {
        "pictures": count,
        "peak_mb": {name: round(value, 1) for name, value in peaks.items()},
        "index": index.a_picture(count),
        "encoding": encoding.a_picture(count),
        "batches": batches.a_picture(BATCHES * BATCH_SIZE),
        "cache_mb": round(sum(usage.bytes for usage in cache.usage()) / 1e6, 1),
    }


def speed(folder: Path, resolution: int) -> dict[str, Any]:
    """Encode pictures in turn with the bare loop over the same pictures; times of both."""
    from tunekit.data.cache import Cache

    engine = Engine(folder, resolution)
    index, encoding, bare = Clock(), Clock(), Clock()
    with index.counting():
        sheet = engine.preflight()
    paths = [example.path for example in sheet.examples]
    engine.bare(paths[0])

    def turn(stage: str, done: int) -> None:
        if stage == "encoding" and (done % TURN == 0 or done == len(paths)):
            with encoding.counting(-1), bare.counting():
                for path in paths[(done - 1) // TURN * TURN : done]:
                    engine.bare(path)

    with Cache(folder.parent / f"{folder.name}-speed").using() as cache, encoding.counting():
        engine.encode(sheet, cache, turn)
    return {
        "pictures": len(paths),
        "index": index.a_picture(len(paths)),
        "encoding": encoding.a_picture(len(paths)),
        "bare": bare.a_picture(len(paths)),
    }


def child(task: str, folder: Path, number: int) -> Any:
    """Do a task in a process of its own and return what it found."""
    command = [sys.executable, str(Path(__file__)), "--task", task, str(folder), str(number)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def some_of(folder: Path, count: int, name: str) -> Path:
    """Return a folder beside another, with its first pictures."""
    part = folder.with_name(name)
    part.mkdir()
    lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines(keepends=True)[:count]
    (part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    for line in lines:
        name = json.loads(line)["file_name"]
        shutil.copy(folder / name, part / name)
    return part


def compare(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run everything in turn under `work` and return the result."""
    pictures = work / "pictures"
    child("paint", pictures, given.count)
    few = child("memory", some_of(pictures, given.few, "few"), given.resolution)
    many = child("memory", pictures, given.resolution)
    timed = child("speed", some_of(pictures, given.speed_count, "timed"), SIZE)
    more = many["peak_mb"]["batches"] - few["peak_mb"]["batches"]
    ratios = {
        unit: timed["bare"][unit] / (many["index"][unit] + timed["encoding"][unit])
        for unit in ("wall_ms", "processor_ms")
    }
    return {
        "what": "peak memory of preflight, encoding and batches; time against a bare decode + VAE",
        "pictures_px": SIZE,
        "memory_resolution": given.resolution,
        "speed_resolution": SIZE,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "few": few,
        "many": many,
        "speed": timed,
        "memory_more_mb": round(more, 1),
        "memory_allowed_mb": MEMORY_ALLOWED,
        "speed_ratio": {unit: round(ratio, 3) for unit, ratio in ratios.items()},
        "speed_allowed": SPEED_ALLOWED,
    }


def told(result: dict[str, Any]) -> None:
    """Print what was found."""
    for run in (result["few"], result["many"]):
        peaks = ", ".join(f"{name} {mb:.0f}" for name, mb in run["peak_mb"].items())
        print(
            f"{run['pictures']:>6} pictures: peak MB: {peaks}; index {run['index']['wall_ms']:.1f} "
            f"ms, encoding {run['encoding']['wall_ms']:.1f} ms a picture; cache "
            f"{run['cache_mb']:.0f} MB"
        )
    timed, many = result["speed"], result["many"]
    print(f"memory: {result['memory_more_mb']:+.1f} MB (allowed {MEMORY_ALLOWED:.0f})")
    for unit, name in (("wall_ms", "wall"), ("processor_ms", "processor")):
        print(
            f"{SIZE} pixels, {name}: bare {timed['bare'][unit]:.1f} ms, index "
            f"{many['index'][unit]:.1f} + encoding {timed['encoding'][unit]:.1f} ms a picture: "
            f"{result['speed_ratio'][unit]:.3f} of the bare speed (allowed {SPEED_ALLOWED})"
        )


def main() -> int:
    """Measure, print, write the result, and compare with what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--speed-count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--task", nargs=3, metavar=("NAME", "FOLDER", "NUMBER"))
    given = parser.parse_args()
    if given.task:
        name, folder, number = given.task
        tasks: dict[str, Callable[[Path, int], Any]] = {
            "paint": paint,
            "memory": memory,
            "speed": speed,
        }
        print(json.dumps(tasks[name](Path(folder), int(number))))
        return 0
    if given.count <= max(given.few, given.speed_count):
        parser.error("--count must exceed --few and --speed-count")
    with tempfile.TemporaryDirectory(prefix="data-memory-") as work:
        os.environ["TUNEKIT_CACHE"] = str(Path(work) / "cache")
        result = compare(given, Path(work))
    told(result)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    slow = any(ratio < SPEED_ALLOWED for ratio in result["speed_ratio"].values())
    return int(slow or result["memory_more_mb"] > MEMORY_ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
