"""Families and adapter kinds are found by their file's name: adding one is adding one file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from tunekit.errors import UserError, did_you_mean

T = TypeVar("T")


def names(package: ModuleType) -> tuple[str, ...]:
    """Return the names registered in `package`: its files but `base` and `_private`, sorted."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(n for n in found if n != "base" and not n.startswith("_")))


def get(package: ModuleType, name: str, contract: type[T], word: str) -> type[T]:
    """Return the class in `package`'s file `name` that fulfils `contract`.

    `word` says what is looked for in the UserError that an unknown name raises.
    """
    known = names(package)
    if name not in known:
        raise UserError(
            f'there is no {word} "{name}"{did_you_mean(name, known)}; there is: {", ".join(known)}'
        )
    module = importlib.import_module(f"{package.__name__}.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, contract)
        and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define exactly one {contract.__name__}"
    return own[0]
