"""`python -m tunekit.toybox.bundle`: draws the two bundled subjects in `datasets/` anew.

Neither was ever in pretraining: the character has a colour and a pattern that no caption names, the
style is one the renderer knows and pretraining never shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tunekit.toybox import world
from tunekit.toybox.palette import UNSEEN_STYLE

SIDE = 256  # pictures are stored larger than the base draws, as a user's would be

ZORP = world.Individual(
    "robot", "teal", "", "zigzag", wide=1.12, eye=1.3, main_rgb=(0, 150, 140),
    accent_rgb=(255, 120, 20),
)  # fmt: skip

# place, style, size, position, mirrored; the last four are held out. Night, snow and watercolour
# are kept from training, so that recipes can ask for places and a style the character never had.
ZORP_SCENES = (
    ("beach", "flat", "big", "middle", False),
    ("forest", "flat", "medium", "left", True),
    ("city", "pixel art", "big", "middle", False),
    ("forest", "pixel art", "medium", "right", True),
    ("city", "flat", "medium", "middle", True),
    ("beach", "pixel art", "medium", "middle", False),
    ("forest", "flat", "big", "middle", False),
    ("beach", "flat", "medium", "right", True),
    ("night", "flat", "big", "middle", False),
    ("snow", "pixel art", "medium", "middle", True),
    ("night", "watercolour", "big", "left", False),
    ("snow", "flat", "medium", "right", True),
)


def _zorp() -> list[tuple[world.Scene, str]]:
    rng = np.random.default_rng(2026)
    told: list[tuple[world.Scene, str]] = []
    for number, (place, style, size, position, mirror) in enumerate(ZORP_SCENES):
        tilt = round(float(rng.normal(0, 0.06)), 3)
        figure = world.Figure(ZORP, size, position, mirror, tilt)
        where = world.PLACE_WORDS[place][0]
        told.append(
            (
                world.Scene((figure,), place, style, number),
                f"a {{trigger}} {{class}} {where}, {style}{' style' if style == 'flat' else ''}",
            )
        )
    return told


def _papercut() -> list[tuple[world.Scene, str]]:
    rng = np.random.default_rng(2027)
    told: list[tuple[world.Scene, str]] = []
    places = [*world.CORE.places] * 4
    for number in range(16):
        subject = world.CORE.subjects[number % len(world.CORE.subjects)]
        colour = world.CORE.colours[(number * 3 + number // 8) % len(world.CORE.colours)]
        figure = world.Figure(
            world.Individual(subject, colour), "big" if number % 3 else "medium",
            mirror=bool(rng.random() < 0.5),
        )  # fmt: skip
        scene = world.Scene((figure,), places[(number * 2) % 5], UNSEEN_STYLE, number)
        where = world.PLACE_WORDS[scene.place][0]
        told.append(
            (scene, f"a {colour} {subject} {where}, krafto style".replace("a orange", "an orange"))
        )
    return told


def _write(folder: Path, pictures: list[tuple[world.Scene, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, text) in enumerate(pictures):
        name = f"{number:02d}.png"
        world.render(scene, SIDE).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main(root: Path = Path("datasets")) -> None:
    """Write `root/zorp` (8 + 4 held out) and `root/krafto` (12 + 4 held out)."""
    zorp, krafto = _zorp(), _papercut()
    _write(root / "zorp" / "train", zorp[:8])
    _write(root / "zorp" / "held_out", zorp[8:])
    _write(root / "krafto" / "train", krafto[:12])
    _write(root / "krafto" / "held_out", krafto[12:])


if __name__ == "__main__":
    main()
