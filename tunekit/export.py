"""Adapter files in a client's layout, each verified through that client's own loading code.

A file gets its name only after it was loaded into a fresh pipeline and did there what the trained
model does. One that fails is kept beside it as ``*.rejected``, so that nobody takes it for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import families, modelcard
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.data.captions import expand, fill
from tunekit.errors import UserError
from tunekit.loading import VerificationError, read_by_diffusers
from tunekit.verification import Parity, compare, make_probe, measure
from tunekit.wholefile import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.recipe import Recipe

CARD = "README.md"
_PENDING = ".unverified"
_REJECTED = ".rejected"


class ExportError(UserError):
    """An exported file failed a check; the message names the check and where the file is kept."""


@dataclass(frozen=True)
class ExportedFile:
    """A verified adapter file.

    parity: what verification measured on it. diffusers: whether diffusers' own loader reads it;
    where not, `tunekit.load` does.
    """

    path: Path
    layout: str
    dtype: str
    tensors: int
    bytes: int
    sha256: str
    parity: Parity
    diffusers: bool


def export_adapter(
    family: Family,
    adapter: Adapter,
    recipe: Recipe,
    out_dir: Path,
    *,
    pictures: int | None = None,
    scores: Mapping[str, str] | None = None,
) -> list[ExportedFile]:
    """Write what `adapter` learned in every layout of `recipe.export`, verified, and a model card.

    family: the base with `adapter` still attached; it draws and trains on as before. pictures: how
    many taught it, for the metadata. scores: printed in the card (see `write_card`).

    Raises ExportError where a file fails its verification, and UserError where a layout cannot
    carry the adapter or the disk refuses. Files of an earlier export keep their names until theirs
    are replaced by verified ones.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    resolution = (*recipe.data.resolutions, family.default_resolution)[0]
    done = []
    for layout in recipe.adapter.layouts(recipe.export.layouts):
        tensors, described = adapter.export_state(layout)
        path = out_dir / f"{recipe.name}-{layout}.safetensors"
        cast = cast_tensors(tensors, recipe.export.dtype, path.name)
        metadata = modelcard.file_metadata(
            recipe, family.facts(), described, resolution, count=pictures
        )
        parity = _write_verified(path, cast, metadata, recipe, (family, adapter))
        done.append(
            ExportedFile(
                path=path,
                layout=layout,
                dtype=recipe.export.dtype,
                tensors=len(cast),
                bytes=path.stat().st_size,
                sha256=sha256(path),
                parity=parity,
                diffusers=read_by_diffusers(cast),
            )
        )
    write_card(recipe, done, resolution, scores)
    return done


def write_card(
    recipe: Recipe,
    files: list[ExportedFile],
    resolution: int,
    scores: Mapping[str, str] | None = None,
) -> Path:
    """Write the model card beside exported files and return its path; an older one is replaced.

    resolution: edge of the pictures in pixels. scores: names and values to print, once known.
    """
    described = [(f.path.name, f"{f.layout} layout, {f.dtype}, verified") for f in files]
    path = files[0].path.parent / CARD
    card = modelcard.model_card(recipe, described, resolution, scores, files[0].diffusers)
    write_whole(path, card)
    return path


def cast_tensors(tensors: Mapping[str, Tensor], dtype: str, name: str) -> dict[str, Tensor]:
    """Return `tensors` in `dtype` ("fp32", "fp16" or "bf16").

    Raises ExportError, naming the tensor, for NaN and for numbers the format cannot hold.
    """
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cast = {}
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ExportError(
                f"{name}: {key} holds NaN or infinite numbers: the training broke down; "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )
        # Numbers that stand for the strength of many others, and a magnitude, of which a small part
        # was learned: both are few, and rounding them would move a whole module.
        whole = key.endswith(".alpha") or "magnitude_vector" in key
        cast[key] = tensor.to(torch.float32 if whole else kind)
        if not bool(cast[key].isfinite().all()):
            raise ExportError(
                f"{name}: {key} reaches {float(tensor.abs().max()):g}, more than {dtype} can hold; "
                "set export.dtype: fp32 or bf16"
            )
    return cast


def _write_verified(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    recipe: Recipe,
    trained: tuple[Family, Adapter],
) -> Parity:
    pending = path.with_name(f"{path.stem}{_PENDING}{path.suffix}")
    write_safetensors(pending, tensors, metadata)
    try:
        _read_back(pending, tensors, metadata)
        parity = verify(pending, recipe, *trained)
    except VerificationError as fault:
        rejected = path.with_name(f"{path.name}{_REJECTED}")
        pending.replace(rejected)
        raise ExportError(f"{path}: {fault}; the file is kept as {rejected.name}") from fault
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    pending.replace(path)
    path.with_name(f"{path.name}{_REJECTED}").unlink(missing_ok=True)
    return parity


def _read_back(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise VerificationError where the disk holds anything else than what was written."""
    read, said = read_safetensors(path)
    if read.keys() != tensors.keys() or said != dict(metadata):
        raise VerificationError("read back", "names or metadata differ from what was written")
    for key, tensor in tensors.items():
        if read[key].dtype != tensor.dtype or not read[key].equal(tensor):
            raise VerificationError("read back", f"{key} differs from what was written")


def verify(path: Path, recipe: Recipe, trained: Family, adapter: Adapter) -> Parity:
    """Load the file at `path` into a fresh base, as `tunekit.loading` does, and compare.

    trained: the recipe's base with the trained `adapter` attached. Raises VerificationError, naming
    the first check that fails: every tensor of the file taken up, every module's weights changed as
    trained, the prediction equal within the formats' precision, and different from the base's.
    """
    fresh = families.load(recipe.base, trained.device)
    probe = make_probe(fresh, _probe_prompts(recipe), recipe.train.seed)
    reference = measure(trained, adapter, probe)
    return compare(path, fresh, probe, reference, recipe.export.dtype, recipe.base.dtype)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe_prompts(recipe: Recipe) -> list[str]:
    """Return what the pictures are called by default, and a prompt that is drawn for the report."""
    data = recipe.data
    return [
        expand((), data)[0],
        fill(recipe.evaluate.prompts[-1], data.trigger, data.class_noun),
    ]
