"""The loop in small: an adapter on a tiny base, four pictures, and what came of their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunekit import adapters
from tunekit.adapters.base import Adapter
from tunekit.data.dataset import Batch
from tunekit.families.base import Family
from tunekit.schema import Train
from tunekit.train import StepRecord, train

Load = Callable[..., Family]
CAPTIONS = ("a zorp robot", "a zorp robot on the beach", "a red robot", "")
NAMES = tuple(f"zorp/{i}.png" for i in range(4))


def attach(family: Family, seed: int = 0, **settings: Any) -> Adapter:
    lora = adapters.get("lora")
    return lora.attach(family, lora.Settings(kind="lora", **{"rank": 4} | settings), seed)


class Pictures:
    """Four pictures, handed out `size` at a time and in turn: micro-batch m of a step starts at
    m * size."""

    def __init__(self, family: Family, size: int = 4, text: bool = False) -> None:
        edge = family.default_resolution
        pixels = torch.rand(4, 3, edge, edge, generator=torch.Generator().manual_seed(9)) * 2 - 1
        self.latents = family.encode_image(pixels)
        self.conditioning = {} if text else family.encode_prompt(CAPTIONS)
        self.size = size
        self.asked: list[tuple[int, int]] = []

    def __call__(self, step: int, micro: int) -> Batch:
        self.asked.append((step, micro))
        rows = [(micro * self.size + i) % 4 for i in range(self.size)]
        return Batch(
            latents=self.latents[rows],
            conditioning={key: value[rows] for key, value in self.conditioning.items()},
            names=tuple(NAMES[i] for i in rows),
            captions=tuple(CAPTIONS[i] for i in rows),
        )


def settings(**values: Any) -> Train:
    return Train(**{"steps": 3, "batch_size": 4, "learning_rate": 1e-3} | values)


def run(
    load_tiny: Load, adapter: dict[str, Any] | None = None, size: int = 4, **values: Any
) -> Any:
    """Train afresh and return (state, records)."""
    family = load_tiny("sd", prediction_type="v_prediction")
    attached = attach(family, **adapter or {})
    encode = family.encode_prompt if attached.trains_text_encoder else None
    pictures = Pictures(family, size, text=encode is not None)
    records = list(train(family, attached, pictures, settings(**values), encode=encode))
    return attached.state(), records


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def untimed(records: Sequence[StepRecord]) -> list[StepRecord]:
    timed = {"images_per_second": 0.0, "seconds": 0.0, "memory_bytes": 0}
    return [dataclasses.replace(record, **timed) for record in records]


def watch_gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Return a dict that fills with what has been accumulated in each parameter."""
    seen: dict[str, Tensor] = {}
    for name, parameter in adapter.trained().items():

        def keep(p: Tensor, name: str = name) -> None:
            assert p.grad is not None
            seen[name] = p.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)
    return seen
