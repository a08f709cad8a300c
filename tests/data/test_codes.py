"""docs/data.md lists the code of every finding with the severities it can have, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tunekit import sheets

ROOT = Path(__file__).parent.parent.parent
# Which argument is the severity, or which it always is, and which is the code.
MAKERS: dict[str, tuple[int | str, int]] = {
    "Finding": (0, 1),
    "add": (0, 1),
    "note": ("note", 0),
    "fault": ("error", 2),
    "_FaultError": ("error", 0),
}


def literals(node: ast.expr) -> list[str]:
    """Return the texts that an argument can be, none where that is not said in place."""
    if isinstance(node, ast.IfExp):
        return [*literals(node.body), *literals(node.orelse)]
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return [str(node.value)] if is_text and isinstance(node, ast.Constant) else []


def made() -> Iterator[tuple[str, str]]:
    """Yield (code, severity) of the findings made anywhere; severity "" where it is reckoned."""
    yield "source", "error"
    for path in (ROOT / "tunekit").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or len(call.args) < 3:
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            if name not in MAKERS:
                continue
            severity, place = MAKERS[name]
            told = [severity] if isinstance(severity, str) else literals(call.args[severity])
            yield from (
                (code, each) for code in literals(call.args[place]) for each in told or [""]
            )


def listed() -> dict[str, set[str]]:
    """Return the severities of each code in the table."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs/data.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and re.fullmatch(r"(error|warning|note|of the other).*", cells[2]):
            for code in re.findall(r"`([a-z*-]+)`", cells[1]):
                assert code not in found, f"{code} stands twice"
                found[code] = set(cells[2].split(" or "))
    return found


def test_the_table_lists_every_code_with_its_severities() -> None:
    told, severities = listed(), dict[str, set[str]]()
    for code, severity in made():
        severities.setdefault(code, set()).update({severity} - {""})
    patterns = {"held-out-*", "prior-*"}
    assert set(severities) | patterns == set(told)
    assert len(severities) > 40
    wrong = {code: found for code, found in severities.items() if not found <= told[code]}
    assert not wrong


def test_codes_that_are_told_of_other_pictures_are_codes() -> None:
    assert set(sheets._APART) <= set(listed())
