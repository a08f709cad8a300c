"""The words of a picture: {trigger} and {class} in templates and captions."""

from __future__ import annotations

import re

from tunekit.errors import UserError, did_you_mean

PLACEHOLDERS = ("trigger", "class")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def fill(template: str, trigger: str, class_noun: str) -> str:
    """Return `template` with ``{trigger}`` and ``{class}`` replaced; ``{{`` and ``}}`` are braces.

    Where a value is empty, the space it would leave doubled goes with it: with an empty trigger,
    "a {trigger} {class}" becomes "a robot".

    Raises UserError for an unknown placeholder or a single brace, so that no caption is trained
    with a typing error in it.
    """
    values = {"trigger": trigger, "class": class_noun}

    def replacement(match: re.Match[str]) -> str:
        whole, name = match.group(0), match.group(1)
        if whole in ("{{", "}}"):
            return whole[0]
        if name in values:
            return values[name]
        if name is None:
            raise UserError(f'single "{whole}" in "{template}"; write "{whole * 2}" for a brace')
        raise UserError(
            f'unknown placeholder "{whole}" in "{template}"{did_you_mean(name, PLACEHOLDERS)}; '
            f'there are {{trigger}} and {{class}}, and "{{{{" is a brace'
        )

    filled = _BRACES.sub(replacement, template)
    if trigger and class_noun:
        return filled
    return re.sub(r" {2,}", " ", filled).strip()
