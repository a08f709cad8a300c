"""Linears whose frozen weight is held in 4 or 8 bits, as bitsandbytes packs it.

They are bitsandbytes' own layers but for the product. Its own would repack nf4 for AVX512-BF16 at
the first drawing, after which no gradient passes, and would round the inputs of int8 too in eval
mode, in which the base always is: samples would not show what was trained.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional


class _Keeping(nn.Module):
    """Takes its own weight back as it is given.

    peft puts it back after it was unpacked for a DoRA. Where diffusers has it do so without
    memory for new parameters, accelerate would leave an empty one instead.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self._parameters.get("weight") is not None:
            self._parameters["weight"] = value
        else:
            super().__setattr__(name, value)


class Nf4(_Keeping, bnb.nn.Linear4bit):  # type: ignore[misc]
    """4 bits a weight, in blocks that share a scale (Dettmers et al. 2023, "QLoRA")."""

    stored_as = "nf4"

    def __init__(self, linear: nn.Linear, block: int) -> None:
        # Built on "meta": a new layer of this size would be filled with random numbers first.
        bias = linear.bias is not None
        super().__init__(
            linear.in_features, linear.out_features, bias, quant_type="nf4", device="meta"
        )
        weight = linear.weight.detach()
        packed = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            blocksize=block,
            compress_statistics=False,
            quant_type="nf4",
            module=self,
        )
        self.weight = packed.to(weight.device)
        self.bias = linear.bias
        self.support_avx512bf16_for_cpu = False

    def whole(self) -> Tensor:
        """Return the weight it stands for, [out, in], in the format it was packed from."""
        state = self.weight.quant_state
        return bnb.functional.dequantize_4bit(self.weight.data, state)  # type: ignore[no-any-return]

    def stored(self) -> list[Tensor]:
        """Return all tensors that hold the weight."""
        return [self.weight.data, self.weight.quant_state.absmax, self.weight.quant_state.code]

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self)


class Int8(_Keeping, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """8 bits a weight and a scale a row (Dettmers et al. 2022, "LLM.int8()")."""

    stored_as = "int8"
    state: Any

    def __init__(self, linear: nn.Linear) -> None:
        bias = linear.bias is not None
        super().__init__(
            linear.in_features, linear.out_features, bias, has_fp16_weights=False, device="meta"
        )
        weight = linear.weight.detach()
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        self.weight = bnb.nn.Int8Params(codes, requires_grad=False)
        self.state.SCB = scales
        self.bias = linear.bias

    def whole(self) -> Tensor:
        """Return the weight it stands for, [out, in] float32."""
        scales = self.state.SCB
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, scales)  # type: ignore[no-any-return]

    def stored(self) -> list[Tensor]:
        """Return all tensors that hold the weight."""
        return [self.weight.data, self.state.SCB]

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self)


def product(x: Tensor, layer: Nf4 | Int8) -> Tensor:
    """Return W x + b: [..., in] -> [..., out], in x's format, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        made: Tensor = _Unpacking.apply(x, layer)  # type: ignore[no-untyped-call]
        return made if layer.bias is None else made + layer.bias.to(made.dtype)


class _Unpacking(torch.autograd.Function):
    """A product that remembers no weight: it is unpacked again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4 | Int8) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.whole().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.whole().to(gradient.dtype), None
