"""What an adapter file holds, read from its tensors and not from its name."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from tunekit import embeddings
from tunekit.embeddings import Embedding
from tunekit.errors import UserError, some
from tunekit.factors import ModuleInfo, group, is_kohya, read_module
from tunekit.files.adapter import beside
from tunekit.files.names import Names
from tunekit.files.sources import outline
from tunekit.files.stream import Form, TensorFile
from tunekit.schema import Base
from tunekit.suspicions import Looks, Shapes, suspicions

_COMPONENT = re.compile(r"^(lora_(?:unet|te\d?|transformer)|[a-z]\w*(?=\.))")
_TRANSFORMER = re.compile(
    r"transformer\.|lora_transformer_|diffusion_model\.|lora_unet_(double|single|joint)_blocks_"
)
_UNSAID = "not said"


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
    family: str | None = None

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
            *([("family", self.family)] if self.family else []),
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
        unsaid = set(self.alphas) == {_UNSAID}
        if not unsaid and "lora_adapter_metadata" not in self.metadata:
            return _counts(self.alphas)
        trained = self.metadata.get("tunekit.trained_alpha")
        within = (
            f"trained with {trained}, which is multiplied into the tensors; " if trained else ""
        )
        none = "the file names none, so that clients take alpha = rank"
        return within + (none if unsaid else f"{_counts(self.alphas)} by diffusers' metadata")

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


def describe(path: Path, base: str | None = None) -> AdapterInfo:
    """Describe the adapter file at `path`; reads its tensors, loads no model and runs no code.

    base: a folder, a Hub id or "toybox", with whose modules the file's names are compared; of it
    only the configurations are read.

    Raises UserError, one line, for a file that is missing, pickled, broken or truncated, holds no
    adapter, or whose factors cannot be multiplied.
    """
    file = TensorFile(path)
    metadata = file.metadata
    found, keys = _words(path, file)
    grouped, unread = group(dict.fromkeys(keys))  # type: ignore[arg-type]
    if not grouped and not found:
        raise UserError(
            f"{path}: holds no adapter: none of its {len(keys)} tensors is a factor of one"
            + (f" (the first is {unread[0]})" if unread else "")
        )
    modules, looks = _modules(path, file, keys, beside(path, metadata))
    shapes = _shapes(file, keys)
    kinds = sorted({module.kind for module in modules})
    kind = kinds[0] if len(kinds) == 1 else f"mixed ({', '.join(kinds)})"
    if found:
        kind = f"bundle ({kind} and new words)" if kinds else "new words (textual inversion)"
    said = [*suspicions(looks, metadata, modules, shapes, unread)] if keys else []
    if again := _again(keys):
        said.append(f"second names for factors that are there, of which readers take one: {again}")
    family = None
    if base is not None:
        names = Names(outline(Base(model=base)))
        family = names.family
        said += _strange(names, [module.name for module in modules])
    return AdapterInfo(
        file=path.name,
        bytes=path.stat().st_size,
        kind=kind,
        names=_naming(keys) if keys else _word_naming(found),
        architecture=_first(metadata, "modelspec.architecture", "ss_base_model_version")
        or _by_shape(shapes),
        base=_first(metadata, "tunekit.base", "ss_sd_model_name"),
        trigger=_first(metadata, "modelspec.trigger_phrase"),
        dtypes=_tally(_dtype(form) for form in file.forms.values()),
        parameters=sum(prod(form.shape) for form in file.forms.values()),
        ranks=_tally(module.rank for module in modules if module.rank is not None),
        alphas=_tally(_UNSAID if m.alpha is None else f"{m.alpha:g}" for m in modules),
        targets=_tally(_target(module.name) for module in modules),
        modules=modules,
        unread=unread,
        metadata=dict(metadata),
        suspicious=(*said, *_suspicious_words(found)),
        words=tuple(_word(word) for word in found),
        family=family,
    )


def _words(path: Path, file: TensorFile) -> tuple[tuple[Embedding, ...], list[str]]:
    """Return the file's new words, and the names of all other tensors."""
    if not embeddings.contents(path)[0]:
        return (), list(file.forms)
    whole = {name: file.read(name) for name in file.forms}
    found, rest = embeddings.split(path, whole, file.metadata)
    return found, list(rest)


def _modules(
    path: Path, file: TensorFile, keys: Sequence[str], scales: Mapping[str, object]
) -> tuple[tuple[ModuleInfo, ...], Looks]:
    """Describe each module, of which one at a time is in memory."""
    grouped, _ = group({key: key for key in keys})  # type: ignore[misc]
    looks, modules = Looks(), []
    for name, own in sorted(grouped.items()):
        parts = {factor: file.read(str(key)) for factor, key in own.items()}
        for factor, tensor in parts.items():
            looks.look(str(own[factor]), tensor)
        modules.append(read_module(path, name, parts, scales))
    return tuple(modules), looks


def _again(keys: Sequence[str]) -> str:
    """Return in words what names a factor that another name stands for as well; "": nothing."""
    grouped, unread = group({key: key for key in keys})  # type: ignore[misc]
    taken = {str(key) for own in grouped.values() for key in own.values()}
    return some(key for key in keys if key not in taken and key not in unread)


def _shapes(file: TensorFile, keys: Sequence[str]) -> Shapes:
    grouped, _ = group({key: file.forms[key].shape for key in keys})  # type: ignore[misc]
    return grouped  # type: ignore[return-value]


def _strange(names: Names, modules: Sequence[str]) -> Iterable[str]:
    """Yield what is named as no module of a base is."""
    unknown = [n for n in modules if names.find(n) is None and names.joint(n) is None]
    if unknown:
        yield f"no modules of {names.label}: {some(unknown)}"


def _word(found: Embedding) -> WordInfo:
    return WordInfo(
        found.word,
        found.vectors,
        {encoder: rows.shape[1] for encoder, rows in found.rows.items()},
        {e: [float(n) for n in r.double().norm(dim=1)] for e, r in found.rows.items()},
        found.start,
    )


def _word_naming(found: Sequence[Embedding]) -> str:
    keys = dict.fromkeys(key for word in found for key in word.rows)
    if embeddings.ONE in keys:
        return "one tensor (Stable Diffusion)"
    return f"{', '.join(sorted(keys, reverse=True))} (a tensor for each CLIP)"


def _suspicious_words(found: Sequence[Embedding]) -> Iterable[str]:
    for word in found:
        for rows in word.rows.values():
            if any(float(norm) == 0 for norm in rows.double().norm(dim=1)):
                yield f"a vector of zeros in {word.word}"
            if len({tuple(row) for row in rows.double().tolist()}) < len(rows):
                yield f"vectors of {word.word} that are the same: did all of them train?"


def _first(metadata: Mapping[str, str], *keys: str) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _by_shape(shapes: Shapes) -> str | None:
    """Say what the adapted modules tell of the base: how wide the text is that it listens to."""
    for name, parts in shapes.items():
        if re.search(r"attn2[._]to_[kv]$", name) and len(parts.get("down", ())) > 1:
            return f"a U-Net over text {parts['down'][1]} wide (told by a shape)"
    if any(_TRANSFORMER.match(name) for name in shapes):
        return "a transformer (told by names)"
    return None


def _naming(keys: Sequence[str]) -> str:
    """Say whose names the file uses, and for which parts of a model."""
    components = _tally(m[1] if (m := _COMPONENT.match(key)) else "unnamed" for key in keys)
    whose = "kohya" if all(is_kohya(key) for key in keys) else "diffusers"
    if any(re.search(r"[._]lora\.(down|up)|\.lora_linear_layer\.", key) for key in keys):
        whose = "diffusers before PEFT"
    if all(key.startswith("base_model.") for key in keys):
        whose = "PEFT"
    if all(key.startswith("lycoris_") for key in keys):
        whose = "LyCORIS"
    return f"{whose} ({', '.join(components)})"


def _target(name: str) -> str:
    """Return the last words of a module's name: what people name as a target."""
    if is_kohya(name):
        match = re.search(r"(?:to_(?:q|k|v|out_0)|(?:q|k|v|out)_proj|fc\d|[a-z]+(?:_\d+)*)$", name)
        return match[0] if match else name
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() and len(words) > 1 else words[-1]


def _dtype(form: Form) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(form.dtype, form.dtype)


def _tally(values: Iterable[object]) -> dict:  # type: ignore[type-arg]
    """Count values, the most frequent first."""
    return dict(Counter(values).most_common())


def _counts(tally: Mapping[object, int] | Mapping[int, int] | Mapping[str, int]) -> str:
    if len(tally) == 1:
        return str(next(iter(tally)))
    return ", ".join(f"{value} ({count})" for value, count in tally.items())


def _short(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"
