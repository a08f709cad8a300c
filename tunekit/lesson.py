"""What an adapter was taught, as the metadata of its files says it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.redaction import without_secrets

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_TAGS = 2000
_THUMBNAIL = 256  # pixels, the longer edge


@dataclass(frozen=True)
class Lesson:
    """What an adapter was taught, for the metadata of its files.

    pictures: how many. step: after how many steps it was made, which may be fewer than the run
    took. tags: parts of captions between commas, and in how many pictures each is. digest: SHA-256
    of what the pictures are. thumbnail: a picture to show the file by.
    """

    pictures: int | None = None
    step: int | None = None
    tags: Mapping[str, int] = field(default_factory=dict)
    digest: str | None = None
    thumbnail: Image | None = None

    @classmethod
    def of(
        cls,
        captions: Iterable[Sequence[str]],
        manifest: Mapping[str, Any],
        step: int,
        thumbnail: Image | None = None,
    ) -> Lesson:
        """Return the lesson of pictures: the captions of each, what a run says of them all."""
        each = [{tag.strip() for one in held for tag in one.split(",")} for held in captions]
        tags = Counter(tag for held in each for tag in sorted(held) if tag)
        told = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
        return cls(len(each), step, tags, hashlib.sha256(told).hexdigest(), thumbnail)

    def facts(self, name: str) -> dict[str, str]:
        """Return the metadata that says it, as sd-scripts does. name: of the pictures' folder."""
        said = {}
        if self.pictures is not None:
            said["ss_num_train_images"] = str(self.pictures)
            said["ss_dataset_dirs"] = json.dumps({name: {"img_count": self.pictures}})
        if self.step is not None:
            said["ss_steps"] = str(self.step)
        if self.tags:
            most = sorted(self.tags.items(), key=lambda one: (-one[1], one[0]))[:_MOST_TAGS]
            counted = {without_secrets(tag): count for tag, count in most}
            said["ss_tag_frequency"] = json.dumps({name: counted}, ensure_ascii=False)
            if len(self.tags) > len(most):
                said["tunekit.tags"] = f"the {len(most)} most frequent of {len(self.tags)}"
        if self.digest is not None:
            said["tunekit.data"] = self.digest
        if self.thumbnail is not None:
            said["modelspec.thumbnail"] = _data_url(self.thumbnail)
        return said


def _data_url(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    held = io.BytesIO()
    small.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def hashes(path: Path) -> dict[str, str]:
    """Return the metadata that tells a safetensors file's tensors by their SHA-256.

    Of all bytes behind the head, so that the metadata may change: what A1111 and the specification
    know a file by.
    """
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        file.seek(8 + head)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
