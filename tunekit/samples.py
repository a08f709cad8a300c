"""The pictures a run draws, each kept in its folder under who drew it, the prompt and the seed."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.evaluation.measure import picture_name
from tunekit.evaluation.report import Timeline
from tunekit.pictures import grid, save_png

if TYPE_CHECKING:
    from PIL.Image import Image
    from pydantic import JsonValue

    from tunekit.evaluation.measure import Pair, Question
    from tunekit.inference import DrawSettings, Painter

BEFORE_AFTER = "before-after.png"
SAMPLE_PROMPTS = 2  # samples in training show that something happens; the evaluation judges


class InTurn:
    """Painters of which one is in memory: each is made when it draws, and the one before goes."""

    def __init__(self) -> None:
        self._make: Callable[[], Painter] | None = None
        self._painter: Painter | None = None

    def of(self, make: Callable[[], Painter]) -> Callable[[], Painter]:
        """Return what gives the painter that `make` makes."""

        def painter() -> Painter:
            if self._painter is None or self._make is not make:
                self._painter = None
                gc.collect()
                self._painter, self._make = make(), make
            return self._painter

        return painter


class Samples:
    """Draws into a folder, always with the same settings; `timelines` is what training showed.

    most: how many prompts samples show; None: all.
    """

    def __init__(
        self,
        folder: Path,
        question: Question,
        drawing: DrawSettings,
        most: int | None = SAMPLE_PROMPTS,
    ) -> None:
        self.folder = folder
        self.drawing = drawing
        self.prompts = [question.told(prompt) for prompt in question.prompts[:most]]
        self.seed = question.seeds[0]
        self.timelines = [Timeline(prompt, self.seed, []) for prompt in self.prompts]

    def draw(self, painter: Painter, who: str, prompt: str, seed: int) -> Image:
        """Draw one picture and keep it."""
        drawn = next(painter.draw_many([prompt], [seed], self.drawing))
        save_png(drawn.image, self.folder / picture_name(who, prompt, seed), drawn.settings)
        return drawn.image

    def at_step(self, painter: Painter, step: int) -> Image:
        """Draw the first prompts with the model as it is at `step`; return them as a grid."""
        who = f"step-{step:06d}"
        pictures = [self.draw(painter, who, prompt, self.seed) for prompt in self.prompts]
        for timeline, picture in zip(self.timelines, pictures, strict=True):
            timeline.pictures.append((step, picture))
        sheet = grid(pictures, len(pictures), self.prompts)
        about: dict[str, JsonValue] = {
            "prompts": [*self.prompts],
            "seeds": [self.seed],
            "step": step,
        }
        save_png(sheet, self.folder / f"{who}.png", about)
        return sheet

    def along(self, painter: Painter) -> None:
        """Draw what `at_step` draws and keep nothing, beside the process that keeps it."""
        for prompt in self.prompts:
            next(painter.draw_many([prompt], [self.seed], self.drawing))

    def recall(self, last: int) -> None:
        """Take up what a run drew up to step `last`, before it was stopped, from its folder."""
        from PIL import Image

        for sheet in sorted(self.folder.glob("step-*.png")):
            if not (found := re.fullmatch(r"step-(\d+)", sheet.stem)):
                continue  # a single picture, and not the grid of a step
            step = int(found[1])
            for timeline in self.timelines:
                path = self.folder / picture_name(sheet.stem, timeline.prompt, timeline.seed)
                if step <= last and path.exists():
                    with Image.open(path) as picture:
                        timeline.pictures.append((step, picture.convert("RGB")))

    def shows(self, step: int) -> bool:
        """Return whether pictures of `step` are among the timelines'."""
        return all(step in dict(line.pictures) for line in self.timelines)

    def before_after(self, pairs: Sequence[Pair]) -> Path:
        """Keep one picture to show around: the base above, what was trained below, a seed each."""
        shown = [pair for pair in pairs if pair.seed == self.seed]
        images = [*(pair.before for pair in shown), *(pair.after for pair in shown)]
        labels = [*(pair.plain for pair in shown), *(pair.told for pair in shown)]
        path = self.folder / BEFORE_AFTER
        save_png(grid(images, len(shown), labels), path, {"prompts": [*labels], "seed": self.seed})
        return path

    def drawer(
        self, painter: Callable[[], Painter], who: str, tick: Callable[[str], None]
    ) -> Callable[[str, int], Image]:
        """Return (prompt, seed) -> picture, drawn by what `painter` gives and kept under `who`."""

        def draw(prompt: str, seed: int) -> Image:
            picture = self.draw(painter(), who, prompt, seed)
            tick(prompt)
            return picture

        return draw
