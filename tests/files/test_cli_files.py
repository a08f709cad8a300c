"""The verbs about files: what they print, what they refuse, and how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_files import export
from told import Typed

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def lora(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_folder(), "LoRA", tmp_path_factory.mktemp("lora"))["kohya"]


def test_there_and_on(
    typed: Typed, lora: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One file goes through every verb; each says what it did."""
    base = tiny_folder()
    out = tmp_path / "d.safetensors"
    told = typed("convert", lora, "--to", "diffusers", "--base", base, "--out", out)
    assert told.code == 0
    assert "modules (LoRA) from kohya to diffusers" in told.out
    assert "again when converted back" in told.out
    told = typed("merge", f"{out}:0.5", "--base", base, "--out", tmp_path / "m", "--json")
    assert told.code == 0
    assert json.loads(told.out)["adapters"] == ["d.safetensors x 0.5"]
    extracted = tmp_path / "x.safetensors"
    told = typed("extract", tmp_path / "m", "--from", base, "--rank", 4, "--out", extracted)
    assert told.code == 0
    assert "of rank 4 keep 100.00% of the squared norm" in told.out
    small = tmp_path / "s.safetensors"
    words = ("resize", extracted, "--energy", 0.9, "--out", small, "--base", base, "--json")
    report = json.loads(typed(*words).out)
    assert 0.9 <= report["kept"] < 1
    assert report["kept"] == pytest.approx(1 - (report["lost"] / report["norm"]) ** 2)
    both = tmp_path / "b.safetensors"
    words = ("merge", lora, f"{small}:2", "--into-adapter", "--base", base, "--out", both)
    told = typed(*words)
    assert told.code == 0, told.err
    assert "merged by concat: zorp-kohya.safetensors x 1, s.safetensors x 2" in told.out
    assert typed("info", both).code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["convert", "LORA", "--to", "comfy"], "--to: comfy is no layout"),
        (["convert", "LORA", "--to", "kohya", "--dtype", "fp8"], "--dtype: fp8 is none of"),
        (["convert", "none.safetensors", "--to", "kohya"], "none.safetensors: cannot be read"),
        (["convert", "LORA", "--to", "kohya", "--base", "nowhere"], "there is no folder nowhere"),
        (["merge", "LORA", "--out", "m", "--rank", "4"], "--rank: is for --into-adapter"),
        (["merge", "LORA", "--out", "m", "--base", "toybox", "--config", "x"], "and none is"),
        (
            ["merge", "LORA", "--into-adapter", "--out", "m.safetensors", "--variant", "fp16"],
            "--variant: is of a base that is merged into",
        ),
        (["merge", "LORA:x", "--out", "m"], '"x" is no weight'),
        (["merge", "LORA", "--into-adapter", "--out", "m"], "does not end in .safetensors"),
        (["resize", "LORA", "--out", "m.safetensors"], "name --rank, --energy or --frobenius"),
        (
            ["resize", "LORA", "--out", "m.safetensors", "--energy", "0.5", "--frobenius", "0.5"],
            "both say how much is kept",
        ),
        (["extract", "toybox", "--from", "toybox", "--rank", "2", "--out", "LORA"], "is there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_is_one_line_and_exit_code_2(
    words: list[str],
    says: str,
    typed: Typed,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = typed(*[word.replace("LORA", str(lora)) for word in words])
    assert len(told.refusal(says)) == 1
    assert told.out == ""
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['tunekit', 'merge', '--help']\n"
        "from tunekit.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write(str({'torch', 'diffusers', 'peft'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stderr == "set()"


@pytest.mark.slow
@pytest.mark.timeout(600)  # some hundred megabytes are written and read
def test_memory_follows_the_largest_weight_and_not_the_model() -> None:
    words = ["benchmarks/files_memory.py", "--megabytes", "250", "--only", "merge"]
    ran = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout)
    assert told["model_mb"] > 250
    assert told["verbs"][0]["rise_mb"] < told["model_mb"] / 2
