"""Access tokens and passwords: in no file that a run leaves, and in no line that it prints."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stopping import SECRETS, Stopped
from told import Typed

from tunekit.redaction import secret_in, without_secrets

Tree = dict[str, dict[str, Any]]
TOKEN = SECRETS["HF_TOKEN"]


def texts(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield what every file holds, and what stands compressed in pictures."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
        if path.suffix == ".png":
            with Image.open(path) as image:
                yield path, repr(image.info).encode()


def test_no_file_of_a_run_holds_one(stopped: Stopped) -> None:
    """Fault 20: four in the environment and in the recipe's comments, a run of two processes."""
    kinds = {path.relative_to(stopped.folder).parts[0] for path, _ in texts(stopped.folder)}
    assert kinds >= {"recipe.yaml", "metrics.jsonl", "report.html", "scores.json", "tb", "export"}
    for path, data in [*texts(stopped.folder), (Path("logs"), stopped.logs.encode())]:
        for name, value in SECRETS.items():
            assert value.encode() not in data, (path, name)
            assert zlib.compress(value.encode()) not in data, (path, name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base.model", f"https://me:{TOKEN}@huggingface.co/owner/name"),
        ("base.model", f"https://huggingface.co/owner/name?token={TOKEN}"),
        ("base.model", "https://me:pa55word@example.org/owner/name"),
        ("base.revision", TOKEN),
        ("data.source", f"hf://{TOKEN}@datasets/owner/name"),
        ("evaluate.negative_prompt", f"no {TOKEN}"),
        ("name", TOKEN),
        ("train.nothing_of_that_name", TOKEN),
    ],
)
def test_a_recipe_with_one_is_refused_without_saying_it(
    typed: Typed,
    tree: Callable[..., Tree],
    written: Callable[[Tree], Path],
    tmp_path: Path,
    key: str,
    value: str,
) -> None:
    """Fault 20: in the file it has its line, in an override its key; neither is repeated."""
    recipe = written(tree())
    command = ["train", recipe, "--out", tmp_path / "run"]
    told = typed(*command, f"{key}={value}")
    told.refusal(key, "take it out; tokens are read from HF_TOKEN")
    section, _, name = key.rpartition(".")
    inside = f"\n  {name}: '{value}'" if section else f" '{value}'"
    recipe.write_text(f"extends: other.yaml\n{section or name}:{inside}\n")
    (tmp_path / "other.yaml").write_text(written_text(tree))
    in_file = typed(*command)
    in_file.refusal(f"{recipe}:{3 if section else 2}: {key}: holds ")
    for said in (told, in_file):
        assert TOKEN not in said.out + said.err
        assert "pa55word" not in said.out + said.err
    assert not (tmp_path / "run").exists()


def written_text(tree: Callable[..., Tree]) -> str:
    from tunekit.recipe import dump_yaml, recipe_from

    return dump_yaml(recipe_from(tree()))


def test_the_value_of_a_secret_variable_is_one(
    typed: Typed,
    tree: Callable[..., Tree],
    written: Callable[[Tree], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 20: whatever it looks like; the name of the variable is told."""
    recipe = written(tree())
    monkeypatch.setenv("TRACKER_API_KEY", "a-plain-word")
    told = typed("validate", recipe, "evaluate.negative_prompt=a-plain-word")
    told.refusal("evaluate.negative_prompt: holds the value of $TRACKER_API_KEY")
    assert "a-plain-word" not in told.err


@pytest.mark.parametrize("words", [["generate", "--base"], ["info"], ["validate"], ["inspect"]])
def test_no_refusal_repeats_one(typed: Typed, words: list[str]) -> None:
    """Fault 20: other verbs that are given one."""
    more = ["--prompt", "x"] if words[0] == "generate" else []
    told = typed(*words, f"https://me:{TOKEN}@example.org/x", *more)
    told.refusal("[removed]")
    assert TOKEN not in told.err


def test_ordinary_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing a recipe for a word of it would be worse than the leak it guards against."""
    for text in (
        "runs/hf_character", "sk-learn", "a key in a lock, token of love", "owner/name@main",
        "s3://bucket/key", "https://example.org/a?b=c", "hf_xlabs-ai-pictures", "AKIAzorp",
        "/mnt/secrets/pictures", "ghp_", "me@example.org",
    ):  # fmt: skip
        assert secret_in(text) is None, text
    monkeypatch.setenv("SECRETS_MODE", "disabled")
    assert secret_in("disabled") is None
    for text in (TOKEN, f"x {TOKEN} y", "https://a:b@c/d", "https://c/d?api_key=e1f2"):
        assert secret_in(text), text
        assert "[removed]" in without_secrets(text)
