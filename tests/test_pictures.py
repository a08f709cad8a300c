"""PNGs that say how they were drawn, and sheets of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tunekit.errors import UserError
from tunekit.pictures import grid, read_settings, readable, save, save_png

SETTINGS = {
    "prompt": "ein zörp, 二",
    "negative_prompt": "blue",
    "seed": 5,
    "steps": 2,
    "guidance_scale": 5.0,
    "scheduler": "ddim",
    "width": 64,
    "height": 32,
    "scale": 1.0,
    "base": "toybox",
    "adapters": [{"name": "zorp.safetensors", "weight": 0.5}],
    "version": "0.1.0",
}


@pytest.fixture
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))


class TestPng:
    def test_settings_and_pixels_come_back(self, picture: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "new" / "one.png"
        save_png(picture, path, SETTINGS)
        assert read_settings(path) == SETTINGS
        with Image.open(path) as read:
            assert read.tobytes() == picture.tobytes()
            assert read.info["parameters"] == readable(SETTINGS)
        assert [p.name for p in path.parent.iterdir()] == ["one.png"]
        umask = os.umask(0)
        os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def test_what_people_read(self) -> None:
        assert readable(SETTINGS) == (
            "ein zörp, 二\nNegative prompt: blue\n"
            "Steps: 2, Sampler: ddim, CFG scale: 5.0, Seed: 5, Size: 64x32, Model: toybox, "
            "Adapter scale: 1.0, Version: 0.1.0, Adapter: zorp.safetensors 0.5"
        )

    def test_a_picture_is_written_whole_or_not_at_all(
        self, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "one.png"
        save_png(picture, path, SETTINGS)
        before = path.read_bytes()

        def full(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=r"one\.png: cannot be written: No space left"):
            save_png(picture, path, SETTINGS | {"seed": 6})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_read_back(self, picture: Image.Image, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            read_settings(tmp_path / "none.png")
        (tmp_path / "text.png").write_text("<html>")
        with pytest.raises(UserError, match="not a picture"):
            read_settings(tmp_path / "text.png")
        picture.save(tmp_path / "bare.png")
        with pytest.raises(UserError, match="holds no settings"):
            read_settings(tmp_path / "bare.png")
        for text in ("{", "[]"):
            info = PngInfo()
            info.add_text("tunekit", text)
            picture.save(tmp_path / "odd.png", pnginfo=info)
            with pytest.raises(UserError, match="are not "):
                read_settings(tmp_path / "odd.png")


class TestGrid:
    def test_rows_and_columns(self) -> None:
        colours = ["red", "green", "blue", "yellow", "black"]
        pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
        sheet = grid(pictures, 2)
        # 64 pixels are enlarged threefold: labels need 160.
        assert sheet.size == (8 + 2 * (192 + 8), 8 + 3 * (192 + 8))
        for place, colour in enumerate(colours):
            at = (8 + place % 2 * 200 + 96, 8 + place // 2 * 200 + 96)
            assert sheet.getpixel(at) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert sheet.getpixel((8 + 200 + 96, 8 + 400 + 96)) == (255, 255, 255)

    def test_pixels_are_enlarged_as_they_are(self, picture: Image.Image) -> None:
        sheet = grid([picture], 1)
        enlarged = np.asarray(sheet)[8 : 8 + 96, 8 : 8 + 192]
        assert np.array_equal(enlarged[1::3, 1::3], np.asarray(picture))

    def test_labels_stay_within_their_cell(self) -> None:
        picture = Image.new("RGB", (160, 160), "red")
        long = "a very long prompt " * 20 + "W" * 300
        for text in (long, "W" * 300, "", "short"):
            sheet = grid([picture, picture], 2, [text, ""])
            right = np.asarray(sheet)[176:, 8 + 160 :]
            assert (right == 255).all(), "the label runs into its neighbour"
            left = np.asarray(sheet)[169:, :168]
            assert (left < 128).any() == bool(text)

    def test_no_more_columns_than_pictures(self) -> None:
        assert grid([Image.new("RGB", (200, 100))], 7).size == (216, 116)


class TestExif:
    """The same in JPEG and WebP."""

    @pytest.mark.parametrize("suffix", [".jpg", ".webp"])
    def test_settings_come_back(self, suffix: str, picture: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / f"one{suffix}"
        save(picture, path, SETTINGS)
        assert read_settings(path) == SETTINGS
        with Image.open(path) as read:
            far = np.abs(np.asarray(read, np.int64) - np.asarray(picture, np.int64))
            comment = read.getexif().get_ifd(0x8769)[0x9286]
        assert far.max() == 0 if suffix == ".webp" else far.mean() < 8
        assert comment == b"UNICODE\0" + readable(SETTINGS).encode("utf-16-be")

    def test_what_there_is_no_room_for(self, picture: Image.Image, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"room for 65000: save it as PNG"):
            save(picture, tmp_path / "one.jpg", SETTINGS | {"prompt": "x" * 40_000})
        assert not list(tmp_path.iterdir())

    def test_what_is_not_ours(self, picture: Image.Image, tmp_path: Path) -> None:
        exif = Image.Exif()
        for number, text in enumerate(
            ("a holiday", "tunekit {", "tunekit []", "tunekit " + "[" * 9000)
        ):
            exif[0x010E] = text
            picture.save(tmp_path / f"{number}.jpg", exif=exif)
            with pytest.raises(UserError, match=r"holds no settings|are not "):
                read_settings(tmp_path / f"{number}.jpg")
        save(picture, tmp_path / "good.jpg", SETTINGS)
        data = (tmp_path / "good.jpg").read_bytes()
        for at in range(0, 400, 3):
            broken = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
            (tmp_path / "broken.jpg").write_bytes(broken)
            with contextlib.suppress(UserError):  # nothing else may come of it
                assert isinstance(read_settings(tmp_path / "broken.jpg"), dict)
