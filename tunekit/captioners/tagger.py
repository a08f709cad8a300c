"""Captions of tags by an ONNX model of the WD14 kind, as model.onnx with selected_tags.csv.

Needs onnxruntime, which `pip install "tunekit[tagger]"` brings.
"""

from __future__ import annotations

import csv
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tunekit.captioners.base import Captioner, Said, Wishes
from tunekit.errors import UserError
from tunekit.modelfolder import loading
from tunekit.section import Section

if TYPE_CHECKING:
    import torch
    from PIL import Image

MODEL, TAGS = "model.onnx", "selected_tags.csv"
_GENERAL, _CHARACTER = 0, 4  # the file's categories; 9 is the rating, which is no part of a caption


@dataclass(frozen=True)
class Tag:
    """What one of the model's outputs means, as it stands in captions."""

    words: str
    category: int


class Tagger(Captioner):
    """Names what a tagger finds, likeliest first."""

    class Options(Section):
        """What can be set as KEY=VALUE."""

        model: str = Field(
            min_length=1,
            description="Folder with model.onnx and selected_tags.csv, or a Hub id such as "
            "SmilingWolf/wd-vit-tagger-v3.",
        )
        revision: str | None = Field(
            None, min_length=1, description="Branch, tag or commit on the Hub; null: main."
        )
        threshold: float = Field(
            0.35, gt=0, lt=1, description="Least confidence of a general tag, 0 to 1."
        )
        character_threshold: float = Field(
            0.85, gt=0, lt=1, description="Least confidence of a named character, 0 to 1."
        )
        exclude: tuple[str, ...] = Field(
            (),
            strict=False,
            description="Tags that are left out, such as what makes the subject itself.",
        )

    def __init__(self, session: Any, tags: list[Tag], options: Options) -> None:
        self.session = session
        self.tags = tags
        self.options = options
        self.edge = self._edge()

    @classmethod
    def load(cls, options: Options, wishes: Wishes, device: torch.device) -> Tagger:
        """Load model and tags; UserError where onnxruntime or one of them is missing."""
        try:
            runtime: Any = importlib.import_module("onnxruntime")
        except ModuleNotFoundError as error:
            raise UserError(
                f'this captioner needs {error.name}: pip install "tunekit[tagger]"'
            ) from None
        paths = {name: _find(options, name) for name in (MODEL, TAGS)}
        tags = _read_tags(paths[TAGS])
        wanted = ["CPUExecutionProvider"]
        if device.type == "cuda":
            wanted.insert(0, "CUDAExecutionProvider")
        providers = [name for name in wanted if name in runtime.get_available_providers()]
        try:
            session = runtime.InferenceSession(str(paths[MODEL]), providers=providers)
        except Exception as error:  # its fifteen kinds of error have no base but this
            raise UserError(f"{paths[MODEL]}: cannot be loaded: {_line(error)}") from None
        tagger = cls(session, tags, options)
        known = {tag.words for tag in tags}
        unknown = sorted(set(map(_words, options.exclude)) - known)
        if unknown:
            raise UserError(f"exclude: the model has no tag {', '.join(unknown)}")
        if wishes.class_noun:
            tagger.notes = (
                "a tagger cannot be asked to leave out what makes the subject itself: name those "
                "tags, exclude=[TAG, TAG]",
            )
        return tagger

    def describe(self, image: Image.Image) -> Said:
        """Return the tags that are sure enough, characters first."""
        import numpy as np

        given = self.session.get_inputs()[0].name
        scores = self.session.run(None, {given: self._pixels(image)})[0][0]
        out = {_words(tag) for tag in self.options.exclude}
        sure: dict[int, list[str]] = {_CHARACTER: [], _GENERAL: []}
        least = {_CHARACTER: self.options.character_threshold, _GENERAL: self.options.threshold}
        for place in np.argsort(-scores, kind="stable"):
            tag = self.tags[int(place)]
            if tag.category in sure and scores[place] >= least[tag.category]:
                sure[tag.category].append(tag.words)
        return Said(", ".join(t for tags in sure.values() for t in tags if t not in out))

    def _edge(self) -> int:
        """Return the edge of the model's pictures; UserError for a model of another kind."""
        shape = self.session.get_inputs()[0].shape
        outputs = self.session.get_outputs()[0].shape
        edge = shape[1] if len(shape) == 4 and shape[3] == 3 else None
        if not isinstance(edge, int) or shape[2] != edge:
            raise UserError(
                f"{MODEL} takes pictures as {shape}; a tagger of the WD14 kind takes "
                "[1, edge, edge, 3]"
            )
        if isinstance(outputs[-1], int) and outputs[-1] != len(self.tags):
            raise UserError(
                f"{MODEL} scores {outputs[-1]} tags and {TAGS} names {len(self.tags)}: the files "
                "do not belong together"
            )
        return edge

    def _pixels(self, image: Image.Image) -> Any:
        """Return the picture as the model was trained on them: [1, edge, edge, 3], BGR, 0..255."""
        import numpy as np
        from PIL import Image

        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((self.edge, self.edge), Image.Resampling.BICUBIC)
        return np.asarray(square, dtype=np.float32)[None, :, :, ::-1].copy()


def _find(options: Any, name: str) -> Path:
    folder = Path(options.model).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise UserError(f"model {options.model}: has no {name}")
        return folder / name
    if folder.exists() or options.model.count("/") != 1 or options.model.startswith((".", "/")):
        raise UserError(f"model {options.model}: there is no such folder, and it is no Hub id")
    from huggingface_hub import hf_hub_download

    with loading(f"model {options.model}: {name}"):
        return Path(hf_hub_download(options.model, name, revision=options.revision))


def _read_tags(path: Path) -> list[Tag]:
    tags = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                tags.append(Tag(_words(row["name"]), int(row["category"])))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        line = f":{len(tags) + 2}" if tags else ""
        raise UserError(
            f"{path}{line}: a table with the columns name and category is needed ({_line(error)})"
        ) from None
    if not tags:
        raise UserError(f"{path}: names no tags")
    return tags


def _words(tag: str) -> str:
    """Return a tag in plain words: "red_hat" is "red hat", while a face such as "^_^" stays."""
    return tag.replace("_", " ") if re.search(r"[^\W_]{2}", tag) else tag


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
