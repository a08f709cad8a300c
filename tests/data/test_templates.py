from __future__ import annotations

import pytest

from tunekit.data.captions import fill
from tunekit.data.templates import LISTS, named
from tunekit.schema_data import TEMPLATE_LISTS


def test_every_list_a_recipe_may_name_is_there() -> None:
    assert set(LISTS) == set(TEMPLATE_LISTS)


@pytest.mark.parametrize("name", TEMPLATE_LISTS)
def test_every_template_teaches_the_trigger_beside_its_class(name: str) -> None:
    templates = named(name)
    assert len(set(templates)) == len(templates) > 1
    for template in templates:
        assert "zorp robot" in fill(template, "zorp", "robot")


def test_what_is_no_lists_name_is_a_template() -> None:
    assert named("a {trigger}") == ("a {trigger}",)
    assert named(("a {trigger}", "dreambooth")) == ("a {trigger}", "dreambooth")
