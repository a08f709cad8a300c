"""Encoders that turn pictures and words into unit vectors, so that likeness is a cosine.

Each loads from a folder or a Hub id through transformers, safetensors only, or is the bundled one
(``toybox``). Pictures are resized, cropped and normalised here from ``preprocessor_config.json``,
not by transformers: its fast path needs torchvision, its slow path differs from it by a few
levels of grey, and the same picture must score the same on every machine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tunekit.errors import UserError
from tunekit.modelfolder import loading

if TYPE_CHECKING:
    import torch
    from PIL import Image

BATCH = 16  # fixed: a score must not depend on how much memory the machine has


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its pictures: resize, centre crop, scale, normalise.

    ``size`` is the shortest edge in pixels, or (height, width); ``crop`` is (height, width).
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Preprocessing:
        """Read a ``preprocessor_config.json`` (ViT, CLIP, SigLIP, DINO, ConvNeXt kinds).

        Raises UserError for a step that is asked for and not known here: skipping it in silence
        would give numbers that look right and are not.
        """
        for key in ("do_pad", "do_reduce_labels", "do_split_image", "do_flip_channel_order"):
            if config.get(key):
                raise UserError(f"{where}: {key} is set, which tunekit cannot do")
        size = _size(config.get("size"), where) if config.get("do_resize", True) else None
        crop: tuple[int, int] | None = None
        if config.get("do_center_crop", False):
            edges = _size(config.get("crop_size"), where)
            crop = (edges, edges) if isinstance(edges, int) else edges
        percent = config.get("crop_pct")
        if percent and isinstance(size, int) and size < 384:  # ConvNeXt's rule for small pictures
            crop, size = (size, size), int(size / float(percent))
        normalise = config.get("do_normalize", True)
        rescale = config.get("do_rescale", True)
        return cls(
            size=size,
            crop=crop,
            resample=int(config.get("resample", 3)),
            factor=float(config.get("rescale_factor", 1 / 255)) if rescale else 1.0,
            mean=tuple(config.get("image_mean") or (0.5,) * 3) if normalise else (0.0,) * 3,
            std=tuple(config.get("image_std") or (0.5,) * 3) if normalise else (1.0,) * 3,
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """One picture as the encoder's input, [3, H, W]."""
        import numpy as np
        import torch

        image = image.convert("RGB")
        if isinstance(self.size, int):
            scale = self.size / min(image.size)
            width, height = (max(self.size, round(edge * scale)) for edge in image.size)
            image = image.resize((width, height), self.resample)
        elif self.size is not None:
            image = image.resize((self.size[1], self.size[0]), self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels * self.factor - mean) / std


def _size(value: Any, where: str) -> int | tuple[int, int]:
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return int(value["shortest_edge"])
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    raise UserError(
        f"{where}: size {value!r} is not a number, a shortest_edge, or a height and a width"
    )


class ImageEncoder:
    """Pictures to unit vectors with any transformers vision model.

    The vector is the model's projected picture embedding if it has one (CLIP), else its pooled
    output, else the class token (DINO, whose published weights carry no pooler).
    """

    what: ClassVar[str] = "picture encoder"

    def __init__(self, model: Any, preprocessing: Preprocessing, source: str, pooler: bool) -> None:
        self.model = model
        self.preprocessing = preprocessing
        self.source = source
        self._pooler = pooler

    @classmethod
    def load(cls, source: str, device: torch.device | str = "cpu") -> Self:
        """Load from a folder or a Hub id; ``toybox`` is the bundled one.

        Raises UserError when there is no such model, when it has no safetensors file, or when
        weights are missing: randomly filled layers would give confident, meaningless scores.
        """
        place = cls.bundled() if source == "toybox" else source
        where = f"{cls.what} {place!r}"
        model, pooler = _load_model(place, where)
        return cls(model.to(device), _load_preprocessing(place, where), source, pooler)

    @classmethod
    def bundled(cls) -> str:
        """Return the folder that ``toybox`` stands for."""
        raise UserError(f"there is no bundled {cls.what}")

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit rows [N, D] for N pictures of any sizes, float32 on the CPU."""
        return self._embed(images, self._features)

    def texture(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit rows [N, 2 C]: mean and standard deviation of the C first features.

        Over all places of the first hidden state: what a picture is drawn with, not what is where.
        """
        return self._embed(images, self._statistics)

    def _embed(
        self, images: Sequence[Image.Image], features: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        import torch

        assert images, "nothing to embed"
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = [self.preprocessing(image) for image in images[start : start + BATCH]]
                rows.append(features(torch.stack(batch).to(self.device)).float().cpu())
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1)

    def _outputs(self, pixels: torch.Tensor, **wanted: bool) -> Any:
        if hasattr(self.model, "get_image_features"):
            return self.model.get_image_features(pixel_values=pixels, **wanted)
        return self.model(pixel_values=pixels, **wanted)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        output = self._outputs(pixels)
        embedding = getattr(output, "image_embeds", None)
        if embedding is None and self._pooler:
            embedding = getattr(output, "pooler_output", None)
        if embedding is None:
            hidden: torch.Tensor = output.last_hidden_state
            embedding = hidden[:, 0] if hidden.dim() == 3 else hidden.mean(dim=(2, 3))
        flat: torch.Tensor = embedding.flatten(1)
        return flat

    def _statistics(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        first = self._outputs(pixels, output_hidden_states=True).hidden_states[0]
        # Feature maps [B, C, H, W] or tokens [B, T, C] to places [B, P, C].
        places = first.flatten(2).transpose(1, 2) if first.dim() == 4 else first
        return torch.cat([places.mean(dim=1), places.std(dim=1)], dim=1)


class SubjectEncoder(ImageEncoder):
    """Tells individuals apart; DINO's part in DreamBooth (Ruiz et al., CVPR 2023, section 4.2)."""

    what = "subject encoder"

    @classmethod
    def bundled(cls) -> str:
        """Return the bundled encoder, trained to tell the pocket world's individuals apart."""
        from tunekit import toybox

        return str(toybox.subject_encoder_path())


class Clip(ImageEncoder):
    """Pictures and words in one space (CLIP, Radford et al., ICML 2021)."""

    what = "CLIP"

    def __init__(self, model: Any, preprocessing: Preprocessing, source: str, pooler: bool) -> None:
        super().__init__(model, preprocessing, source, pooler)
        if not hasattr(model, "get_text_features"):
            raise UserError(
                f"evaluate.clip: {source!r} is a {type(model).__name__}, which reads no words; "
                "name a CLIP or SigLIP model"
            )
        self.tokenizer = _load_tokenizer(
            self.bundled() if source == "toybox" else source, f"CLIP {source!r}"
        )

    @classmethod
    def bundled(cls) -> str:
        """Return the bundled CLIP, trained on the pocket world."""
        from tunekit import toybox

        return str(toybox.clip_path())

    @property
    def longest(self) -> int:
        """The most tokens a text may have, begin and end included."""
        config = getattr(self.model.config, "text_config", self.model.config)
        return int(config.max_position_embeddings)

    def fits(self, text: str) -> bool:
        """Return whether the model reads the whole text."""
        return len(self.tokenizer(text)["input_ids"]) <= self.longest

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise UserError for a text longer than the model reads: cut off, it would mislead."""
        for text in texts:
            if not self.fits(text):
                raise UserError(
                    f"evaluate.prompts: {text!r} is longer than the {self.longest} tokens that "
                    f"evaluate.clip {self.source!r} reads; shorten it or name another CLIP"
                )

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit rows [N, D] for N texts; raises UserError for one that is too long."""
        import torch

        self.check_texts(texts)
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.longest, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            rows = self.model.get_text_features(**tokens).pooler_output
        return torch.nn.functional.normalize(rows.float().cpu(), dim=-1)


def _load_model(source: str, where: str) -> tuple[Any, bool]:
    """Return the model in evaluation mode and whether its pooler is trained."""
    import torch
    import transformers

    safe = {"trust_remote_code": False}
    with loading(where), quiet():
        config = transformers.AutoConfig.from_pretrained(source, **safe)
        named = (config.architectures or [""])[0]
        # AutoModel would drop the projection of a CLIPVisionModelWithProjection.
        auto = getattr(transformers, named) if named.endswith("WithProjection") else None
        model, found = (auto or transformers.AutoModel).from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,  # whatever the file holds: a score is not to hang on it
            **safe,
        )
        model = model.float()  # whatever the files hold: scores are compared to three digits
    lost = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    pooler = not any("pooler" in key for key in lost)
    lost = {key for key in lost if "pooler" not in key}
    if lost:
        raise UserError(
            f"{where} lacks {len(lost)} of its weights, such as {min(lost)}: "
            "its scores would mean nothing; use a complete model"
        )
    return model.eval().requires_grad_(False), pooler


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' loading bar and its remarks: what matters is checked here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _load_preprocessing(source: str, where: str) -> Preprocessing:
    from transformers.utils.hub import cached_file

    name = "preprocessor_config.json"
    try:
        path = cached_file(source, name)
    except OSError as error:
        raise UserError(f"{where} has no {name}, so how to show it pictures is unknown") from error
    assert path is not None
    with loading(f"{where}: {name}"):
        config = json.loads(Path(path).read_text("utf-8"))
        return Preprocessing.from_config(config, f"{where}: {name}")


def _load_tokenizer(source: str, where: str) -> Any:
    import transformers

    with loading(f"{where}: its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
