"""An adapter file that grows module by module, in a client's naming, its alpha always right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tunekit
from tunekit import modelcard
from tunekit.changes.joined import Joint, join
from tunekit.errors import UserError
from tunekit.factors import kind_of
from tunekit.files.adapter import Parts
from tunekit.files.names import Names, Place
from tunekit.files.stream import Form, Spool, write
from tunekit.schema import LAYOUTS
from tunekit.wholefile import disk_errors

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor

FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Of the tensors as they were, or of diffusers' way to say alpha: no longer true.
_STALE = (
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "tunekit.trained_alpha",
    "tunekit.rank",
    "tunekit.adapter",
)
# Of one adapter: who it is, and how it was trained. Another one that is made of it has its own.
_OWN = (
    "modelspec.title",
    "modelspec.date",
    "modelspec.thumbnail",
    "ss_output_name",
    "tunekit.recipe",
)
_FACTORS = {
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
}
_SCALED = ("up", "hada_w1_a", "lokr_w2_b", "lokr_w1_b", "lokr_w2")  # the first there takes a scale


@dataclass(frozen=True)
class _Held:
    place: Place
    factors: tuple[str, ...]
    alpha: float | None
    scale: float
    kind: str


class Output:
    """An adapter file in the making. Modules are put aside on the disk until `finish` writes it;
    `with` gives that room back.

    layout: whose naming. dtype: "fp32", "fp16", "bf16"; None: as each tensor is, and fp32 where a
    strength that has to be multiplied in would be rounded otherwise.
    """

    def __init__(self, path: Path, layout: str, names: Names, dtype: str | None) -> None:
        check_options(layout, dtype)
        self.path, self.layout, self.remarks = path, layout, list[str]()
        self._names, self._dtype = names, dtype
        with disk_errors(path):
            self._spool = Spool(path.parent)
        self._held: list[_Held] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._spool.close()

    def refuse(self, kind: str, factors: frozenset[str], source: str) -> None:
        """Raise UserError where the layout cannot carry a kind."""
        plain = (factors - {"alpha", "mid", "magnitude"}) == {"down", "up"}
        if self.layout == "diffusers" and not plain:
            raise UserError(
                f"{source}: holds {kind}, for which diffusers has no loader: write it as kohya, or "
                "make a plain LoRA of it with `tunekit resize`"
            )
        if self.layout == "kohya" and "magnitude" in factors:
            raise UserError(
                f"{source}: holds {kind}, which no client draws as it was trained from kohya's "
                "naming: make a plain LoRA of it with `tunekit resize --base`, or write diffusers"
            )

    def add(self, place: Place, parts: Parts) -> None:
        """Take up a module."""
        magnitude = parts.factors.get("magnitude")
        if self.layout == "diffusers" and magnitude is not None:
            wide = self._names.shape(place)[0]
            if magnitude.numel() != wide or magnitude.shape[0] != wide:
                raise UserError(
                    f"{'.'.join(place)}: has a magnitude for each input, and diffusers reads "
                    "one for each output: make a plain LoRA of it with `tunekit resize --base`"
                )
        for factor, tensor in parts.factors.items():
            with disk_errors(self.path):
                self._spool.add(_key(place, factor), tensor)
        self._held.append(_Held(place, tuple(parts.factors), parts.alpha, parts.scale, parts.kind))

    @property
    def modules(self) -> int:
        """How many modules were taken up."""
        return len(self._held)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file. metadata: all of it; what tells of the tensors is put in here.

        Raises UserError for an empty adapter, numbers that the format cannot hold, and a disk that
        refuses; nothing is left then.
        """
        if not self._held:
            raise UserError(f"{self.path}: nothing would be in it: no module changes")
        common = self._common_alpha()
        forms: dict[str, Form] = {}
        widened = 0
        for name, tensor, asked in self._tensors(common):
            forms[name] = Form.of(tensor)
            widened += asked
        if widened:
            self.remarks.append(
                f"{widened} tensors are held in fp32: a strength is multiplied into them, which "
                "half precision would round; --dtype fp16 does so"
            )
        tensors = ((name, tensor) for name, tensor, _ in self._tensors(common))
        needed = sum(form.bytes for form in forms.values())
        with disk_errors(self.path, needed=needed):
            write(self.path, forms, tensors, self._complete(metadata, common))

    def _common_alpha(self) -> float:
        """Return the alpha that all modules of the file have; what differs goes into a factor.

        diffusers 0.42 reads one alpha of a file for its attention modules, whatever each says.
        """
        ranked = [held for held in self._held if self._rank(held)]
        alphas = Counter(held.alpha for held in ranked if held.alpha)  # 0: changes nothing
        ranks = Counter(float(self._rank(held)) for held in ranked)
        return (alphas or ranks or Counter([1.0])).most_common(1)[0][0]

    def _rank(self, held: _Held) -> int:
        for factor in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if factor in held.factors:
                return self._spool.forms[_key(held.place, factor)].shape[0]
        return 0

    def _tensors(self, common: float) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield name, tensor, and whether its format is wider than it was."""
        joined: dict[str, list[_Held]] = {}
        for held in self._held:
            joint = self._joint(held)
            if joint is None:
                yield from self._single(held, common)
            else:
                joined.setdefault(joint.name, []).append(held)
        for parts in joined.values():
            yield from self._joined(parts)

    def _joint(self, held: _Held) -> Joint | None:
        """Return what sd-scripts joins a plain LoRA's module in, or calls it otherwise."""
        plain = set(held.factors) <= {"down", "up", "diff_b"} and "down" in held.factors
        return self._names.joined(held.place) if self.layout == "kohya" and plain else None

    def _joined(self, parts: list[_Held]) -> Iterator[tuple[str, Tensor, bool]]:
        import torch

        joint = self._joint(parts[0])
        assert joint is not None
        read = {
            held.place[1]: {f: self._spool.read(_key(held.place, f)) for f in held.factors}
            for held in parts
        }
        made, scale = join(joint, read, {held.place[1]: held.scale for held in parts})
        for factor, tensor in made.items():
            key = f"{joint.kohya}.{_FACTORS[self.layout].get(factor, factor)}"
            cast, _ = self._cast(key, tensor, 1.0)
            narrow = max(own[factor].element_size() for own in read.values() if factor in own)
            yield key, cast, cast.element_size() > narrow
        yield f"{joint.kohya}.alpha", torch.tensor(scale * len(made["down"])), False

    def _single(self, held: _Held, common: float) -> Iterator[tuple[str, Tensor, bool]]:
        import torch

        name, rank = self._names.written(self.layout, held.place), self._rank(held)
        # Without a rank there is no alpha: readers multiply with nothing.
        inside = common / rank if self.layout == "kohya" and rank else 1.0
        factor = held.scale / inside
        takes = next((f for f in _SCALED if f in held.factors), None)
        for part in held.factors:
            tensor = self._spool.read(_key(held.place, part))
            key, widened = self._key(held, name, part), False
            if part == "magnitude":
                tensor = self._magnitude(held.place, tensor)
            else:
                scale = factor if part == takes else 1.0
                tensor, widened = self._cast(key, tensor, scale)
            yield key, tensor, widened
        alpha = common if rank else held.alpha
        if self.layout == "kohya" and alpha is not None and "diff" not in held.factors:
            yield f"{name}.alpha", torch.tensor(alpha), False

    def _magnitude(self, place: Place, tensor: Tensor) -> Tensor:
        """Return a magnitude, never rounded, in the shape that the layout's readers look for."""
        ones = [1] * (len(self._names.shape(place)) - 1)
        if self.layout == "kohya":
            each_input = tensor.ndim > 1 and tensor.shape[0] == 1
            return tensor.float().reshape((1, -1, *ones[1:]) if each_input else (-1, *ones))
        return tensor.float().reshape((1, -1, *ones[1:]) if len(ones) > 1 else (-1,))

    def _key(self, held: _Held, name: str, part: str) -> str:
        if part == "magnitude" and self.layout == "diffusers":
            # transformers looks for it under another name than diffusers
            end = "" if held.place[0] == "denoiser" else ".weight"
            return f"{name}.lora_magnitude_vector{end}"
        return f"{name}.{_FACTORS[self.layout].get(part, part)}"

    def _cast(self, key: str, tensor: Tensor, scale: float) -> tuple[Tensor, bool]:
        import torch

        wide = tensor.float() * scale if scale != 1 else tensor
        kind = getattr(torch, FORMATS[self._dtype]) if self._dtype else tensor.dtype
        cast = wide.to(kind)
        widened = False
        if self._dtype is None and scale != 1 and not bool((cast.float() == wide).all()):
            cast, widened = wide, kind != torch.float32
        if not bool(cast.float().isfinite().all()):
            raise UserError(
                f"{self.path}: {key} reaches {float(wide.abs().max()):g}, more than "
                f"{self._dtype or kind} can hold; choose --dtype fp32 or bf16"
            )
        return cast, widened

    def _complete(self, metadata: Mapping[str, str], common: float) -> dict[str, str]:
        ranks = {self._rank(held) for held in self._held} - {0}
        kinds = {held.kind for held in self._held}
        said = {key: text for key, text in metadata.items() if key not in _STALE}
        named = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        said["tunekit.rank"] = named
        if self.layout == "kohya":
            plain = kinds == {"LoRA"}
            said["ss_network_module"] = "networks.lora" if plain else "lycoris.kohya"
            said["ss_network_dim"], said["ss_network_alpha"] = named, str(common)
            if not plain:
                algo = {"whole": "full", "LoRA": "locon"}.get(one := min(kinds), one.lower())
                said["ss_network_args"] = json.dumps({"algo": algo})
        return dict(sorted(said.items()))


def _key(place: Place, factor: str) -> str:
    return f"{'.'.join(place)}/{factor}"


def lora(up: Tensor, down: Tensor) -> Parts:
    """Return a module of a plain LoRA: up @ down as it is, alpha the rank."""
    parts = {"down": down, "up": up}
    return Parts(parts, float(len(down)), kind_of(parts))


def described(
    names: Names, facts: Mapping[str, str], title: str, carried: Mapping[str, str], done: str
) -> dict[str, str]:
    """Return a file's metadata: what it `carried`, completed by what the base says of itself.

    done: what was done to make it, in words.
    """
    said = dict(facts)
    said["modelspec.architecture"] = f"{facts.get('modelspec.architecture', 'unknown')}/lora"
    said |= {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "ss_output_name": title,
        "tunekit.base": modelcard.portable(names.label),
    }
    before = carried.get("tunekit.made_by")
    said |= {key: text for key, text in carried.items() if text}
    note = f"{done} (tunekit {tunekit.__version__})"
    said["tunekit.made_by"] = f"{before}; {note}" if before else note
    return {key: text for key, text in said.items() if text}


def of_another(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what an adapter's metadata says that is true of another one made of it as well."""
    return {key: text for key, text in metadata.items() if key not in _OWN}


def check_options(layout: str, dtype: str | None) -> None:
    """Raise UserError for a layout or number format that there is not."""
    if layout not in LAYOUTS:
        raise UserError(f"--to: {layout} is no layout; there is {' and '.join(LAYOUTS)}")
    if dtype is not None and dtype not in FORMATS:
        raise UserError(f"--dtype: {dtype} is none of {', '.join(FORMATS)}")


def check_out(path: Path, overwrite: bool) -> None:
    """Raise UserError where the file to write is there already, or is no .safetensors name."""
    if path.suffix != ".safetensors":
        raise UserError(f"--out: {path} does not end in .safetensors")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: is there already; --overwrite replaces it")


def kind_dtype(dtype: str) -> torch.dtype:
    """Return torch's number format for "fp32", "fp16" or "bf16"."""
    import torch

    kind: torch.dtype = getattr(torch, FORMATS[dtype])
    return kind
