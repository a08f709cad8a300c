from __future__ import annotations

import subprocess
import sys

import pytest

from tunekit.data.captions import fill
from tunekit.errors import UserError


def test_placeholders_are_filled() -> None:
    assert fill("a {trigger} {class}", "zorp", "robot") == "a zorp robot"
    assert fill("no placeholder", "zorp", "robot") == "no placeholder"
    assert fill("{{trigger}} {trigger}", "zorp", "robot") == "{trigger} zorp"


def test_a_value_is_not_filled_in_again() -> None:
    assert fill("a {trigger}", "{class}", "robot") == "a {class}"


def test_an_empty_value_leaves_no_gap() -> None:
    assert fill("a {trigger} {class}", "", "robot") == "a robot"
    assert fill("{trigger} {class}", "", "robot") == "robot"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("a {triger}", '(did you mean "trigger"?)'),
        ("a {red|blue} {class}", "unknown placeholder"),
        ("a {}", "unknown placeholder"),
        ("a {trigger", 'single "{"'),
        ("a trigger}", 'single "}"'),
    ],
)
def test_a_typing_error_is_refused(template: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        fill(template, "zorp", "robot")
    assert says in str(caught.value)
    assert template in str(caught.value)


def test_filling_loads_neither_pillow_nor_torch() -> None:
    code = (
        "import sys; from tunekit.data.captions import fill; "
        "assert not {'torch', 'PIL', 'numpy', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
