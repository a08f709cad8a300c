from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tunekit.data.images import (
    PictureError,
    apply_fit,
    decode,
    fit,
    open_rgb,
    pixel_hash,
    plan_fit,
    to_pixels,
)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def noise(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, bands) if bands > 1 else (height, width)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


# What is refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    whole = io.BytesIO()
    noise().save(whole, kind)
    path = tmp_path / "a"
    path.write_bytes(whole.getvalue())
    decode(path)
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    with pytest.raises(PictureError):
        decode(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\n <html><body>", "web page"),
        (b"\xef\xbb\xbf<!doctype html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\x89PNG\r\n\x1a\n", "broken"),
        (b"hello", "not a picture"),
    ],
)
def test_what_is_no_picture_is_told_by_what_it_is(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=says):
        decode(path)


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 5_001), (60_000, 60_000)])
def test_a_huge_header_is_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(*size))
    millions = f"{size[0] * size[1] // 1_000_000:,}"
    says = f"{millions} million pixels, refused before decoding; the limit is 100 million"
    with pytest.raises(PictureError, match=says):
        decode(path)


def test_a_missing_file_and_the_name_in_open_rgb(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"gone\.png: cannot be read \(No such file"):
        open_rgb(tmp_path / "gone.png")


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pixels_without_a_defined_white_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="no defined white"):
        decode(tmp_path / "a.tif")


# What is converted, and said


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (0, 0, 300, 20))  # the top edge; orientation 6 turns it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = decode(tmp_path / "a.jpg")
    assert picture.image.size == (200, 300)
    assert picture.image.getpixel((195, 150)) > (200, 200, 200)
    assert picture.image.getpixel((5, 150)) < (50, 50, 50)
    assert picture.notes == ("turned as its EXIF orientation says",)


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_means_nothing_is_said_and_nothing_is_turned(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / "a.jpg", exif=exif)
    picture = decode(tmp_path / "a.jpg")
    assert picture.image.size == (64, 48)
    assert picture.notes == (f"its EXIF orientation, {orientation}, means nothing: not turned",)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    picture = decode(tmp_path / "a.jpg")
    np.testing.assert_allclose(picture.image.getpixel((8, 8)), (255, 0, 0), atol=3)
    assert "CMYK" in picture.notes[0]


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    picture = decode(tmp_path / f"a.{kind}")
    assert np.asarray(picture.image)[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    assert picture.notes == ("16 bits a channel, reduced to 8", "grey, converted to RGB")


def test_sixteen_bit_colour_is_said(tmp_path: Path) -> None:
    row = struct.pack(">6H", 65535, 0, 32768, 0, 65535, 257)
    body = png_header(2, 1).replace(b"\x08\x02\0\0\0", b"\x10\x02\0\0\0")
    crc = struct.pack(">I", zlib.crc32(body[12:29]))
    data = zlib.compress(b"\0" + row)
    idat = struct.pack(">I", len(data)) + b"IDAT" + data
    idat += struct.pack(">I", zlib.crc32(b"IDAT" + data))
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    (tmp_path / "a.png").write_bytes(body[:29] + crc + idat + end)
    picture = decode(tmp_path / "a.png")
    assert np.asarray(picture.image)[0].tolist() == [[255, 0, 128], [0, 255, 1]]
    assert picture.notes == ("16 bits a channel, reduced to 8",)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png")
    assert np.asarray(picture.image)[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert picture.notes == ("transparent parts laid over white",)
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png").notes == ()


@pytest.mark.parametrize(
    ("background", "seen"),
    [("white", 255), ("black", 0), ("grey", 128), ("#204060", (32, 64, 96))],
)
def test_the_background_under_transparency_can_be_chosen(
    tmp_path: Path, background: str, seen: int | tuple[int, int, int]
) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png", background)
    below = (seen,) * 3 if isinstance(seen, int) else seen
    assert np.asarray(picture.image)[0].tolist() == [[255, 0, 0], list(below)]
    assert picture.notes == (f"transparent parts laid over {background}",)
    assert open_rgb(tmp_path / "a.png", background).getpixel((1, 0)) == below


def test_the_alpha_is_kept_beside_the_picture(tmp_path: Path) -> None:
    image = Image.new("RGBA", (300, 200), (10, 20, 30, 255))
    image.paste((10, 20, 30, 0), (0, 0, 300, 20))  # the top edge; orientation 6 turns it right
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    picture = decode(tmp_path / "a.png")
    assert picture.alpha is not None
    assert (picture.alpha.mode, picture.alpha.size) == ("L", (200, 300))
    assert (picture.alpha.getpixel((195, 150)), picture.alpha.getpixel((5, 150))) == (0, 255)
    image.convert("RGB").save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png").alpha is None


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(decode(tmp_path / "a.png").image)[0].tolist() == [[0, 0, 255], [255] * 3]
    image.save(tmp_path / "b.png")
    picture = decode(tmp_path / "b.png")
    assert np.asarray(picture.image)[0].tolist() == [[0, 0, 255], [0, 255, 0]]
    assert picture.notes == ("colours of a palette, converted to RGB",)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = decode(path)
    assert picture.image.getpixel((8, 8)) == (255, 0, 0)
    assert "holds 3 pictures" in picture.notes[0]


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("1", "black and white (1 bit)"),
        ("L", "grey"),
        ("LA", "grey"),
        ("P", "colours of a palette"),
    ],
)
def test_grey_and_palette_modes_are_converted_and_said(
    tmp_path: Path, mode: str, what: str
) -> None:
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png")
    assert (picture.image.mode, picture.image.getpixel((1, 1))) == ("RGB", (255, 255, 255))
    assert picture.notes == (f"{what}, converted to RGB",)


def test_a_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    image.save(tmp_path / "wrong.png", icc_profile=lab)
    image.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert decode(tmp_path / "srgb.png").notes == ()
    for name in ("wrong.png", "broken.png"):
        picture = decode(tmp_path / name)
        assert picture.image.getpixel((0, 0)) == (200, 100, 50)
        assert "profile cannot be used" in picture.notes[0]
    # An sRGB profile under another name whose red and blue are exchanged.
    body = bytearray(srgb)
    red, blue = body.index(b"rXYZ"), body.index(b"bXYZ")
    body[red : red + 4], body[blue : blue + 4] = b"bXYZ", b"rXYZ"
    other = bytes(body).replace("sRGB".encode("utf-16-be"), "Bent".encode("utf-16-be"))
    image.save(tmp_path / "other.png", icc_profile=other)
    picture = decode(tmp_path / "other.png")
    assert picture.image.getpixel((0, 0))[2] > picture.image.getpixel((0, 0))[0]
    assert "converted to sRGB" in picture.notes[0]


# Sizes and pixels


def test_fit_scales_the_short_side_and_cuts_the_long_one() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    # As in scaling the whole, the pixels next to the cut have their share in the edge.
    assert np.asarray(fit(image, 50)).min() > 230
    assert np.asarray(fit(image, 50, place=0)).max() < 25
    assert np.asarray(fit(image, 50, place=1)).max() < 25
    assert plan_fit(100, 300, 50).scale == 0.5
    assert plan_fit(100, 300, 200).scale == 2


def test_a_picture_of_the_size_keeps_its_pixels() -> None:
    image = noise(64, 64)
    assert fit(image, 64).tobytes() == image.tobytes()


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 64),
    place=st.floats(0, 1),
)
def test_a_fit_lies_inside_the_picture(width: int, height: int, size: int, place: float) -> None:
    plan = plan_fit(width, height, size, place)
    assert 0 <= plan.left < plan.right <= width
    assert 0 <= plan.top < plan.bottom <= height
    assert plan.right - plan.left == plan.bottom - plan.top == min(width, height)
    assert (plan.width, plan.height) == (size, size)
    assert apply_fit(Image.new("RGB", (width, height)), plan).size == (size, size)


def test_to_pixels() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_the_hash_is_of_the_pixels_and_not_of_the_file(tmp_path: Path) -> None:
    image = noise(300, 517)
    for name in ("a.png", "b.bmp", "c.tif"):
        image.save(tmp_path / name)
    hashes = {pixel_hash(open_rgb(tmp_path / name)) for name in ("a.png", "b.bmp", "c.tif")}
    assert len(hashes) == 1
    image.putpixel((299, 516), (0, 0, 0))
    assert pixel_hash(image) not in hashes
    assert pixel_hash(Image.new("RGB", (2, 3))) != pixel_hash(Image.new("RGB", (3, 2)))
