"""Pictures that are none, or lie about themselves; and those that are only unusual."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import png_header
from PIL import Image
from told import Typed

Tree = dict[str, dict[str, Any]]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_all_broken_pictures_at_once(
    typed: Typed, tree: Callable[..., Tree], written: Callable[[Tree], Path], tmp_path: Path
) -> None:
    """Fault 13 and Fault 14: each is listed, none is skipped, and nothing is written."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = saved(Image.linear_gradient("L").convert("RGB"))
    broken = {
        "cut.png": (whole[: len(whole) // 2], "broken"),
        "empty.png": (b"", "an empty file (0 bytes)"),
        "page.png": (b"<!DOCTYPE html><html>404</html>", "a web page (HTML)"),
        "large.png": (png_header(10_000, 10_000), "100 million pixels"),
        "huge.png": (png_header(60_000, 60_000), "3,600 million pixels"),
        "fine.png": (whole, ""),
    }
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
    told = typed("train", written(tree(data={"source": str(folder)})), "--out", tmp_path / "run")
    for name, (_, says) in broken.items():
        lines = [line for line in told.refusal() if name in line]
        assert not says or (len(lines) == 1 and says in lines[0]), (name, lines)
    assert not (tmp_path / "run").exists()


_DECODE = """
import resource, sys
from pathlib import Path
from tunekit.data.images import PictureError, decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        decode(Path(name))
    except PictureError as error:
        assert "refused before decoding" in str(error), error
    else:
        raise AssertionError(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_huge_headers_take_no_memory(tmp_path: Path) -> None:
    """Fault 14: a process that may have no more than a picture of that size would need."""
    paths = []
    for edge in (10_000, 60_000):
        path = tmp_path / f"{edge}.png"
        path.write_bytes(png_header(edge, edge))
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", _DECODE, *paths], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "kilobytes more than before"


def test_a_turned_picture_is_seen_as_it_is_meant(typed: Typed, tmp_path: Path) -> None:
    """Fault 15: EXIF orientation 6 of 300x200 is 200x300, and so is its bucket."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    told = typed("inspect", tmp_path, "--resolution", 64, "--json")
    (found,) = json.loads(told.out)["pictures"]
    assert (found["width"], found["height"]) == (200, 300)


def alpha() -> Image.Image:
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 32, 64))
    return image


KINDS: dict[str, tuple[bytes, tuple[int, int, int], str]] = {
    "cmyk.jpg": (saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), "CMYK"),
    "sixteen.png": (
        saved(Image.fromarray(np.full((64, 64), 257 * 100, np.uint16))),
        (100, 100, 100),
        "16 bits a channel",
    ),
    "palette.png": (
        saved(Image.new("RGB", (64, 64), (9, 99, 199)).quantize(4)),
        (9, 99, 199),
        "palette",
    ),
    "alpha.png": (saved(alpha()), (255, 255, 255), "laid over white"),
    "moving.gif": (
        saved(
            Image.new("RGB", (64, 64), (0, 0, 255)),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (64, 64), (255, 0, 0))],
        ),
        (0, 0, 255),
        "the first is used",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_one_conversion(name: str, tmp_path: Path) -> None:
    """Fault 16: what comes out at the right edge, and that it is told."""
    from tunekit.data.images import decode

    data, colour, told = KINDS[name]
    (tmp_path / name).write_bytes(data)
    picture = decode(tmp_path / name)
    assert picture.image.mode == "RGB"
    seen = picture.image.getpixel((60, 30))
    assert isinstance(seen, tuple)
    assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= 3, seen
    assert any(told in note for note in picture.notes), picture.notes


def test_the_conversion_is_documented() -> None:
    """Fault 16: where a user looks for it."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for word in ("CMYK", "16-bit", "palette", "data.background", "animation"):
        assert word.lower() in page.lower(), word


def test_what_is_transparent_lies_over_the_chosen_colour(tmp_path: Path) -> None:
    """Fault 16: another than white, in pixels and in what is told."""
    from tunekit.data.images import decode

    path = tmp_path / "alpha.png"
    path.write_bytes(saved(alpha()))
    picture = decode(path, "#ff8000")
    assert picture.image.getpixel((60, 30)) == (255, 128, 0)
    assert any("laid over #ff8000" in note for note in picture.notes), picture.notes
