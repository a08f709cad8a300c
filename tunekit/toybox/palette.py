"""The words of the toybox world and their colours, shared by captions, renderer and judges."""

from __future__ import annotations

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (247, 137, 31),
    "yellow": (250, 212, 50),
    "green": (56, 158, 66),
    "blue": (38, 98, 214),
    "purple": (128, 54, 176),
    "pink": (247, 136, 186),
    "black": (34, 34, 40),
    "white": (248, 248, 248),
    "brown": (122, 74, 38),
}

PLACES: tuple[str, ...] = (
    "beach",
    "forest",
    "city",
    "snow",
    "night",
    "desert",
    "room",
    "underwater",
)

STYLES: tuple[str, ...] = ("flat", "pixel art", "watercolour", "outline", "neon", "crayon")

# A style the renderer can draw and pretraining never shows: the bundled style subject.
UNSEEN_STYLE = "papercut"

SIZES: tuple[str, ...] = ("small", "medium", "big")
POSITIONS: tuple[str, ...] = ("left", "middle", "right")
ACCESSORIES: tuple[str, ...] = ("hat", "scarf")
PATTERNS: tuple[str, ...] = ("plain", "spots", "stripes", "patch")

INK: RGB = (38, 34, 48)
PAPER: RGB = (250, 246, 236)
WHITE: RGB = (252, 252, 252)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Blend two colours: `share` 0 gives `a`, 1 gives `b`; channels 0..255."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def _shades() -> dict[str, tuple[tuple[str, ...], RGB]]:
    found: dict[str, tuple[tuple[str, ...], RGB]] = {}
    circle = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
    for number, one in enumerate(circle):
        other = circle[(number + 1) % len(circle)]
        found[f"{one}-{other}"] = found[f"{other}-{one}"] = (
            (one, other),
            mix(COLOURS[one], COLOURS[other], 0.5),
        )
        found[f"pale {one}"] = (one,), mix(COLOURS[one], WHITE, 0.5)
        found[f"dark {one}"] = (one,), mix(COLOURS[one], INK, 0.45)
    return found


# Colours between the named ones: the words, the named colours they are made of, the colour.
SHADES = _shades()
