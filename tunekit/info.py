"""What an adapter file holds, read from its tensors and not from its name."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Every spelling of a factor that trainers write: PEFT, kohya, diffusers before PEFT, LyCORIS.
_SPELLINGS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_embedding_A": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("hada_t1", "hada_t2", "lokr_t2", "oft_blocks", "oft_R", "diff")},
    **{f"lokr_w{n}{part}": f"lokr_w{n}{part}" for n in (1, 2) for part in ("", "_a", "_b")},
}
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<factor>"
    + "|".join(sorted(map(re.escape, _SPELLINGS), key=len, reverse=True))
    + r")(?:\.default)?(?:\.weight)?$"
)
_COMPONENT = re.compile(r"^(lora_(?:unet|te\d?|transformer)|[a-z]\w*(?=\.))")
_LARGEST = {"fp16": 65504.0}  # what may come near to overflowing


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted module: `norm` is the Frobenius norm of its weight change, alpha / rank included.

    rank and alpha are None where the file does not say; norm is None where it is not a number, and
    where this reader cannot compute it (`kind` OFT and tensor-decomposed convolutions).
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    norm: float | None


@dataclass(frozen=True)
class AdapterInfo:
    """What `describe` found; `suspicious` lists in words what a user should look at."""

    file: str
    bytes: int
    kind: str
    names: str
    architecture: str | None
    base: str | None
    trigger: str | None
    dtypes: dict[str, int]
    parameters: int
    ranks: dict[int, int]
    alphas: dict[str, int]
    targets: dict[str, int]
    modules: tuple[ModuleInfo, ...]
    unread: tuple[str, ...]
    metadata: dict[str, str]
    suspicious: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the description for people, a line per fact."""
        rows = [
            ("file", f"{self.file}, {_size(self.bytes)}, {_counts(self.dtypes)}"),
            ("kind", f"{self.kind}: {len(self.modules)} modules, {self.parameters:,} parameters"),
            ("names", self.names),
            ("for", self._made_for()),
            ("trigger", self.trigger or "not said"),
            ("rank", _counts(self.ranks) or "not said"),
            ("alpha", _counts(self.alphas)),
            ("targets", _counts(self.targets)),
            ("norms", self._norms()),
        ]
        shown = {key: text for key, text in self.metadata.items() if key != "tunekit.recipe"}
        rows += [("metadata", f"{key} = {_short(text)}") for key, text in sorted(shown.items())]
        if "tunekit.recipe" in self.metadata:
            rows.append(("recipe", "is in the file (shown by --json)"))
        rows += [("suspicious", said) for said in self.suspicious or ("nothing",)]
        return [f"{name:<11}{said}" for name, said in rows]

    def _made_for(self) -> str:
        base = f"base {self.base}" if self.base else "base not said"
        return f"{self.architecture or 'architecture not said'}, {base}"

    def _norms(self) -> str:
        known = [(m.norm, m.name) for m in self.modules if m.norm is not None]
        if not known:
            return "not computed for this kind"
        (low, low_name), (high, high_name) = min(known), max(known)
        middle = statistics.median(norm for norm, _ in known)
        return f"median {middle:.3g}, from {low:.3g} ({low_name}) to {high:.3g} ({high_name})"


def describe(path: Path) -> AdapterInfo:
    """Describe the adapter file at `path`; reads its tensors, loads no model and runs no code.

    Raises UserError, one line, for a file that is missing, pickled, broken or truncated, holds no
    adapter, or whose factors cannot be multiplied.
    """
    from tunekit.checkpoint import read_safetensors

    tensors, metadata = read_safetensors(path)
    grouped, unread = _group(tensors)
    if not grouped:
        raise UserError(
            f"{path}: holds no adapter: none of its {len(tensors)} tensors is a factor of one"
            + (f" (the first is {unread[0]})" if unread else "")
        )
    scales = _adapter_metadata(path, metadata)
    modules = tuple(_module(path, name, parts, scales) for name, parts in sorted(grouped.items()))
    kinds = sorted({module.kind for module in modules})
    return AdapterInfo(
        file=path.name,
        bytes=path.stat().st_size,
        kind=kinds[0] if len(kinds) == 1 else f"mixed ({', '.join(kinds)})",
        names=_naming(tensors),
        architecture=_first(metadata, "modelspec.architecture", "ss_base_model_version"),
        base=_first(metadata, "tunekit.base", "ss_sd_model_name"),
        trigger=_first(metadata, "modelspec.trigger_phrase"),
        dtypes=_tally(_dtype(tensor) for tensor in tensors.values()),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        ranks=_tally(module.rank for module in modules if module.rank is not None),
        alphas=_tally("not said" if m.alpha is None else f"{m.alpha:g}" for m in modules),
        targets=_tally(_target(module.name) for module in modules),
        modules=modules,
        unread=unread,
        metadata=dict(metadata),
        suspicious=tuple(_suspicious(tensors, metadata, modules, grouped, unread)),
    )


def _first(metadata: Mapping[str, str], *keys: str) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Sort tensors into {module: {factor: tensor}} and the names that are no factor."""
    grouped: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key in sorted(tensors):
        match = _KEY.match(key)
        if match:
            parts = grouped.setdefault(match["module"], {})
            parts[_SPELLINGS[match["factor"]]] = tensors[key]
        else:
            unread.append(key)
    return grouped, tuple(unread)


def _module(
    path: Path, name: str, parts: Mapping[str, Tensor], scales: Mapping[str, object]
) -> ModuleInfo:
    for factor, tensor in parts.items():
        shape = list(tensor.shape)
        plain = tensor.ndim in (2, 4) or factor not in ("down", "up")
        if tensor.numel() == 0 or not plain or tensor.ndim > 5:
            raise UserError(f"{path}: {name} ({factor}) has the shape {shape}: no adapter has that")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        shape = list(parts["alpha"].shape)
        raise UserError(f"{path}: the alpha of {name} has the shape {shape}, not one number")
    rank = _rank(path, name, parts)
    alpha = float(parts["alpha"]) if "alpha" in parts else _declared_alpha(name, scales)
    scale = alpha / rank if alpha is not None and rank else 1.0
    norm = _norm(parts)
    if norm is not None:
        norm = norm * abs(scale) if math.isfinite(norm * scale) else None
    return ModuleInfo(name, _kind(parts), rank, alpha, norm)


def _rank(path: Path, name: str, parts: Mapping[str, Tensor]) -> int | None:
    """Return the inner size of the module's factors, which must agree."""
    pairs = (("down", "up"), ("hada_w1_b", "hada_w1_a"), ("lokr_w1_b", "lokr_w1_a"))
    for down, up in (*pairs, ("hada_w2_b", "hada_w2_a"), ("lokr_w2_b", "lokr_w2_a")):
        if down in parts and up in parts:
            inner, outer = parts[down].shape[0], parts[up].shape[1]
            if inner != outer:
                raise UserError(
                    f"{path}: the factors of {name} cannot be multiplied: "
                    f"{list(parts[up].shape)} by {list(parts[down].shape)}"
                )
            return int(inner)
    if "down" in parts:
        return int(parts["down"].shape[0])
    return int(parts["up"].shape[1]) if "up" in parts else None


def _norm(parts: Mapping[str, Tensor]) -> float | None:
    """Return the Frobenius norm of the weight change without alpha, or None where unknown."""
    wide = {factor: tensor.double() for factor, tensor in parts.items()}
    if {"down", "up"} <= parts.keys():
        return _product_norm(wide["up"], wide["down"])
    if any(name.endswith(("_t1", "_t2")) for name in parts):
        return None
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= parts.keys():
        one = wide["hada_w1_a"] @ wide["hada_w1_b"]
        two = wide["hada_w2_a"] @ wide["hada_w2_b"]
        return float((one * two).norm()) if one.shape == two.shape else None
    halves = []
    for half in ("lokr_w1", "lokr_w2"):
        if half in wide:
            halves.append(float(wide[half].norm()))
        elif f"{half}_a" in wide and f"{half}_b" in wide:
            halves.append(_product_norm(wide[f"{half}_a"], wide[f"{half}_b"]))
    return halves[0] * halves[1] if len(halves) == 2 else None  # |a (x) b| = |a| |b|


def _product_norm(up: Tensor, down: Tensor) -> float:
    """Return |up @ down| through the factors' Gram matrices: rank x rank, never the full matrix."""
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != down.shape[0]:  # a factored kernel (up wider than 1x1): multiply as stored
        up = up.reshape(-1, down.shape[0])
    squared = float(((up.T @ up) * (down @ down.T)).sum())
    return max(squared, 0.0) ** 0.5 if squared == squared else squared


def _kind(parts: Mapping[str, Tensor]) -> str:
    for start, kind in (("hada", "LoHa"), ("lokr", "LoKr"), ("oft", "OFT"), ("diff", "full")):
        if any(factor.startswith(start) for factor in parts):
            return kind
    return "DoRA" if "magnitude" in parts else "LoRA"


def _adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """Return diffusers' own adapter metadata, which carries alpha for diffusers alone."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}: lora_adapter_metadata is not JSON ({fault})") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path}: lora_adapter_metadata is not a JSON object")
    return value


def _declared_alpha(name: str, scales: Mapping[str, object]) -> float | None:
    component = name.split(".", 1)[0]
    alpha = scales.get(f"{component}.lora_alpha")
    patterns = scales.get(f"{component}.alpha_pattern")
    if isinstance(patterns, dict):
        bare = name.split(".", 1)[-1]
        for pattern, value in patterns.items():
            if bare == pattern or bare.endswith(f".{pattern}"):
                alpha = value
    return float(alpha) if isinstance(alpha, int | float) else None


def _suspicious(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: tuple[ModuleInfo, ...],
    grouped: Mapping[str, Mapping[str, Tensor]],
    unread: tuple[str, ...],
) -> Iterable[str]:
    broken = [key for key, tensor in sorted(tensors.items()) if not bool(tensor.isfinite().all())]
    if broken:
        yield f"NaN or infinite numbers in {_some(broken)}"
    zero = [module.name for module in modules if module.norm == 0]
    if zero:
        whole = "the whole adapter changes nothing: " if len(zero) == len(modules) else ""
        yield f"{whole}zero change in {_some(zero)}"
    halves = [name for name, parts in grouped.items() if ("down" in parts) != ("up" in parts)]
    if halves:
        yield f"only one of two factors in {_some(halves)}"
    bare = [name for name, parts in grouped.items() if set(parts) == {"alpha"}]
    if bare:
        yield f"an alpha without factors in {_some(bare)}"
    kohya = [name for name, parts in grouped.items() if _is_kohya(name) and "alpha" not in parts]
    if kohya:
        yield f"no alpha, so that clients take alpha = rank, in {_some(kohya)}"
    if any(name.startswith("lora_adapter") for name in metadata) and any(
        module.alpha not in (None, module.rank) for module in modules
    ):
        yield "its alpha is in metadata that only diffusers reads: elsewhere the strength is off"
    huge = [
        key
        for key, tensor in sorted(tensors.items())
        if (most := _LARGEST.get(_dtype(tensor))) and float(tensor.abs().max()) > most / 2
    ]
    if huge:
        yield f"numbers near what the format can hold in {_some(huge)}"
    wide = [m.name for m in modules if m.rank and m.rank > _narrow(grouped[m.name])]
    if wide:
        yield f"a rank above the module's own width in {_some(wide)}"
    if unread:
        yield f"tensors that are no factor of an adapter: {_some(unread)}"


def _narrow(parts: Mapping[str, Tensor]) -> int:
    """Return the smaller of a module's two sizes: no weight change has a higher rank."""
    sizes = []
    if "up" in parts:
        sizes.append(parts["up"].shape[0])
    if "down" in parts:
        sizes.append(parts["down"].flatten(1).shape[1])
    return min(sizes, default=2**31)


def _is_kohya(name: str) -> bool:
    return name.startswith(("lora_unet_", "lora_te", "lora_transformer_"))


def _naming(tensors: Mapping[str, Tensor]) -> str:
    """Say whose names the file uses, and for which parts of a model."""
    components = _tally(m[1] if (m := _COMPONENT.match(key)) else "unnamed" for key in tensors)
    whose = "kohya" if all(_is_kohya(key) for key in tensors) else "diffusers"
    if any(".lora.down" in key or ".lora_linear_layer." in key for key in tensors):
        whose = "diffusers before PEFT"
    return f"{whose} ({', '.join(components)})"


def _target(name: str) -> str:
    """Return the last words of a module's name: what people name as a target."""
    if _is_kohya(name):
        match = re.search(r"(?:to_(?:q|k|v|out_0)|(?:q|k|v|out)_proj|fc\d|[a-z]+(?:_\d+)*)$", name)
        return match[0] if match else name
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() and len(words) > 1 else words[-1]


def _dtype(tensor: Tensor) -> str:
    long = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(long, long)


def _tally(values: Iterable[object]) -> dict:  # type: ignore[type-arg]
    """Count values, the most frequent first."""
    return dict(Counter(values).most_common())


def _counts(tally: Mapping[object, int] | Mapping[int, int] | Mapping[str, int]) -> str:
    if len(tally) == 1:
        return str(next(iter(tally)))
    return ", ".join(f"{value} ({count})" for value, count in tally.items())


def _some(names: Iterable[str], most: int = 3) -> str:
    known = list(names)
    rest = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + rest


def _short(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"
