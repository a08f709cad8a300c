"""Folders of pictures for the tests of tunekit.data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tunekit.schema import Data

Lines = list[dict[str, Any] | str]


@pytest.fixture
def data() -> Callable[..., Data]:
    """Return a maker of the recipe's data section for a folder."""

    def make(source: Path, **changes: Any) -> Data:
        return Data(**{"source": str(source), "trigger": "zorp", "class": "robot", **changes})

    return make


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a one-coloured picture of a size under tmp_path/pictures."""

    def save(
        name: str, colour: Any = (10, 200, 30), size: tuple[int, int] = (64, 64), mode: str = "RGB"
    ) -> Path:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
        return path

    return save


@pytest.fixture
def metadata(tmp_path: Path) -> Callable[[Lines], None]:
    """Return a function that writes tmp_path/pictures/metadata.jsonl; text lines as they are."""

    def write(lines: Lines) -> None:
        text = "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
        )
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")

    return write
