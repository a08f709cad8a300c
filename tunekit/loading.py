"""Adapter files put into a family: by diffusers' own code where it reads them, else by ours.

diffusers reads LoRA in its own and in kohya's naming, and DoRA in its own. For every other kind the
change of each weight is reckoned from the file's factors once, and added to the module's output.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import embeddings
from tunekit.changes import deltas
from tunekit.changes.joined import Joint, by_name, separate
from tunekit.changes.layers import (
    AddedChange,
    ShiftedParameter,
    has_magnitude,
    peft_change,
    strength_setter,
    weight_of,
)
from tunekit.checkpoint import read_safetensors
from tunekit.factors import adapter_metadata, group, is_kohya, with_alpha
from tunekit.loaded import Loaded as Loaded
from tunekit.loaded import VerificationError as VerificationError
from tunekit.loaded import combined as combined
from tunekit.loaded import scale_of
from tunekit.loaded import undisturbed as undisturbed
from tunekit.schema import LAYOUTS
from tunekit.wordfiles import load_words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.families import Family

TAKEN_UP = "every tensor is taken up"
_READ_BY_DIFFUSERS = frozenset({"down", "up", "alpha", "magnitude"})
_PROBED = 1000.0  # fp16's smallest steps are below fp32's resolution beside an ordinary number


def load_file(family: Family, path: Path, name: str) -> Loaded:
    """Put the adapter file at `path` into `family`, under a name of its own.

    Raises VerificationError where it does not fit, a tensor was left over, or a place for one
    stayed empty; UserError where it is no safetensors file.
    """
    whole, metadata = read_safetensors(path)  # checked here: diffusers would also read a pickle
    scales = adapter_metadata(path, metadata)  # and this, which diffusers hands to peft as it is
    words, tensors = embeddings.split(path, whole, metadata)
    found = [load_words(family, path, words, not tensors)] if words else []
    if tensors or not found:
        try:
            found.append(_load_weights(family, path, name, tensors, scales, bundled=bool(words)))
        except VerificationError:
            for part in found:
                part.remove()
            raise
    return combined(found)


def _load_weights(
    family: Family,
    path: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, object],
    *,
    bundled: bool,
) -> Loaded:
    """Put in the adapter of a file. scales: what its metadata says of alphas; bundled: with words.

    Of a bundle diffusers would refuse the words: it is handed the tensors, without the metadata.
    """
    grouped, unread = group(tensors)
    scaled = {key: with_alpha(path, key, held, scales) for key, held in grouped.items()}
    joined = by_name(family.joints).keys() & grouped.keys()
    beside = bundled and any(scaled[key] is not held for key, held in grouped.items())
    ours = joined or beside or not read_by_diffusers(tensors, kohya=family.kohya_by_diffusers)
    if not ours:
        return _by_diffusers(family, dict(tensors) if bundled else str(path), name, tensors)
    if unread:
        raise VerificationError(TAKEN_UP, f"{unread[0]} is no factor of an adapter")
    if sum(map(len, grouped.values())) < len(tensors):
        raise VerificationError(TAKEN_UP, "two of its tensors are one factor of a module")
    return _by_factors(family, scaled)


def read_by_diffusers(names: Mapping[str, Any], *, kohya: bool = True) -> bool:
    """Say whether a file with tensors of these names is one for diffusers' own loader.

    DoRA it reads in its own naming alone: of kohya's it leaves the magnitudes out. kohya: whether
    it reads kohya's for the base (`Family.kohya_by_diffusers`).
    """
    grouped, _ = group(names)
    return all(
        parts.keys() <= _READ_BY_DIFFUSERS
        and not (is_kohya(name) and ("magnitude" in parts or not kohya))
        for name, parts in grouped.items()
    )


def peft_layers(family: Family) -> dict[str, Any]:
    """Return the peft layers in the denoiser and the text encoders, by "component.module"."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{component}.{name}": layer
        for component, module in _components(family).items()
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def remove_layers(family: Family, name: str) -> None:
    """Take the peft adapter of this name off; a layer that holds no other gives way to the base's.

    What is there in part, after loading failed, goes as well.
    """
    for component, module in _components(family).items():
        inside = f"{component}."
        for key, layer in peft_layers(family).items():
            if not key.startswith(inside) or name not in layer.scaling:
                continue
            layer.delete_adapter(name)
            if not layer.scaling:
                module.set_submodule(key.removeprefix(inside), layer.get_base_layer())
        held: Any = getattr(module, "peft_config", {})
        held.pop(name, None)
        if not held and hasattr(module, "peft_config"):
            del module.peft_config
            # What diffusers and transformers go by; a checkpoint's attachment does without.
            marked: Any = module
            marked._hf_peft_config_loaded = False


def _components(family: Family) -> dict[str, nn.Module]:
    return {"denoiser": family.denoiser, **family.text_encoders}


def _by_diffusers(
    family: Family, source: str | dict[str, Tensor], name: str, tensors: Mapping[str, Tensor]
) -> Loaded:
    """Load by diffusers, which leaves out what it does not know and only logs what is missing."""
    with undisturbed(family), warnings.catch_warnings():
        # Several adapters on one base are what is asked for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            family.pipeline().load_lora_weights(
                source, adapter_name=name, use_safetensors=True, local_files_only=True
            )
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise VerificationError(
                "loads", f"diffusers cannot load it into {family.label}: {line}"
            ) from fault
    # An alpha is not a place in the model but a number that scales one.
    written = [tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")]
    places = {
        f"{component}.{key}": parameter
        for component, module in _components(family).items()
        for key, parameter in module.named_parameters()
        if f".{name}." in key
    }
    empty = sorted(key for key, parameter in places.items() if parameter.is_meta)
    if empty:
        raise VerificationError(
            TAKEN_UP, f"the file has nothing for {empty[0].replace(f'.{name}', '')}"
        )
    taken = sum(parameter.numel() for parameter in places.values())
    if len(places) != len(written) or taken != sum(written):
        raise VerificationError(
            TAKEN_UP,
            f"of {len(written)} tensors ({sum(written)} numbers) diffusers took "
            f"{len(places)} ({taken}) into {family.label}",
        )
    layers = {key: layer for key, layer in peft_layers(family).items() if name in layer.scaling}
    setters = {key: strength_setter(layer, name) for key, layer in layers.items()}

    def set_scale(scale: float, text: float | None = None) -> None:
        for key, setter in setters.items():
            setter(scale_of(key, scale, text))

    return Loaded(
        len(places),
        {key: partial(peft_change, layer, name) for key, layer in layers.items()},
        lambda key, floor: _lora_rounding(layers[key], name, floor),
        set_scale,
        partial(remove_layers, family, name),
    )


def _lora_rounding(layer: Any, name: str, floor: float) -> float:
    """Return how far a layer's change moves where each of its numbers is off by `floor`.

    Of errors that are independent: those of B (out x rank) reach every output through A, those of A
    (rank x in) through B. A magnitude in half precision is off by a share of the whole weight.
    """
    import math

    import torch

    up, down = (layer.get_submodule(f"{f}.{name}").weight for f in ("lora_B", "lora_A"))
    kind = up.dtype
    up, down = up.detach().float().flatten(1), down.detach().float().flatten(1)
    moved = [
        floor * len(up) ** 0.5 * float(down.norm()) * abs(layer.scaling[name]),
        floor * down.shape[1] ** 0.5 * float(up.norm()) * abs(layer.scaling[name]),
        floor * (len(up) * down.shape[1]) ** 0.5,  # the product, in the base's format
    ]
    if has_magnitude(layer, name):
        # float32 of the file is kept, and its product with the weight is reckoned in float32
        share = torch.finfo(kind).eps
        moved.append(share * float(weight_of(layer.get_base_layer()).float().norm()))
    return math.hypot(*moved)


def _by_factors(family: Family, grouped: Mapping[str, Mapping[str, Tensor]]) -> Loaded:
    """Reckon every change first, so that a file that does not fit changes nothing; then add."""
    places, joints = _places(family), by_name(family.joints)
    planned: list[tuple[str, nn.Module, str, Tensor]] = []
    again: dict[str, Callable[[float], float]] = {}
    count = sum(len(held.keys() - {"alpha"}) for held in grouped.values())
    for key, held in _each(grouped, joints, family):
        if key not in places:
            raise VerificationError(TAKEN_UP, f"{family.label} has no module for {key}")
        name, module = places[key]
        if any(name == before for before, *_ in planned):
            raise VerificationError(TAKEN_UP, f"{key} is there twice, by two clients' names")
        parts = dict(held)
        bias = parts.pop("diff_b", None)
        try:
            alpha = float(parts.pop("alpha")) if "alpha" in parts else None
            if bias is not None:
                planned.append((f"{name}.bias", module, "bias", _fitting(bias, module, "bias")))
                again[f"{name}.bias"] = partial(operator.mul, bias.numel() ** 0.5)
            if parts:
                weight = weight_of(module)
                delta = deltas.change(parts, alpha, weight)
                planned.append((name, module, "weight", delta))
                again[name] = partial(_moved, parts, alpha, weight, delta)
        except (LookupError, RuntimeError, ValueError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise VerificationError("loads", f"{key}: {line}") from fault
    added = {name: _add(module, which, delta) for name, module, which, delta in planned}

    def set_scale(scale: float, text: float | None = None) -> None:
        for key, change in added.items():
            change.set_scale(scale_of(key, scale, text))

    def remove() -> None:
        for change in reversed(added.values()):
            change.remove()

    return Loaded(
        count,
        {name: change.weight for name, change in added.items()},
        lambda name, floor: again[name](floor),
        set_scale,
        remove,
    )


def _each(
    grouped: Mapping[str, Mapping[str, Tensor]], joints: Mapping[str, Joint], family: Family
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield names and factors of a file, those of joined modules one by one under our names."""
    for key, held in grouped.items():
        if key not in joints:
            yield key, held
            continue
        try:
            parts = separate(joints[key], held)
        except (LookupError, RuntimeError, TypeError, ValueError) as fault:
            line = " ".join(str(fault).split())[:300]
            raise VerificationError("loads", f"{key}: {line}") from None
        for module, own in parts.items():
            yield family.client_name(LAYOUTS[0], "denoiser", module), own


def _places(family: Family) -> dict[str, tuple[str, Any]]:
    """Return every module that has a weight or bias, by what files may call it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for component, whole in _components(family).items():
        inside: tuple[str, ...] = ()  # what peft has put around a module is not the base's
        for name, module in whole.named_modules():
            if inside and name.startswith(inside):
                continue
            base: Any = module
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                inside = (f"{name}.",)
            if isinstance(getattr(base, "weight", None), _tensor()):
                for layout in LAYOUTS:
                    found[family.client_name(layout, component, name)] = (
                        f"{component}.{name}",
                        base,
                    )
    return found


def _tensor() -> type:
    import torch

    return torch.Tensor


def _fitting(change: Tensor, module: Any, which: str) -> Tensor:
    own = getattr(module, which, None)
    if own is None or own.shape != change.shape:
        there = list(own.shape) if own is not None else "none"
        raise ValueError(f"its {which} has the shape {list(change.shape)}, the base's {there}")
    return change.float().to(own.device)


def _add(module: nn.Module, which: str, delta: Tensor) -> AddedChange | ShiftedParameter:
    from torch import nn

    if which == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
        own: Any = module.weight
        return AddedChange(module, delta.to(own.dtype) if own.is_floating_point() else delta)
    return ShiftedParameter(module, which, delta)


def _moved(
    parts: Mapping[str, Tensor], alpha: float | None, weight: Tensor, delta: Tensor, floor: float
) -> float:
    """Return how far a change moves where each of its numbers is off by `floor`, either way."""
    import torch

    random = torch.Generator().manual_seed(0)
    step = floor * _PROBED
    nudged = {
        name: part.float() + step * torch.randn(part.shape, generator=random).sign().to(part.device)
        for name, part in parts.items()
    }
    return float((deltas.change(nudged, alpha, weight) - delta).norm()) / _PROBED
