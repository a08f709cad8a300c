"""Fixtures that many tests share. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch is imported: one thread a process (pytest -n starts several), and threads that sleep
# while they wait, because spinning ones bring a shared machine to a standstill.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test may lean on the network, or on what an earlier run left in the Hub's cache.
os.environ["HF_HUB_OFFLINE"] = "1"

if TYPE_CHECKING:
    from tunekit.families.base import Family

Load = Callable[..., "Family"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a tiny base's folder by family name and settings, made once.

    Tests may not write in it.
    """
    import tiny

    made: dict[str, Path] = {}

    def folder(family: str = "sd", **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in made:
            made[key] = tiny.BUILDERS[family](tmp_path_factory.mktemp(family), **settings)
        return made[key]

    return folder


@pytest.fixture
def load_tiny(tiny_folder: Callable[..., Path]) -> Load:
    """Return a function that loads a tiny base afresh: by family, dtype, and builder settings."""
    from tunekit import families
    from tunekit.schema import Base

    def load(family: str = "sd", dtype: Any = "fp32", **settings: Any) -> Family:
        return families.load(Base(model=str(tiny_folder(family, **settings)), dtype=dtype))

    return load
