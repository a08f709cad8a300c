"""The comparison of methods: its recipes are valid, and its page tells what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "methods.json"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return benchmarks/method_rows.py, which is a program's part and no package's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import method_rows

    return method_rows


@pytest.fixture
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MEASURED.read_text())["rows"]
    return found


def test_every_method_is_a_valid_recipe_and_no_two_are_the_same(rows: ModuleType) -> None:
    seen = [method.load().model_dump(exclude={"name"}) for method in rows.METHODS.values()]
    assert all(one not in seen[:place] for place, one in enumerate(seen))
    assert len({method.title for method in rows.METHODS.values()}) == len(seen)


def test_the_page_tells_what_was_measured(rows: ModuleType, measured: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert rows.written(page, measured) == page, "python benchmarks/methods.py --only lora"


def test_what_is_expected_is_judged_by_the_numbers(rows: ModuleType) -> None:
    def all_at(share: float) -> dict[str, Any]:
        run = {"likeness": {"closed": share}, "diversity": share}
        return {key: {"runs": [run]} for key in rows.METHODS}

    nothing, everything = all_at(0.0), all_at(1.0)
    for expectation in rows.EXPECTED:
        assert set(expectation.needs) <= set(rows.METHODS)
        met, told = expectation.judge(nothing)
        assert told
        if len(expectation.needs) == 1:
            assert not met, expectation.text
            assert expectation.judge(everything)[0], expectation.text


def test_several_seeds_are_told_by_their_mean_and_their_spread(rows: ModuleType) -> None:
    runs = [{"likeness": {"closed": share}} for share in (0.7, 0.8, 0.9)]
    assert rows.closed({"runs": runs}) == pytest.approx(80.0)
    assert rows.spread({"runs": runs}) == " \N{PLUS-MINUS SIGN} 10"
    assert rows.spread({"runs": runs[:1]}) == ""
