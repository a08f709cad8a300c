"""Fault 19 after the last step: a process that gets no more memory, exporting and evaluating."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import checkpoint, outofmemory, runstate
from tunekit.advice import lower_asked
from tunekit.errors import UserError
from tunekit.outofmemory import OutOfMemoryError
from tunekit.recipe import dump_yaml, recipe_from

# From the start of a part of the run on, nothing of 4 kB or more is to be had.
_NO_MORE = """
import resource, sys, threading
import tunekit.cli, tunekit.train, tunekit.preparation, tunekit.export, tunekit.evaluation.judges
import tunekit.loading, tunekit.verification
import diffusers, transformers, accelerate, peft
from tunekit.run import _Session
_, recipe, out, part = sys.argv
threading.stack_size(2**18)
take = getattr(_Session, part)
def short(*arguments):
    size = int(next(line.split()[1] for line in open("/proc/self/status") if "VmSize" in line))
    room = size * 1024 + 600_000
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    return take(*arguments)
setattr(_Session, part, short)
sys.argv = ["tunekit", "train", recipe, "--out", out]
tunekit.cli.main()
"""


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("_export", "while the adapter was exported (pictures of 32 pixels)"),
        ("_evaluate", "while the run was evaluated (pictures of 32 pixels)"),
    ],
)
def test_after_the_last_step_it_is_explained_and_goes_on(
    tree: Callable[..., Any], tmp_path: Path, part: str, said: str
) -> None:
    recipe = recipe_from(tree(train={"steps": 1, "sample_every": 0}))
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump_yaml(recipe))
    done = subprocess.run(
        [sys.executable, "-c", _NO_MORE, str(path), str(out), part],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"},
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    [at] = [n for n, line in enumerate(lines) if line.startswith("out of memory")]
    # A base is read by several threads, and they may be the first that there is no room for.
    lacks = r"out of memory(, or of threads that may be started,)? "
    assert re.match(lacks + re.escape(said), lines[at])
    assert "the last step is saved" in lines[at]
    told = "".join(lines[at + 1 :])
    assert "base.dtype=bf16" in told
    assert "gradient_checkpointing" not in told, "nothing trains any more"
    state = runstate.read(out)
    assert state is not None
    assert (state.outcome, state.step) == ("failed", 1)
    [saved] = checkpoint.steps(out / "checkpoints")
    checkpoint.verify(saved)


# From a part of drawing on, little more is to be had: enough to start with, not for a batch.
_LITTLE = """
import gc, resource, sys
import tunekit.cli, tunekit.generate, tunekit.inference
import tunekit.data.records, tunekit.redaction  # the refusal itself needs them
import diffusers, transformers, accelerate, peft
_, part, more, *words = sys.argv
owner = tunekit.inference if part == "load" else tunekit.inference.Painter
take = getattr(owner, part)
def short(*arguments, **named):
    if part == "load":
        take(*arguments, **named), gc.collect()  # with all libraries that it needs
    size = int(next(line.split()[1] for line in open("/proc/self/status") if "VmSize" in line))
    room = size * 1024 + int(more)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    return take(*arguments, **named)
setattr(owner, part, short)
sys.argv = ["tunekit", "generate", *words]
tunekit.cli.main()
"""


@pytest.mark.parametrize(
    ("part", "room", "when", "wanted"),
    [
        (
            *("draw_all", 200_000_000, "while drawing (4 at a time of 1024x768 pixels)"),
            ["--batch=2", "--quantize=int8", "--quantize=nf4", "--width=768 --height=576"],
        ),
        ("load", 4_000_000, "while the base was loaded", ["--quantize=int8", "--quantize=nf4"]),
    ],
)
def test_drawing_says_which_options_lower_it(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    part: str,
    room: int,
    when: str,
    wanted: list[str],
) -> None:
    out = tmp_path / "out"
    base = "toybox" if part == "load" else str(tiny_folder())  # more than may lie about
    words = ["--base", base, "--prompt", "a robot", "--count", "6", "--batch", "4"]
    words += ["--width", "1024", "--height", "768", "--steps", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", _LITTLE, part, str(room), *words],
        capture_output=True, text=True, env=os.environ, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    [at] = [n for n, line in enumerate(lines) if line.startswith("out of memory")]
    assert re.fullmatch(
        rf"out of memory(, or of threads that may be started,)? {re.escape(when)}"
        r"(: [\d,]+ bytes more were asked for)?; what lowers it, the cheapest first:",
        lines[at],
    )
    named = [line.partition(": ")[0].strip() for line in lines[at + 1 :]]
    assert named == wanted
    assert not out.exists()


def test_what_is_advised_for_drawing_is_not_had_already() -> None:
    assert [str(one).partition(":")[0] for one in lower_asked("int8_torchao", 1, (64, 64))] == [
        "--quantize=nf4"
    ]
    assert lower_asked("nf4") == []
    (smaller,) = lower_asked("nf4", 1, (1024, 512))
    assert smaller.settings == ("--width=768", "--height=384")


def test_a_thread_that_finds_no_room_is_a_want_of_memory(tree: Callable[..., Any]) -> None:
    """What Python says where a thread's stack has no room, and nothing else."""
    code = """
import resource, threading
from tunekit.outofmemory import is_out_of_memory
threading.stack_size(2**28)
resource.setrlimit(resource.RLIMIT_AS, (2**28, resource.RLIM_INFINITY))
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(is_out_of_memory(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stdout + done.stderr
    with pytest.raises(OutOfMemoryError, match=r"^out of memory, or of threads"):  # noqa: SIM117
        with outofmemory.told_after("while pictures were drawn", recipe_from(tree()), 64):
            raise RuntimeError("can't start new thread")


def test_what_a_library_calls_unreadable_for_want_of_memory_is_that(
    tree: Callable[..., Any],
) -> None:
    recipe = recipe_from(tree())

    def load() -> None:
        try:
            raise MemoryError("Cannot allocate memory (os error 12)")
        except MemoryError as short:
            raise UserError("unet: cannot be loaded") from short

    with pytest.raises(OutOfMemoryError, match=r"exported \(pictures of 64 pixels\); "):  # noqa: SIM117
        with outofmemory.told_after("while the adapter was exported", recipe, 64):
            load()
    with pytest.raises(UserError, match=r"^x: is damaged$") as caught:  # noqa: SIM117
        with outofmemory.told_after("while the adapter was exported", recipe, 64):
            raise UserError("x: is damaged")
    assert not isinstance(caught.value, OutOfMemoryError)


def test_a_file_that_finds_no_room_is_not_called_damaged(
    tree: Callable[..., Any], tmp_path: Path
) -> None:
    """What safetensors and torch raise for it, in a process that may not map the file."""
    code = """
import resource, sys
from pathlib import Path
import torch
from tunekit import checkpoint
from tunekit.outofmemory import is_out_of_memory
path = Path(sys.argv[1])
checkpoint.write_safetensors(path, {"a": torch.zeros(50_000_000)})
size = int(next(line.split()[1] for line in open("/proc/self/status") if "VmSize" in line))
for room in (50_000_000, 250_000_000):  # none to map it, none to map it twice
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + room, resource.RLIM_INFINITY))
    try:
        checkpoint.read_safetensors(path)
    except Exception as error:
        print(is_out_of_memory(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")],
        capture_output=True, text=True, env=os.environ, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stdout + done.stderr
