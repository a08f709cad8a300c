"""An adapter file of whoever's making: its modules, their factors and alphas, read one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import embeddings
from tunekit.changes import deltas
from tunekit.changes.joined import Joint, separate
from tunekit.errors import UserError, some
from tunekit.factors import (
    adapter_metadata,
    check_module,
    declared_alpha,
    group,
    is_kohya,
    kind_of,
)
from tunekit.files.names import SOME, Names, Place
from tunekit.files.stream import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

_PEFT_CONFIG = "adapter_config.json"
_CHECKPOINT = "denoiser."  # what only a run's own states say
_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # their first size is the rank
_OF_WEIGHT = ("oft_blocks", "magnitude")
_TUCKER = ("hada_t1", "hada_t2", "lokr_t2")


@dataclass(frozen=True, eq=False)
class Parts:
    """One module's factors, by the names of `tunekit.factors.group`, each in its own format.

    alpha: what the product is multiplied with over the rank; None: nothing. kind: in words.
    """

    factors: Mapping[str, Tensor]
    alpha: float | None
    kind: str

    @property
    def plain(self) -> bool:
        """Whether the weight's change is a low-rank product and nothing else."""
        return self.factors.keys() - {"diff_b"} == {"down", "up"}

    @property
    def needs_weight(self) -> bool:
        """Whether its change depends on the weight that it changes."""
        return any(name in self.factors for name in _OF_WEIGHT)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        rank = next((len(self.factors[name]) for name in _RANKED if name in self.factors), None)
        return self.alpha / rank if rank and self.alpha is not None else 1.0

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return a plain one's up, its strength in it, and down: float32, for a weight of `shape`.

        [out, r] and [r, in], or the kernels [out, r, 1, 1] and [r, in, h, w].
        """
        up, down = self.factors["up"].float() * self.scale, self.factors["down"].float()
        return up.reshape(shape[0], -1, *[1] * (len(shape) - 2)), down.reshape(-1, *shape[1:])

    def change(self, like: Tensor, strength: float = 1.0) -> Tensor:
        """Return what is added to the weight `like`: float32; without its bias's part.

        Where the change does not depend on the weight, only the shape of `like` counts. Raises
        ValueError where they do not fit.
        """
        factors = {name: part for name, part in self.factors.items() if name != "diff_b"}
        return deltas.change(factors, self.alpha, like, strength)


def metadata_of(path: Path) -> dict[str, str]:
    """Return what an adapter file says of itself; UserError for other files, and for new words."""
    words, more = embeddings.contents(path)
    if words:
        what = "an adapter and new words" if more else "new words"
        raise UserError(
            f"{path}: holds {what}, and this works on adapters alone: take the file without words"
        )
    return TensorFile(path).metadata


def beside(path: Path, metadata: Mapping[str, str]) -> Mapping[str, object]:
    """Return what stands beside a file's tensors about alphas: diffusers' way, or PEFT's.

    diffusers writes it into the metadata, PEFT into a file of its own. Raises UserError for JSON
    that is none.
    """
    scales = adapter_metadata(path, metadata)
    config_file = path.with_name(_PEFT_CONFIG)
    if scales or not config_file.is_file() or not path.name.startswith("adapter_model"):
        return scales
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config_file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file}: holds no JSON object")
    return {f"base_model.{key}": value for key, value in config.items()}


class AdapterFile:
    """An adapter file, bound to the modules of a base.

    places: module -> the name it has in the file. layout: whose naming it is in. remarks: what is
    worth telling. Raises UserError for what is no adapter, for tensors and modules that are not
    known (all of them listed), and for files of new words.
    """

    def __init__(self, path: Path, names: Names) -> None:
        self.path, self.names = path, names
        self.metadata = metadata_of(path)
        self._file = TensorFile(path)
        self.remarks: list[str] = []
        grouped, unread = group(dict.fromkeys(self._file.forms))  # type: ignore[arg-type]
        if not grouped:
            first = f" (the first is {unread[0]})" if unread else ""
            raise UserError(
                f"{path}: holds no adapter: none of its {len(unread)} tensors is a factor of one"
                + first
            )
        if unread:
            raise UserError(
                f"{path}: {len(unread)} tensors are no factors of an adapter: {some(unread, SOME)}"
            )
        self._keys = self._by_module()
        self._scales = beside(path, self.metadata)
        self._ranks: dict[Place, int] = {}  # of modules that the file joins with others
        self.places = self._bind()
        self.layout = "kohya" if all(map(is_kohya, self._keys)) else "diffusers"
        ours = "tunekit.version" in self.metadata  # which multiplies it in, and says so
        bare = [name for name in self._keys if self._unsaid(name) and not ours]
        if bare:
            self.remarks.append(
                f"{path}: says no alpha for {len(bare)} modules: taken as their rank, as every "
                "client does"
            )

    def _by_module(self) -> dict[str, dict[str, str]]:
        """Return {module: {factor: key}}; two keys for one factor are refused."""
        found: dict[str, dict[str, str]] = {}
        for key in self._file.forms:
            (module,), (factor,) = (list(x) for x in _sorted(key))
            if factor in found.setdefault(module, {}):
                raise UserError(f"{self.path}: {key} and {found[module][factor]} are one factor")
            found[module][factor] = key
        return found

    def _unsaid(self, name: str) -> bool:
        keys = self._keys[name]
        ranked = any(factor in keys for factor in _RANKED)
        return ranked and "alpha" not in keys and self._alpha_beside(name, 1) is None

    def _alpha_beside(self, name: str, rank: int) -> float | None:
        return declared_alpha(name.replace("base_model.model.", "base_model."), rank, self._scales)

    def _bind(self) -> dict[Place, str]:
        places: dict[Place, str] = {}
        unknown = []
        for name in self._keys:
            found = self._found(name)
            if not found:
                unknown.append(name)
            for place in found:
                if place in places:
                    raise UserError(f"{self.path}: {name} and {places[place]} are one module")
                places[place] = name
        if unknown and unknown[0].startswith(_CHECKPOINT):
            raise UserError(
                f"{self.path}: is of a checkpoint, whose strength stands in the run's recipe: take "
                "the file in the run's export folder"
            )
        if unknown:
            raise UserError(f"{self.path}: {self.names.unknown(unknown)}")
        return places

    def _found(self, name: str) -> list[Place]:
        """Return the modules that a file's name is for: of what clients join, those that change."""
        joint = self.names.joint(name)
        if joint is None:
            place = self.names.find(name)
            return [] if place is None else [place]
        parts = self._separate(name, joint, self._raw(name))
        found = {("denoiser", module): own for module, own in parts.items()}
        self._ranks |= {p: len(own["down"]) for p, own in found.items() if "down" in own}
        return list(found)

    def _raw(self, name: str) -> dict[str, Tensor]:
        return {factor: self._file.read(key) for factor, key in self._keys[name].items()}

    def _separate(
        self, name: str, joint: Joint, raw: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        import torch

        rank, held = check_module(self.path, name, raw), dict(raw)
        if "alpha" not in raw and rank and (alpha := self._alpha_beside(name, rank)) is not None:
            held["alpha"] = torch.tensor(alpha)  # of the rank that all of them have together
        try:
            return separate(joint, held)
        except (ValueError, IndexError) as fault:
            raise UserError(f"{self.path}: {name}: {fault}") from None

    def kinds(self) -> dict[Place, frozenset[str]]:
        """Return the factors that each module has, without reading them."""
        return {place: frozenset(self._keys[name]) for place, name in self.places.items()}

    def rank(self, place: Place) -> int | None:
        """Return a module's rank where its kind has one, without reading it."""
        if place in self._ranks:
            return self._ranks[place]
        keys = self._keys[self.places[place]]
        found = (self._file.forms[keys[f]].shape for f in _RANKED if f in keys)
        return next((shape[0] for shape in found if shape), None)

    def read(self, place: Place) -> Parts:
        """Return a module's factors. Raises UserError for those that do not fit the base."""
        name = self.places[place]
        keys = self._keys[name]
        if tucker := [factor for factor in _TUCKER if factor in keys]:
            raise UserError(f"{self.path}: {name} has {tucker[0]}, which this cannot reckon with")
        raw = self._raw(name)
        if (joint := self.names.joint(name)) is not None:
            raw = self._separate(name, joint, raw)[place[1]]
        rank = check_module(self.path, name, raw)
        broken = [keys[f] for f, t in raw.items() if not bool(t.double().isfinite().all())]
        if broken:
            raise UserError(f"{self.path}: {some(broken, SOME)}: holds NaN or infinite numbers")
        given = raw.pop("alpha", None)
        alpha = float(given) if given is not None else None
        if alpha is None and rank is not None:
            alpha = self._alpha_beside(name, rank)
        if "mid" in raw and {"down", "up"} <= raw.keys():
            raw["down"] = deltas.joined(raw.pop("mid").float(), raw["down"].float())
        if "lora_magnitude_vector" in keys.get("magnitude", ""):
            raw["magnitude"] = raw["magnitude"].flatten()  # peft's stand in any of the dimensions
        self._check(place, raw)
        return Parts(raw, alpha, kind_of(raw))

    def _check(self, place: Place, raw: Mapping[str, Tensor]) -> None:
        """Raise UserError where the factors are of no kind, or change what the base has not."""
        name, module = self.places[place], self.names.modules[place]
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        given = raw.get("diff_b")
        if given is not None and (bias is None or given.shape != bias.shape):
            there = list(bias.shape) if bias is not None else "none"
            raise UserError(
                f"{self.path}: {name} changes a bias {list(given.shape)}, and that of "
                f"{self.names.label} is {there}"
            )
        held = {f: part.shape for f, part in raw.items() if f != "diff_b"}
        if held and set(held) - {"magnitude"} not in _WHOLE:
            raise UserError(f"{self.path}: {name} has {', '.join(sorted(held))}: that is no kind")
        if not raw:
            raise UserError(f"{self.path}: {name} has an alpha and no factors")
        wide = _size(held) if held else None
        if wide is not None and wide != weight.numel():
            raise UserError(
                f"{self.path}: {name} changes {wide} numbers, and the weight of "
                f"{self.names.label} is {list(weight.shape)}: it is for another base"
            )

    def change(self, place: Place, parts: Parts, like: Tensor, strength: float = 1.0) -> Tensor:
        """Return `parts.change`; UserError that names file and module where it does not fit."""
        try:
            return parts.change(like, strength)
        except (ValueError, RuntimeError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise UserError(f"{self.path}: {self.places[place]}: {line}") from None


def _sorted(key: str) -> tuple[list[str], list[str]]:
    grouped, _ = group({key: None})  # type: ignore[dict-item]
    (name,) = grouped
    return [name], list(grouped[name])


_HALVES = tuple(({f"lokr_w{n}"}, {f"lokr_w{n}_a", f"lokr_w{n}_b"}) for n in (1, 2))
_WHOLE = (
    {"down", "up"},
    {"diff"},
    {"oft_blocks"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *(one | two for one in _HALVES[0] for two in _HALVES[1]),
)


def _size(held: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return how many numbers a product has, before anything is multiplied; None: as the weight."""
    if "up" in held:
        return held["up"][0] * prod(held["down"][1:])
    if "diff" in held:
        return prod(held["diff"])
    if "hada_w1_a" in held:
        sizes = {held[f"hada_w{n}_a"][0] * held[f"hada_w{n}_b"][1] for n in (1, 2)}
        return max(sizes)
    if "oft_blocks" in held:
        return None
    return prod(
        prod(held[half]) if half in held else held[f"{half}_a"][0] * prod(held[f"{half}_b"][1:])
        for half in ("lokr_w1", "lokr_w2")
    )


def like(names: Names, place: Place) -> Tensor:
    """Return a stand-in for a module's weight: its shape, and no memory."""
    import torch

    weight: Any = names.modules[place].weight
    return torch.zeros(()).expand(weight.shape)


def share(off: float, whole: float) -> float:
    """Return an error as a share of what it is an error of; infinite beside nothing."""
    return off / whole if whole else (0.0 if not off else math.inf)
