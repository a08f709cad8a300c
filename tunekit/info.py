"""What an adapter file holds, read from its tensors and not from its name."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import embeddings
from tunekit.checkpoint import read_safetensors
from tunekit.embeddings import Embedding
from tunekit.errors import UserError
from tunekit.factors import ModuleInfo, adapter_metadata, group, is_kohya, read_module

if TYPE_CHECKING:
    from torch import Tensor

_COMPONENT = re.compile(r"^(lora_(?:unet|te\d?|transformer)|[a-z]\w*(?=\.))")
_UNSAID = "not said"
_LARGEST = {"fp16": 65504.0}  # what may come near to overflowing


@dataclass(frozen=True)
class WordInfo:
    """A new word in a file: norms are the lengths of its vectors, by text encoder.

    width: numbers a vector, by text encoder. start: the base's words that it started at, where the
    file says so.
    """

    word: str
    vectors: int
    width: dict[str, int]
    norms: dict[str, list[float]]
    start: str | None

    def told(self) -> str:
        """Return the word's facts as a sentence."""
        parts = []
        for encoder, norms in self.norms.items():
            lengths = ", ".join(f"{norm:.3g}" for norm in norms[:8])
            more = ", ..." if len(norms) > 8 else ""
            named = f"{encoder}: " if encoder else ""
            parts.append(f"{named}{self.width[encoder]} numbers each, norms {lengths}{more}")
        count = "1 vector" if self.vectors == 1 else f"{self.vectors} vectors"
        began = f', started at "{self.start}"' if self.start else ""
        return f"{self.word}: {count}, {'; '.join(parts)}{began}"


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
    words: tuple[WordInfo, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the description for people, a line per fact."""
        modules = f"{len(self.modules)} modules, " if self.modules else ""
        rows = [
            ("file", f"{self.file}, {_size(self.bytes)}, {_counts(self.dtypes)}"),
            ("kind", f"{self.kind}: {modules}{self.parameters:,} parameters"),
            ("names", self.names),
            ("for", self._made_for()),
            ("trigger", self.trigger or "not said"),
            *(("new word", word.told()) for word in self.words),
        ]
        if self.modules:
            rows += [
                ("rank", _counts(self.ranks) or "not said"),
                ("alpha", self._alpha()),
                ("targets", _counts(self.targets)),
                ("norms", self._norms()),
            ]
        shown = {key: text for key, text in self.metadata.items() if key != "tunekit.recipe"}
        rows += [("metadata", f"{key} = {_short(text)}") for key, text in sorted(shown.items())]
        if "tunekit.recipe" in self.metadata:
            rows.append(("recipe", "is in the file (shown by --json)"))
        rows += [("suspicious", said) for said in self.suspicious or ("nothing",)]
        return [f"{name:<11}{said}" for name, said in rows]

    def _alpha(self) -> str:
        if set(self.alphas) != {_UNSAID}:
            return _counts(self.alphas)
        trained = self.metadata.get("tunekit.trained_alpha")
        within = (
            f"trained with {trained}, which is multiplied into the tensors; " if trained else ""
        )
        return f"{within}the file names none, so that clients take alpha = rank"

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
    whole, metadata = read_safetensors(path)
    found, tensors = embeddings.split(path, whole, metadata)
    grouped, unread = group(tensors)
    if not grouped and not found:
        raise UserError(
            f"{path}: holds no adapter: none of its {len(tensors)} tensors is a factor of one"
            + (f" (the first is {unread[0]})" if unread else "")
        )
    scales = adapter_metadata(path, metadata)
    modules = tuple(
        read_module(path, name, parts, scales) for name, parts in sorted(grouped.items())
    )
    kinds = sorted({module.kind for module in modules})
    kind = kinds[0] if len(kinds) == 1 else f"mixed ({', '.join(kinds)})"
    if found:
        kind = f"bundle ({kind} and new words)" if kinds else "new words (textual inversion)"
    said = [*_suspicious(tensors, metadata, modules, grouped, unread)] if tensors else []
    return AdapterInfo(
        file=path.name,
        bytes=path.stat().st_size,
        kind=kind,
        names=_naming(tensors) if tensors else _word_naming(found),
        architecture=_first(metadata, "modelspec.architecture", "ss_base_model_version")
        or _by_shape(grouped),
        base=_first(metadata, "tunekit.base", "ss_sd_model_name"),
        trigger=_first(metadata, "modelspec.trigger_phrase"),
        dtypes=_tally(_dtype(tensor) for tensor in whole.values()),
        parameters=sum(tensor.numel() for tensor in whole.values()),
        ranks=_tally(module.rank for module in modules if module.rank is not None),
        alphas=_tally(_UNSAID if m.alpha is None else f"{m.alpha:g}" for m in modules),
        targets=_tally(_target(module.name) for module in modules),
        modules=modules,
        unread=unread,
        metadata=dict(metadata),
        suspicious=(*said, *_suspicious_words(found)),
        words=tuple(_word(word) for word in found),
    )


def _word(found: Embedding) -> WordInfo:
    return WordInfo(
        found.word,
        found.vectors,
        {encoder: rows.shape[1] for encoder, rows in found.rows.items()},
        {e: [float(n) for n in r.double().norm(dim=1)] for e, r in found.rows.items()},
        found.start,
    )


def _word_naming(found: Sequence[Embedding]) -> str:
    several = any(embeddings.ONE not in word.rows for word in found)
    return "clip_l, clip_g (SDXL)" if several else "one tensor (Stable Diffusion)"


def _suspicious_words(found: Sequence[Embedding]) -> Iterable[str]:
    for word in found:
        for rows in word.rows.values():
            if any(float(norm) == 0 for norm in rows.double().norm(dim=1)):
                yield f"a vector of zeros in {word.word}"
            if len({tuple(row) for row in rows.double().tolist()}) < len(rows):
                yield f"vectors of {word.word} that are the same: did all of them train?"


def _first(metadata: Mapping[str, str], *keys: str) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _by_shape(grouped: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Say what the adapted modules tell of the base: how wide the text is that it listens to."""
    for name, parts in grouped.items():
        if re.search(r"attn2[._]to_[kv]$", name) and "down" in parts:
            return f"a U-Net over text {parts['down'].shape[1]} wide (told by a shape)"
    if any(name.startswith(("transformer.", "lora_transformer_")) for name in grouped):
        return "a transformer (told by names)"
    return None


def _suspicious(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: tuple[ModuleInfo, ...],
    grouped: Mapping[str, Mapping[str, Tensor]],
    unread: tuple[str, ...],
) -> Iterable[str]:
    broken = [key for key, tensor in sorted(tensors.items()) if not _finite(tensor)]
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
    # A whole difference has no rank, and so nothing that an alpha would be held against.
    kohya = [
        name
        for name, parts in grouped.items()
        if is_kohya(name) and "alpha" not in parts and not parts.keys() <= {"diff", "diff_b"}
    ]
    if kohya:
        yield f"no alpha, so that clients take alpha = rank, in {_some(kohya)}"
    if any(name.startswith("lora_adapter") for name in metadata) and any(
        module.alpha not in (None, module.rank) for module in modules
    ):
        yield "its alpha is in metadata that only diffusers reads: elsewhere the strength is off"
    huge = [
        key
        for key, tensor in sorted(tensors.items())
        if (most := _LARGEST.get(_dtype(tensor))) and _largest(tensor) > most / 2
    ]
    if huge:
        yield f"numbers near what the format can hold in {_some(huge)}"
    wide = [m.name for m in modules if m.rank and m.rank > _narrow(grouped[m.name])]
    if wide:
        yield f"a rank above the module's own width in {_some(wide)}"
    if unread:
        yield f"tensors that are no factor of an adapter: {_some(unread)}"


def _finite(tensor: Tensor) -> bool:
    whole = tensor if tensor.is_complex() else tensor.double()  # 8-bit formats cannot tell
    return bool(whole.isfinite().all())


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _narrow(parts: Mapping[str, Tensor]) -> int:
    """Return the smaller of a module's two sizes: no weight change has a higher rank."""
    sizes = []
    if "up" in parts:
        sizes.append(parts["up"].shape[0])
    if "down" in parts:
        sizes.append(parts["down"].flatten(1).shape[1])
    return min(sizes, default=2**31)


def _naming(tensors: Mapping[str, Tensor]) -> str:
    """Say whose names the file uses, and for which parts of a model."""
    components = _tally(m[1] if (m := _COMPONENT.match(key)) else "unnamed" for key in tensors)
    whose = "kohya" if all(is_kohya(key) for key in tensors) else "diffusers"
    if any(re.search(r"[._]lora\.(down|up)|\.lora_linear_layer\.", key) for key in tensors):
        whose = "diffusers before PEFT"
    return f"{whose} ({', '.join(components)})"


def _target(name: str) -> str:
    """Return the last words of a module's name: what people name as a target."""
    if is_kohya(name):
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
