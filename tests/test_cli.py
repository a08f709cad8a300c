"""The command line: what it prints where, how it refuses, and what it does not load."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from good import recipe_for
from PIL import Image
from told import Typed

import tunekit
from tunekit.cli_files import Merging
from tunekit.cli_generate import Asked
from tunekit.files import merge
from tunekit.recipe import json_schema
from tunekit.request import Request

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "numpy", "PIL")


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[..., Path]
) -> Path:
    """A working directory with a recipe for a tiny base."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "small.yaml").write_text(recipe_for(str(tiny_folder())))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], (*HEAVY, "pydantic", "rich")),
        (["train", "--help"], (*HEAVY, "rich")),
        (["validate", "small.yaml"], (*HEAVY, "rich")),
        (["validate", "small.yaml", "--print"], (*HEAVY, "rich")),
        (["validate", "small.yaml", "train.stepz=5"], (*HEAVY, "rich")),
        (["schema"], (*HEAVY, "rich")),
        (["schema", "--markdown"], (*HEAVY, "rich")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_answers_at_once_imports_nothing_heavy(
    project: Path, arguments: list[str], unwanted: tuple[str, ...]
) -> None:
    script = (
        f"import sys; sys.argv = ['tunekit', *{arguments!r}]\n"
        "from tunekit.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    sys.stderr.write('HEAVY=' + ','.join(set({unwanted!r}) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stderr.endswith("HEAVY="), ran.stderr
    assert ran.returncode == (2 if "train.stepz=5" in arguments else 0)


def test_importing_the_package_imports_nothing() -> None:
    script = "import sys, tunekit; print(*(set(sys.modules) & {'pydantic', 'torch', 'typer'}))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_help_names_every_verb(typed: Typed) -> None:
    told = typed("--help")
    assert told.code == 0
    for verb in ("train", "validate", "schema", "generate", "info", "doctor"):
        assert f"\n  {verb} " in told.out
        assert typed(verb, "--help").code == 0


@pytest.mark.parametrize(
    ("options", "asked"), [(Asked, Request), (Merging, merge.Request)], ids=lambda c: c.__name__
)
def test_what_can_be_asked_from_python_can_be_typed(options: Any, asked: Any) -> None:
    assert {field.name for field in fields(options)} == {field.name for field in fields(asked)}


def test_version(typed: Typed) -> None:
    assert typed("--version").out.strip() == tunekit.__version__


def test_a_valid_recipe(typed: Typed, project: Path) -> None:
    told = typed("validate", "small.yaml", "train.steps=8")
    assert (told.code, told.out, told.err) == (0, "small.yaml: is valid\n", "")


def test_the_resolved_recipe_runs_again(typed: Typed, project: Path) -> None:
    told = typed("validate", "small.yaml", "--print", "train.steps=8")
    assert told.code == 0
    assert "steps: 8" in told.out
    (project / "resolved.yaml").write_text(told.out)
    assert typed("validate", "resolved.yaml", "--print").out == told.out


def test_a_recipe_with_three_faults_has_three_lines_and_exit_code_2(
    typed: Typed, project: Path
) -> None:
    text = (project / "small.yaml").read_text().replace("kind: lora", "kind: lorra")
    (project / "bad.yaml").write_text(text + "  stepz: 3\n  seed: x\n")
    for verb in ("validate", "train"):
        told = typed(verb, "bad.yaml")
        assert told.code == 2
        assert told.out == ""
        assert [line.split(": ")[0] for line in told.err.splitlines()] == [
            "bad.yaml:9",
            "bad.yaml:12",
            "bad.yaml:13",
        ]
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["validate", "smal.yaml"], 'smal.yaml: there is no such recipe (did you mean "small.ya'),
        (["validate", "\x1b[2J.yaml"], "\\x1b[2J.yaml: there is no such recipe"),
        (["validate", "small.yaml", "steps"], 'override "steps": is not KEY=VALUE'),
        (["train", "small.yaml", "train.steps=x"], "train.steps: must be a whole number"),
        (["train", "--resume", "small.yaml", "train.steps=x"], "train.steps: must be a whole"),
        (["generate", "--run", "runs/none"], "runs/none: "),
        (["generate", "--prompt", "a"], "--base toybox"),
        (["generate", "--prompt", "a", "--base", "toybox", "--count", "0"], "count: 0 is not in"),
        (["generate", "--prompt", "a", "--checkpoint", "x"], "--run"),
        (["generate", "--base", "toybox"], "prompt: name at least one"),
        (["generate", "--prompt", "a", "--base", "toybox", "--steps", "0"], "steps: 0 is not in"),
        (["generate", "--prompt", "a", "--base", "toybox", "--out", "small.yaml"], "is a file"),
        (
            ["generate", "--prompt", "a", "--base", "toybox", "--adapter", "none.safetensors"],
            "none.safetensors: there is no such",
        ),
        (["generate", "--prompt", "a", "--adapter", "x:much"], '"much" is no weight'),
        (["generate", "--prompt", "a", "--base", "pictures"], "pictures: is no diffusers model"),
        (["info", "none.safetensors"], "none.safetensors: "),
        (["info", "small.yaml"], "small.yaml: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_is_one_line_and_exit_code_2(
    typed: Typed, project: Path, arguments: list[str], says: str
) -> None:
    before = sorted(project.rglob("*"))
    told = typed(*arguments)
    assert told.code == 2
    assert told.out == ""
    assert says in told.err
    assert told.err.count("\n") == 1
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["paint"], ["generate", "--count", "x"], ["validate"], ["train", "--foo"]]
)
def test_a_command_that_cannot_be_parsed(typed: Typed, arguments: list[str]) -> None:
    assert typed(*arguments).code == 2


def test_the_schema_is_printed_as_json(typed: Typed) -> None:
    assert json.loads(typed("schema").out) == json_schema()


def test_doctor_tells_of_every_dependency(typed: Typed) -> None:
    told = typed("doctor")
    assert told.code in (0, 1)
    for word in ("python", "torch", "diffusers", "ruamel.yaml", "accelerator", "toybox model"):
        assert word in told.out
    report = json.loads(typed("doctor", "--json").out)
    assert report["ok"] == (told.code == 0)
    assert all(check["ok"] == (not check["remedy"]) for check in report["checks"])


def test_generate_draws_a_folder_and_a_grid(
    typed: Typed, project: Path, tiny_folder: Callable[..., Path]
) -> None:
    told = typed(
        *("generate", "--base", tiny_folder(), "--prompt", "a robot", "--prompt", "a blue cat"),
        *("--seed", 5, "--count", 2, "--steps", 2, "--guidance", 3, "--negative", "snow"),
        *("--scheduler", "euler", "--width", 32, "--height", 16, "--json"),
    )
    assert told.code == 0, told.err
    made = json.loads(told.out)
    names = [Path(path).name for path in made["pictures"]]
    assert names == [
        "001-a-robot-seed5.png",
        "002-a-robot-seed6.png",
        "003-a-blue-cat-seed5.png",
        "004-a-blue-cat-seed6.png",
    ]
    assert Path(made["grid"]).name == "grid.png"
    with Image.open(made["pictures"][2]) as picture:
        assert picture.size == (32, 16)
        stored = json.loads(picture.text["tunekit"])  # type: ignore[attr-defined]
    expected = {"prompt": "a blue cat", "seed": 5, "steps": 2, "guidance_scale": 3}
    expected |= {"negative_prompt": "snow", "scheduler": "euler", "width": 32, "height": 16}
    assert stored.items() >= expected.items()

    again = typed(
        *("generate", "--base", tiny_folder(), "--prompt", "a robot"),
        *("--seed", 5, "--count", 1, "--steps", 2, "--guidance", 3, "--negative", "snow"),
        *("--scheduler", "euler", "--width", 32, "--height", 16),
    )
    assert told.err.splitlines()[-1] == "4/4  a blue cat (seed 6)"
    assert again.out.startswith("generated/")
    assert Path(again.out.strip()).parent != Path(made["folder"]), "a folder of its own"
    same = Path(again.out.strip()).parent / "001-a-robot-seed5.png"
    assert same.read_bytes() == Path(made["pictures"][0]).read_bytes()


def test_a_full_disk_is_one_line_and_leaves_no_half_a_picture(
    typed: Typed, project: Path, tiny_folder: Callable[..., Path]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # bytes a file: no picture fits
    try:
        told = typed(
            *("generate", "--base", tiny_folder(), "--prompt", "a robot", "--steps", 1),
            *("--out", "full"),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.code == 2
    assert told.err.endswith("File too large\n")
    assert told.err.count("\n") == 1
    assert not list((project / "full").glob("*"))
