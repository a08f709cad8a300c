"""Any picture file to RGB pixels, by one documented conversion, and from there to the model's size.

The conversion, in this order (each step that changed anything is noted):

1. Formats: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, told by content and not by name. A header that
   declares 100 million pixels or more is refused before anything is decoded.
2. Several pictures in a file (animations, multi-page TIFF, phone MPO): the first.
3. The EXIF orientation is applied.
4. 16 bits a channel become 8: grey by v / 257 rounded, colour by its high byte (Pillow's decoder).
   32-bit integers and floats are refused, since nothing says which value is white.
5. A colour profile other than sRGB is converted to sRGB (perceptual intent); without a profile
   CMYK is converted by Pillow's plain formula. A profile that cannot be used is noted.
6. Palette, black and white, and grey become RGB. Transparency (alpha, or a colour marked
   transparent) is laid over a background colour, white unless another is asked for; the alpha
   itself is kept beside it.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from tunekit.data.buckets import Fit, cover
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .dib .tif .tiff .avif".split()
)
UNREADABLE_SUFFIXES = frozenset(
    ".heic .heif .jxl .jp2 .j2k .psd .svg .eps .ico .tga .exr .hdr .raw .dng .cr2 .nef .arw".split()
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF")  # JPEG opens MPO as well
PIXEL_LIMIT = 100_000_000
_COLOURS = {"grey": "#808080"}  # CSS's; white and black mean the same everywhere
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "YCbCr", "CMYK"})
_ALPHA_MODES = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_TURNED = range(2, 9)  # EXIF orientations; 1 is as it stands
_KINDS = {
    "1": "black and white (1 bit)",
    "L": "grey",
    "LA": "grey",
    "La": "grey",
    "P": "colours of a palette",
    "PA": "colours of a palette",
    "YCbCr": "YCbCr",
}
_KNOWN_CONTENT = (
    (b"<!doctype", "a web page (HTML) and not a picture: download the picture itself"),
    (b"<html", "a web page (HTML) and not a picture: download the picture itself"),
    (b"<svg", "an SVG drawing: render it to PNG first"),
    (b"<?xml", "an XML file and not a picture"),
    (b"version https://git-lfs", "a Git LFS pointer and not the picture: run git lfs pull"),
    (b"%!ps", "a PostScript file: convert it to PNG first"),
)


class PictureError(UserError):
    """A picture file that cannot be used; the message does not repeat the file's name."""


@dataclass(frozen=True)
class Picture:
    """RGB pixels of a file, and what the conversion had to change.

    alpha: mode L, of the image's size, white where it is solid; None where the file has none.
    """

    image: Image.Image
    notes: tuple[str, ...]
    alpha: Image.Image | None = None


def open_rgb(path: Path, background: str = "white") -> Image.Image:
    """Return the picture at `path` in mode RGB, converted as this module's page says.

    background: as for `decode`. Raises PictureError, naming the file.
    """
    try:
        return decode(path, background).image
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error


def decode(path: Path, background: str = "white") -> Picture:
    """Decode the file at `path` wholly and convert it to RGB.

    background: the colour under transparent parts: a name such as white, grey or black, or
    ``#rrggbb``. Raises PictureError where the file is missing, empty, truncated, no picture, or too
    large, or holds so many pixels that there is no memory for them.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise PictureError("an empty file (0 bytes)")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                image, alpha, notes = _decoded(opened, background)
        except PictureError:
            raise
        except MemoryError as error:
            raise PictureError(
                "there is not enough memory to decode it: make it smaller"
            ) from error
        except UnidentifiedImageError:
            raise PictureError(_what_else(data)) from None
        except Image.DecompressionBombError as error:
            raise PictureError(_too_many_pixels(str(error))) from None
        except Exception as error:  # hostile bytes make decoders raise anything; each is a fault
            raise PictureError(f"broken: {error or type(error).__name__}") from error
    for warning in said:
        # Our own limit stands in for Pillow's warning about large pictures.
        if not issubclass(warning.category, Image.DecompressionBombWarning):
            notes.append(f"Pillow says: {warning.message}")
    return Picture(image, tuple(dict.fromkeys(notes)), alpha)


def _decoded(
    opened: Image.Image, background: str
) -> tuple[Image.Image, Image.Image | None, list[str]]:
    width, height = opened.size
    if width * height >= PIXEL_LIMIT:
        raise PictureError(_too_large(width * height, f"{width}x{height} is "))
    notes = []
    frames = getattr(opened, "n_frames", 1)
    if frames > 1:
        notes.append(f"holds {frames} pictures (animation or pages): the first is used")
        opened.seek(0)
    # Pillow hands 16-bit colour over as 8-bit; only the decoder's arguments still tell.
    deep = any(";16" in str(tile.args) for tile in getattr(opened, "tile", ()))
    opened.load()
    image: Image.Image = opened
    orientation = image.getexif().get(0x0112, 1)
    if orientation in _TURNED:
        image = ImageOps.exif_transpose(image)
        notes.append("turned as its EXIF orientation says")
    elif orientation != 1:
        notes.append(f"its EXIF orientation, {orientation}, means nothing: not turned")
    if deep or image.mode.startswith("I;16"):
        notes.append("16 bits a channel, reduced to 8")
    return *_to_rgb(image, background, notes), notes


def _to_rgb(
    image: Image.Image, background: str, notes: list[str]
) -> tuple[Image.Image, Image.Image | None]:
    """Return the picture in RGB and, where it has transparency, its alpha."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode not in _PLAIN_MODES | _ALPHA_MODES:
        raise PictureError(
            f"pixels of kind {image.mode} (32-bit or not RGB) have no defined white: save it as "
            "8-bit or 16-bit PNG"
        )
    see_through = image.has_transparency_data
    if image.mode in _KINDS:
        notes.append(f"{_KINDS[image.mode]}, converted to RGB")
    if image.mode in ("P", "PA") or see_through:
        image = image.convert("RGBA" if see_through else "RGB")
    if profile:
        image = _to_srgb(image, profile, notes)
    if image.mode == "CMYK":
        notes.append("CMYK, converted by the plain formula for want of a profile that fits")
    if not see_through:
        return image.convert("RGB"), None
    alpha = image.getchannel("A")
    if alpha.getextrema() != (255, 255):
        notes.append(f"transparent parts laid over {background}")
    colour = ImageColor.getrgb(_COLOURS.get(background, background))
    under = Image.new("RGBA", image.size, (*colour[:3], 255))
    return Image.alpha_composite(under, image).convert("RGB"), alpha


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Convert RGB, RGBA and CMYK by their colour profile; alpha is kept."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if "srgb" in name.lower():
            return image
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.append(f"its colour profile cannot be used ({error}): colours taken as they stand")
        return image
    assert converted is not None  # only in-place conversion returns None
    notes.append(f'converted to sRGB from the colour profile "{name}"')
    return converted


def _too_large(pixels: int, what: str = "") -> str:
    return (
        f"{what}{pixels / 1e6:,.0f} million pixels, refused before decoding; the limit is "
        f"{PIXEL_LIMIT // 1_000_000} million: make it smaller"
    )


def _too_many_pixels(said: str) -> str:
    """Return our own words for Pillow's, whose limit is another one."""
    size = re.search(r"\((\d+) pixels\)", said)
    if size:
        return _too_large(int(size.group(1)))
    return f"refused before decoding: more than {PIXEL_LIMIT // 1_000_000} million pixels"


def _what_else(data: bytes) -> str:
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, meaning in _KNOWN_CONTENT:
        if start.startswith(magic):
            return meaning
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('latin-1').upper()} cannot be read: convert it to PNG or JPEG"
    return "not a picture, or its beginning is broken (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF are)"


def pixel_hash(image: Image.Image) -> str:
    """Return the sha256 (hex) of an RGB picture's size and pixels: the same for a file renamed or
    saved again without loss."""
    assert image.mode == "RGB"
    width, height = image.size
    digest = hashlib.sha256(f"RGB {width}x{height}\n".encode())
    for top in range(0, height, 256):  # in strips, so that no second copy of it all is made
        digest.update(image.crop((0, top, width, min(top + 256, height))).tobytes())
    return digest.hexdigest()


def plan_fit(width: int, height: int, size: int, place: float = 0.5) -> Fit:
    """Return the square of the short side's length that is cut from a picture of width x height.

    place: 0..1, where along the long side: 0 left or top, 0.5 the middle, 1 right or bottom.
    """
    return cover(width, height, (size, size), place)


def fit(image: Image.Image, size: int, place: float = 0.5) -> Image.Image:
    """Scale the short side of `image` to `size` pixels and cut the long side (Lanczos).

    A picture that has the size already is returned with its pixels untouched. For `place` see
    plan_fit.
    """
    return apply_fit(image, plan_fit(image.width, image.height, size, place))


def apply_fit(image: Image.Image, plan: Fit) -> Image.Image:
    """Return the part of `image` that `plan` names, scaled to its width and height (Lanczos)."""
    size = (plan.width, plan.height)
    return image.resize(size, Image.Resampling.LANCZOS, box=plan.box)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture as a float32 tensor [3, H, W] in -1..1."""
    import numpy as np
    import torch

    assert image.mode == "RGB"
    values = torch.from_numpy(np.array(image))
    return values.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1).contiguous()
