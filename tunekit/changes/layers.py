"""Changes of weights inside live modules: those of peft's layers, and those added by a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Handle = Any
"""torch's RemovableHandle."""


def weight_of(module: nn.Module) -> Tensor:
    """Return a module's weight in numbers that can be reckoned with, also of a quantised module."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight.detach()


def bare(module: nn.Module) -> nn.Module:
    """Return the base's own module, which peft may have put a layer around."""
    inner: Any = getattr(module, "get_base_layer", None)
    found: nn.Module = module if inner is None else inner()
    return found


def untouched(module: nn.Module, which: str) -> Tensor:
    """Return the base's own parameter, whatever `ShiftedParameter` has put in its place."""
    own: Any = getattr(module, which)
    found: Tensor = getattr(own, "unshifted", own)
    return found.detach()


def apply(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """Return what a Linear or Conv2d of `module`'s geometry, with another weight, makes of x.

    Without the bias; computed in the weight's number format, returned in x's.
    """
    from torch import nn
    from torch.nn import functional

    given = x.to(weight.dtype)
    if isinstance(module, nn.Linear):
        return functional.linear(given, weight).to(x.dtype)
    geometry = (module.stride, module.padding, module.dilation, module.groups)
    return functional.conv2d(given, weight, None, *geometry).to(x.dtype)


class AddedChange:
    """A fixed change of a Linear's or Conv2d's weight, added to its output and never to the weight.

    So a base in half precision or quantised loses nothing of it, several can be on one module, and
    peft's layers can be around it. delta: at strength 1, of the weight's shape.
    """

    def __init__(self, module: nn.Module, delta: Tensor) -> None:
        self._delta, self._scale = delta, 1.0
        self._handle: Handle = module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._scale:
            return output
        added = apply(module, self._delta, args[0])
        return output + added.to(output.dtype) * self._scale

    def set_scale(self, scale: float) -> None:
        """Draw with `scale` times the change."""
        self._scale = scale

    def weight(self) -> Tensor:
        """Return the change at its present strength, float32 on the CPU."""
        return self._delta.float().cpu() * self._scale

    def remove(self) -> None:
        """Take it off again."""
        self._handle.remove()


class ShiftedParameter:
    """A fixed change of a parameter that no product is made with: a bias, a norm's weight.

    The module holds a copy meanwhile; the base's own tensor is never written. Several add up.
    """

    def __init__(self, module: nn.Module, name: str, delta: Tensor) -> None:
        self._module, self._name = module, name
        self._delta, self._scale = delta, 1.0
        own: Any = getattr(module, name)
        self._before = getattr(own, "unshifted", own)
        self._all: list[ShiftedParameter] = getattr(own, "shifts", [])
        self._all.append(self)
        self._put()

    def _put(self) -> None:
        from torch import nn

        acting = [shift for shift in self._all if shift._scale]
        value: Any = self._before
        if self._all:
            shifted = self._before.detach().float()
            for shift in acting:
                shifted = shifted + shift._scale * shift._delta
            value = nn.Parameter(shifted.to(self._before.dtype), requires_grad=False)
            value.unshifted, value.shifts = self._before, self._all
        setattr(self._module, self._name, value)

    def set_scale(self, scale: float) -> None:
        """Draw with `scale` times the change."""
        self._scale = scale
        self._put()

    def weight(self) -> Tensor:
        """Return the change at its present strength, float32 on the CPU."""
        return self._delta.float().cpu() * self._scale

    def remove(self) -> None:
        """Take it off again."""
        self._all.remove(self)
        self._put()


def has_magnitude(layer: Any, name: str) -> bool:
    """Say whether adapter `name` of a peft layer is a DoRA."""
    return name in getattr(layer, "lora_magnitude_vector", ())


def peft_change(layer: Any, name: str) -> Tensor:
    """Return what adapter `name` of a peft layer adds to the weight, float32 on the CPU."""
    import torch

    with torch.no_grad():
        delta: Tensor = layer.get_delta_weight(name).float()
        if has_magnitude(layer, name):
            weight = weight_of(layer.get_base_layer()).float()
            whole = weight + delta.reshape(weight.shape)
            magnitude = layer.lora_magnitude_vector[name].weight.float().flatten()
            share = magnitude / lengths(whole)
            delta = whole * share.view(-1, *[1] * (whole.ndim - 1)) - weight
    done: Tensor = delta.detach().cpu()
    return done


def lengths(weight: Tensor) -> Tensor:
    """Return the norm of each output's weights: [out]."""
    import torch

    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms


def strength_setter(layer: Any, name: str) -> Callable[[float], None]:
    """Return what sets the strength of adapter `name` of a peft layer.

    peft scales the low-rank part alone. A DoRA's magnitude goes the same share of the way from the
    base's own, so that strength 0 is the untouched base here too.
    """
    from torch import nn

    if not has_magnitude(layer, name):
        return lambda scale: layer.set_scale(name, scale)
    place = layer.lora_magnitude_vector[name]
    learned = place.weight
    base = lengths(weight_of(layer.get_base_layer()).float()).view(learned.shape).to(learned.dtype)

    def set_scale(scale: float) -> None:
        layer.set_scale(name, scale)
        between = base + scale * (learned.detach() - base)
        place.weight = learned if scale == 1 else nn.Parameter(between, requires_grad=False)

    return set_scale
