"""The table of faults and the threat model name tests; each of them is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md").read_text()
PAGE = (ROOT / "docs" / "security.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::([\w:]+))?`")


@cache
def known_tests(file: str) -> frozenset[str]:
    """Return the tests of a file, as pytest calls them, without what they are given."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{i.name}" for i in node.body if isinstance(i, ast.FunctionDef)}
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def test_all_twenty_faults_have_tests() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", TABLE, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 21))
    for number, _, shown in rows:
        assert TEST.search(shown), f"fault {number}"


@pytest.mark.parametrize(
    ("file", "test"), sorted({*TEST.findall(TABLE), *TEST.findall(PAGE)}), ids="::".join
)
def test_every_test_that_is_named_is_there(file: str, test: str) -> None:
    assert (ROOT / file).is_file(), file
    assert not test or test in known_tests(file), test


def test_a_test_that_says_its_fault_stands_in_the_row() -> None:
    """`Fault 9: ...` in a docstring leads from a test to the table, and the row back to it."""
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", TABLE, re.MULTILINE))
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        for node in ast.parse(path.read_text()).body:
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if said and node.name.startswith("test_"):  # type: ignore[union-attr]
                for number in re.findall(r"Fault (\d+)", said):
                    assert path.name in rows[number], (number, node.name)  # type: ignore[union-attr]


def test_the_threat_model_speaks_of_every_reader() -> None:
    for word in (
        "recipe", "pictures", "captions", "metadata", "tar", "parquet", "adapter", "new words",
        "base", "judge", "checkpoint", "run's folder", "Hub",
    ):  # fmt: skip
        assert word in PAGE, word
