"""An adapter on a tiny base: put on, taught a few steps, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunekit import adapters
from tunekit.adapters.base import Adapter
from tunekit.data.dataset import Batch
from tunekit.families.base import Family
from tunekit.schema import Train
from tunekit.train import train

PROMPTS = ["a zorp robot on the beach", ""]


def attach(family: Family, kind: str, settings: dict[str, Any], seed: int = 0) -> Adapter:
    chosen = adapters.get(kind)
    return chosen.attach(family, chosen.Settings(kind=kind, **settings), seed)


def teach(family: Family, adapter: Adapter, steps: int = 3) -> None:
    size = family.default_resolution
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    text = adapter.trains_text_encoder
    batch = Batch(
        latents=family.encode_image(pixels),
        conditioning={} if text else family.encode_prompt(PROMPTS),
        names=("one.png", "two.png"),
        captions=tuple(PROMPTS),
    )
    settings = Train(steps=steps, batch_size=2, learning_rate=0.01)
    encode = family.encode_prompt if text else None
    assert len(list(train(family, adapter, lambda *_: batch, settings, encode=encode))) == steps


@torch.no_grad()
def predict(family: Family) -> Tensor:
    size = family.default_resolution
    latents = family.encode_image(torch.zeros(2, 3, size, size))
    noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return family.predict(noisy, torch.tensor([100, 900]), family.encode_prompt(PROMPTS))


def snapshot(family: Family) -> dict[str, Any]:
    """Return everything that attaching could leave behind: types, flags, attributes, weights."""
    found: dict[str, Any] = {}
    for component, module in {"denoiser": family.denoiser, **family.text_encoders}.items():
        for name, child in module.named_modules():
            found[f"{component}/{name}"] = (type(child), child.training, sorted(vars(child)))
        for name, parameter in module.named_parameters():
            found[f"{component}:{name}"] = (parameter.requires_grad, parameter.detach().clone())
        for name, buffer in module.named_buffers():
            found[f"{component}:{name}"] = (False, buffer.clone())
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for name, value in before.items():
        if ":" in name:
            assert value[0] == after[name][0], name
            assert torch.equal(value[1], after[name][1]), name
        else:
            assert value == after[name], name
