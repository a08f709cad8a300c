"""A base in fewer bits: the frozen Linears of a denoiser are held as 4 or 8 bits a weight.

nf4: Dettmers et al. 2023, "QLoRA", blocks of weights share a scale. int8: one scale a row,
Dettmers et al. 2022, "LLM.int8()". Both are packed by bitsandbytes; int8_torchao and fp8_torchao by
torchao, with one scale a row. Only storage is narrow: a product is made with the weight as it
unpacks to, in the format of its input, the same in training and in drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LEAST = 4096
"""Linears with fewer weights than this stay as they are: little to save, and much to lose."""

# What each kind takes beside its codes: bytes for every row.
_PER_ROW = {"int8": 4, "int8_torchao": 5, "fp8_torchao": 4}
_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes"}


def bytes_of(shape: Sequence[int], kind: str) -> int:
    """Return the bytes that a Linear's weight takes once quantised, its bias not counted.

    shape: [out, in], of which `pays` says that it is. kind: one of `base.quantize`.
    """
    out, into = shape
    if kind == "nf4":
        # 4 bits a weight, a float32 for each block, and the table of the 16 values
        return out * into // 2 + 4 * (out * into // block(into)) + 64
    return out * into + _PER_ROW[kind] * out


def pays(shape: Sequence[int], kind: str) -> bool:
    """Return whether a Linear with a weight of this shape, [out, in], is quantised."""
    return math.prod(shape) >= LEAST and (kind != "nf4" or block(shape[1]) > 0)


def block(width: int) -> int:
    """Return how many weights share a scale in nf4 in a layer with so many inputs; 0: none fit.

    64, as in the paper, or 32: bitsandbytes 0.50 unpacks blocks that reach into the next row
    wrongly on the CPU, by half of the weight.
    """
    return next((size for size in (64, 32) if width % size == 0), 0)


def check(kind: str) -> None:
    """Raise UserError where the package that `kind` needs is not installed."""
    import importlib.util

    package = _PACKAGES.get(kind, "torchao")
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"base.quantize: {kind} needs the package {package}: pip install 'tunekit[quantize]'"
        )


def quantize(model: nn.Module, kind: str, device: torch.device | str | None = None) -> None:
    """Hold the Linears of `model` that are worth it in fewer bits, in place.

    What the model itself wants in float32 (diffusers' `_keep_in_fp32_modules`) stays as it is.
    device: where each of them is moved before it is packed, so that the full weights are never
    there together; None: where it is. Raises UserError where the package is missing.
    """
    check(kind)
    chosen = _chosen(model, kind)
    if kind in _PACKAGES:
        for name, linear in chosen.items():
            model.set_submodule(name, _packed(linear.to(device), kind))
        # By these peft, and diffusers' loader of adapters through it, know the layers.
        setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
        return
    from torchao.quantization import quantize_

    # torchao stores in whatever the weight was in; peft asks for the configuration by this way.
    for linear in chosen.values():
        quantize_(linear.to(device), _configuration(kind))
        linear.weight.requires_grad_(False)
        linear.stored_as = kind
    settings = SimpleNamespace(get_apply_tensor_subclass=lambda: _configuration(kind))
    model.hf_quantizer = SimpleNamespace(quantization_config=settings)  # type: ignore[assignment]


def _chosen(model: nn.Module, kind: str) -> dict[str, Any]:
    """Return the Linears to quantise, by name."""
    from torch import nn

    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and pays(module.weight.shape, kind)
        and not kept & {*name.split(".")}
    }


def _configuration(kind: str) -> Any:
    from torchao import quantization

    whole = {"int8_torchao": "Int8WeightOnlyConfig", "fp8_torchao": "Float8WeightOnlyConfig"}
    return getattr(quantization, whole[kind])()


def held(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Return the quantised Linears of a model by name, each with its kind; also under adapters."""
    return {
        name: (module, module.stored_as)
        for name, module in model.named_modules()
        if hasattr(module, "stored_as")
    }


def bytes_held(model: nn.Module) -> int:
    """Return the bytes of all parameters of a model, scales and tables of quantised ones too."""
    quantised = {id(layer.weight): layer for layer, _ in held(model).values()}
    return sum(
        sum(t.numel() * t.element_size() for t in _stored(quantised[id(p)]))
        if id(p) in quantised
        else p.numel() * p.element_size()
        for p in model.parameters()
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's `state_dict` in plain tensors, as quantised ones are stored."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(tensor, part) for part in parts}
        else:
            found[name] = tensor
    return found


def notes(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Return what is worth telling of a quantised model, whose other weights are in `dtype`."""
    quantised = held(model)
    if not quantised:
        return []
    kind = next(kind for _, kind in quantised.values())
    wide = sum(layer.in_features * layer.out_features for layer, _ in quantised.values())
    now = sum(t.numel() * t.element_size() for m, _ in quantised.values() for t in _stored(m))
    saved = wide * dtype.itemsize - now
    whole = bytes_held(model) + saved
    return [
        f"base.quantize: {len(quantised)} layers of the denoiser are held as {kind}, which saves "
        f"{saved / 1e6:,.1f} of its {whole / 1e6:,.1f} MB; samples and scores are drawn with this "
        "base, and the exported files are for the full one"
    ]


def _stored(module: Any) -> list[Tensor]:
    """Return every tensor that holds a quantised weight."""
    weight = module.weight
    if hasattr(weight, "__tensor_flatten__"):
        parts, _ = weight.__tensor_flatten__()
        return [getattr(weight, part) for part in parts]
    stored: list[Tensor] = module.stored()
    return stored


def _packed(linear: Any, kind: str) -> nn.Module:
    """Return a layer of bitsandbytes with the weight of `linear`, on its device, and its bias."""
    from tunekit.packed import Int8, Nf4

    layer: nn.Module = Nf4(linear, block(linear.in_features)) if kind == "nf4" else Int8(linear)
    return layer.eval()
