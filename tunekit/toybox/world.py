"""The toybox world: scenes of subjects in places and styles, drawn and captioned from a seed.

A scene is plain data; the same scene always gives the same picture and, with the same seed, the
same caption. The world can draw any individual again in another place, size, pose or style.
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from tunekit.toybox import places, subjects
from tunekit.toybox.brush import Brush
from tunekit.toybox.canvas import SIDE, Layer, compose
from tunekit.toybox.palette import (
    ACCESSORIES,
    COLOURS,
    PATTERNS,
    PLACES,
    POSITIONS,
    RGB,
    SHADES,
    SIZES,
    STYLES,
    WHITE,
    mix,
)

Rng = np.random.Generator


@dataclass(frozen=True)
class Vocabulary:
    """The words a world is made of; a smaller vocabulary is a smaller world."""

    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    styles: tuple[str, ...]


FULL = Vocabulary(tuple(subjects.DRAW), tuple(COLOURS), PLACES, STYLES)
# What the bundled denoiser was taught so far (see docs/toybox.md); CLIP and VAE know FULL.
CORE = Vocabulary(FULL.subjects[:10], FULL.colours[:8], FULL.places[:5], FULL.styles[:3])


@dataclass(frozen=True)
class Individual:
    """One particular subject: what stays the same wherever it is drawn."""

    subject: str
    colour: str
    accent: str = ""  # a colour word, or "" for a lighter shade of the main colour
    pattern: str = "plain"
    wide: float = 1.0  # width in proportion to height, 0.85..1.15
    eye: float = 1.0  # eye size, 0.85..1.25
    main_rgb: RGB | None = None  # a colour no word names
    accent_rgb: RGB | None = None

    def colours(self) -> tuple[RGB, RGB]:
        """Main and accent colour, 0..255."""
        main = self.main_rgb or COLOURS[self.colour]
        light = mix(main, WHITE, 0.55)
        return main, self.accent_rgb or (COLOURS[self.accent] if self.accent else light)


@dataclass(frozen=True)
class Figure:
    """An individual in a pose: where it stands, how big, which way, what it wears."""

    who: Individual
    size: str = "medium"
    position: str = "middle"
    mirror: bool = False
    tilt: float = 0.0  # radians
    jitter: tuple[float, float] = (0.0, 0.0)  # picture units
    accessory: str = ""
    accessory_colour: str = ""


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; `seed` moves trees, stars and paper grain."""

    figures: tuple[Figure, ...]
    place: str
    style: str
    seed: int = 0

    def attributes(self) -> tuple[str, str, str, str]:
        """Subject, colour, place and style of the first figure: what judges are asked about."""
        who = self.figures[0].who
        return who.subject, who.colour, self.place, self.style

    def as_dict(self) -> dict[str, object]:
        """Plain data, for files."""
        return asdict(self)


def held_out(attributes: tuple[str, str, str, str]) -> bool:
    """Whether this combination is kept out of all pretraining (one in ten, by its hash)."""
    return hashlib.sha256("|".join(attributes).encode()).digest()[0] % 10 == 0


def sample_individual(rng: Rng, words: Vocabulary) -> Individual:
    """Draw a random individual: six in ten are plain, the others carry marks no caption names."""
    pattern = "plain" if rng.random() < 0.6 else str(rng.choice(PATTERNS[1:]))
    colour = str(rng.choice(words.colours))
    others = [c for c in COLOURS if c != colour]
    accent = str(rng.choice(others)) if pattern != "plain" and rng.random() < 0.5 else ""
    return Individual(
        str(rng.choice(words.subjects)),
        colour,
        accent,
        pattern,
        round(float(rng.uniform(0.88, 1.12)), 3),
        round(float(rng.uniform(0.9, 1.2)), 3),
    )


def sample_odd_individual(rng: Rng, words: Vocabulary) -> Individual:
    """Draw an individual in colours that no word names: any hue, so that judges meet them."""

    def paint() -> RGB:
        r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.4, 1.0))
        return round(255 * r), round(255 * g), round(255 * b)

    known = sample_individual(rng, words)
    return replace(known, colour="", accent="", main_rgb=paint(), accent_rgb=paint())


def sample_marked_individual(rng: Rng, words: Vocabulary) -> Individual:
    """Draw an individual whose marks have words: six in ten a pattern, one in four a shade."""
    known = sample_individual(rng, words)
    pattern = "plain" if rng.random() < 0.4 else str(rng.choice(PATTERNS[1:]))
    accent = ""
    if pattern != "plain" and rng.random() < 0.8:
        accent = str(rng.choice([c for c in COLOURS if c != known.colour]))
    known = replace(known, pattern=pattern, accent=accent)
    shades = [shade for shade, (parts, _) in SHADES.items() if {*parts} <= {*words.colours}]
    if rng.random() >= 0.25:
        return known
    shade = str(rng.choice([s for s in shades if accent not in SHADES[s][0]]))
    return replace(known, colour=shade, main_rgb=SHADES[shade][1])


def sample_pose(rng: Rng, who: Individual, words: Vocabulary, dressed: float = 0.15) -> Figure:
    """Put an individual into a random pose; `dressed` is the chance of an accessory, 0..1."""
    accessory = colour = ""
    if who.subject in subjects.ANCHORS and rng.random() < dressed:
        accessory = str(rng.choice(ACCESSORIES))
        colour = str(rng.choice([c for c in words.colours if c != who.colour]))
    return Figure(
        who,
        str(rng.choice(SIZES, p=[0.2, 0.45, 0.35])),
        str(rng.choice(POSITIONS, p=[0.2, 0.6, 0.2])),
        bool(rng.random() < 0.5),
        round(float(rng.normal(0, 0.05)), 3),
        (round(float(rng.uniform(-0.02, 0.02)), 3), round(float(rng.uniform(-0.02, 0.02)), 3)),
        accessory,
        colour,
    )


def sample_scene(rng: Rng, words: Vocabulary = FULL, pairs: float = 0.08) -> Scene:
    """Draw a random scene; `pairs` is the chance of two subjects, 0..1."""
    first = sample_pose(rng, sample_individual(rng, words), words)
    figures: tuple[Figure, ...] = (first,)
    if rng.random() < pairs:
        second = sample_pose(rng, sample_individual(rng, words), words, dressed=0.0)
        size = "small" if rng.random() < 0.5 else "medium"
        figures = (
            replace(first, position="left", size=size, accessory="", accessory_colour=""),
            replace(second, position="right", size=size),
        )
    return Scene(
        figures,
        str(rng.choice(words.places)),
        str(rng.choice(words.styles)),
        int(rng.integers(1 << 31)),
    )


def sample_training_scene(rng: Rng, words: Vocabulary = FULL, pairs: float = 0.08) -> Scene:
    """Like `sample_scene`, but never one of the combinations kept out of pretraining."""
    while True:
        scene = sample_scene(rng, words, pairs)
        if not any(
            held_out((f.who.subject, f.who.colour, scene.place, scene.style)) for f in scene.figures
        ):
            return scene


def sample_marked_scene(rng: Rng, words: Vocabulary = FULL) -> Scene:
    """Draw a scene of one marked individual, in no combination kept out of pretraining.

    A shade is kept out wherever one of its colours is, and shades wear nothing: the caption of all
    that is to be told would be longer than the text encoder reads.
    """
    while True:
        who = sample_marked_individual(rng, words)
        pose = sample_pose(rng, who, words, dressed=0.0 if who.colour in SHADES else 0.15)
        place, style = str(rng.choice(words.places)), str(rng.choice(words.styles))
        parts, _ = SHADES.get(who.colour, ((who.colour,), None))
        if not any(held_out((who.subject, part, place, style)) for part in parts):
            return Scene((pose,), place, style, int(rng.integers(1 << 31)))


_SCALE = {"small": 0.23, "medium": 0.3, "big": 0.38}
_X = {"left": 0.27, "middle": 0.5, "right": 0.73}


def _paint(figure: Figure, style: str) -> Layer:
    layer = Layer(style, is_figure=True)
    main, accent = figure.who.colours()
    scale = _SCALE[figure.size]
    brush = Brush(
        layer,
        min(max(_X[figure.position], scale + 0.02), 0.98 - scale) + figure.jitter[0],
        # everything stands on the same ground, whatever its size
        0.88 - scale + figure.jitter[1],
        scale,
        figure.who.wide,
        figure.mirror,
        figure.tilt,
        main,
        accent,
        figure.who.pattern,
        figure.who.eye,
    )
    subjects.DRAW[figure.who.subject](brush)
    if figure.accessory:
        crown, neck = subjects.ANCHORS[figure.who.subject]
        where = crown if figure.accessory == "hat" else neck
        subjects.WEAR[figure.accessory](brush, where, COLOURS[figure.accessory_colour])
    return layer


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels (drawn large, then reduced)."""
    background = Layer(scene.style, is_figure=False)
    places.DRAW[scene.place](background, np.random.default_rng(scene.seed))
    picture = compose(
        scene.style, background, [_paint(f, scene.style) for f in scene.figures], scene.seed
    )
    if size == SIDE:
        return picture
    return picture.resize(
        (size, size), Image.Resampling.BOX if SIDE % size == 0 else Image.Resampling.LANCZOS
    )


PLACE_WORDS: Mapping[str, Sequence[str]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach"),
    "forest": ("in the forest", "in a forest", "among the trees of a forest"),
    "city": ("in the city", "in a city", "on a city street"),
    "snow": ("in the snow", "on the snow", "in the snowy mountains, snow everywhere"),
    "night": ("at night", "in the night", "under the stars at night"),
    "desert": ("in the desert", "in a desert"),
    "room": ("in a room", "in the room", "at home in a room"),
    "underwater": ("underwater", "deep underwater"),
}
STYLE_WORDS: Mapping[str, Sequence[str]] = {
    "flat": ("flat style", "flat", "flat illustration"),
    "pixel art": ("pixel art", "pixel art style"),
    "watercolour": ("watercolour", "watercolour style", "watercolour painting"),
    "outline": ("outline", "outline style", "outline drawing"),
    "neon": ("neon", "neon style"),
    "crayon": ("crayon", "crayon style", "crayon drawing"),
}


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _marks(rng: Rng, who: Individual, told: float) -> str:
    """The individual's pattern in words: "blue stripes", "a patch"."""
    words = [who.accent, who.pattern] if who.accent and rng.random() < told else [who.pattern]
    return _article(" ".join(words)) if who.pattern == "patch" else " ".join(words)


def _noun(rng: Rng, figure: Figure, told: float, marks: float) -> str:
    words = [figure.who.subject]
    if figure.who.colour and rng.random() < told:
        words.insert(0, figure.who.colour)
    plain = figure.who.pattern == "plain"
    # nothing is drawn for a chance of 0: captions without marks stay what they were
    marked = marks > 0 and rng.random() < (marks / 3 if plain and told < 1 else marks)
    if marked and plain:
        words.insert(0, "plain")
    if figure.size != "medium" and rng.random() < 0.6:
        words.insert(0, figure.size)
    extras = [_marks(rng, figure.who, told)] if marked and not plain else []
    if figure.accessory:
        extras.append(_article(f"{figure.accessory_colour} {figure.accessory}"))
    phrase = _article(" ".join(words))
    return f"{phrase} with {' and '.join(extras)}" if extras else phrase


def caption(scene: Scene, rng: Rng, complete: bool = False, marks: float = 0.0) -> str:
    """Describe a scene as a person would, in varied words.

    One caption in about seven leaves an attribute out; `complete` names all four. `marks` is the
    chance that the pattern of a lone figure is told as well, 0..1 ("plain" less often, unless
    `complete`); in pairs it never is.
    """
    told = 1.0 if complete else 0.95
    one = len(scene.figures) == 1
    what = " and ".join(_noun(rng, f, told, marks if one else 0.0) for f in scene.figures)
    if one and scene.figures[0].position != "middle" and rng.random() < 0.5:
        what += f" on the {scene.figures[0].position}"
    where = str(rng.choice(PLACE_WORDS[scene.place])) if rng.random() < told else ""
    style = str(rng.choice(STYLE_WORDS[scene.style])) if rng.random() < told else ""
    if not where and not style:
        return what
    body = f"{what} {where}".strip()
    if not style:
        return body if rng.random() < 0.5 else f"a picture of {body}"
    form = int(rng.integers(4))
    if form == 0:
        return f"{style}, {body}"
    if form == 1 and style.endswith(("drawing", "painting", "illustration", "art")):
        return f"{_article(style) if not style.endswith('art') else style} of {body}"
    if form == 2:
        return f"{body} in {style}" if not style.endswith("style") else f"{body} in a {style}"
    return f"{body}, {style}"
