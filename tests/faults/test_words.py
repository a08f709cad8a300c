"""Recipes and metadata that are wrong, by mistake or by malice: line, key and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from good import recipe_for
from PIL import Image
from told import Typed

GOOD = recipe_for("toybox")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder with four pictures."""
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number * 50, 20, 30)).save(tmp_path / f"pictures/{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_1e_4_is_a_number(typed: Typed, here: Path) -> None:
    """Fault 12: YAML 1.1 would read text."""
    (here / "r.yaml").write_text(GOOD)
    told = typed("validate", "r.yaml", "--print")
    assert told.code == 0
    assert "learning_rate: 0.0001" in told.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("  seed: !!python/object/apply:os.system ['touch canary']", "train.seed: "),
        ("  seed: !!python/name:os.system", "train.seed: "),
        ("  learning_rate: 1", "train.learning_rate: is written twice (first in line 11)"),
        ("  batchsize: 1", 'train.batchsize: unknown key (did you mean "batch_size"?)'),
        ("  lr: 1", 'train.lr: unknown key (did you mean "learning_rate"?)'),
        ("  steps: many", 'train.steps: must be a whole number, not "many"'),
        ("  steps: '5'", 'train.steps: must be a whole number, not "5" (without the quotes: 5)'),
        ("\tsteps: 5", "holds a tab; YAML is indented with spaces only"),
        ("  <<: {steps: 5}", "merge keys are not read here"),
    ],
    ids=["apply", "name", "twice", "unknown", "synonym", "type", "quoted", "tab", "merge"],
)
def test_yaml_that_is_refused_with_its_line(typed: Typed, here: Path, line: str, says: str) -> None:
    """Fault 12: before a picture is looked at; nothing is written and no canary sings."""
    (here / "r.yaml").write_text(GOOD + line + "\n")
    (said,) = typed("train", "r.yaml", "--out", "run").refusal()
    assert said.startswith("r.yaml:12: ")
    assert says in said
    assert sorted(path.name for path in here.iterdir()) == ["pictures", "r.yaml"]


BAD_LINES = (
    ('{"file_name": "../0.png", "text": "a"}', '".." leads out of the folder'),
    ('{"file_name": "/etc/passwd", "text": "a"}', "an absolute path"),
    ('{"file_name": "link.png", "text": "a"}', "a link that leads out of the folder"),
    ('{"file_name": "0.png", "text": }', "not valid JSON"),
    ('{"file_name": "gone.png", "text": "a"}', "there is no such picture"),
    ('{"file_name": "1.png"}', '"text" is missing'),
    ('{"file_name": "2.png", "text": "a", "mask": "../m.png"}', '".." leads out of the folder'),
)


def test_metadata_that_leads_out_or_is_broken(typed: Typed, here: Path) -> None:
    """Fault 17: every fault at once, each with its line; pictures that no line lists too."""
    (here / "pictures" / "link.png").symlink_to("/etc/hostname")
    text = "".join(f"{line}\n" for line, _ in BAD_LINES)
    (here / "pictures" / "metadata.jsonl").write_text(text)
    (here / "r.yaml").write_text(GOOD)
    told = typed("train", "r.yaml", "--out", "run")
    for number, (_, says) in enumerate(BAD_LINES, 1):
        (line,) = [x for x in told.refusal() if f"metadata.jsonl:{number}: " in x]
        assert says in line, line
    told.refusal("3.png: not listed in metadata.jsonl")
    assert not (here / "run").exists()


@pytest.fixture
def csv(here: Path) -> Callable[[str], None]:
    """Return a function that writes the pictures' metadata.csv, and the recipe."""
    (here / "r.yaml").write_text(GOOD)
    return lambda text: (here / "pictures" / "metadata.csv").write_text(text) and None


def test_the_same_in_csv(typed: Typed, here: Path, csv: Callable[[str], None]) -> None:
    """Fault 17: the other form of metadata, refused alike."""
    csv("file_name,text\n../0.png,a\n0.png,a,b\n1.png,fine\n")
    typed("train", "r.yaml", "--out", "run").refusal(
        'metadata.csv:2: "../0.png": ".." leads out of the folder',
        "metadata.csv:3: 3 cells where the first line names 2",
        "2.png: not listed in metadata.csv",
    )
    assert not (here / "run").exists()
