"""A run in shapes: prepared, drawn, trained, saved, exported and evaluated, all without numbers.

Every phase does what a run does with its tensors, so that a ledger can tell what each takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunekit.forward import checkpoint
from tunekit.optim import saved_bytes, state_bytes
from tunekit.plan.ledger import GRADIENTS, Ledger

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.families.base import Conditioning
    from tunekit.plan.heap import Heap
    from tunekit.plan.outline import Outline
    from tunekit.recipe import Recipe

PREPARING, FIRST, TRAINING, SAVING, DRAWING, EXPORTING, EVALUATING = (
    "preparing",
    "first samples",
    "training",
    "saving",
    "samples",
    "exporting",
    "evaluating",
)
TRAINS, STATE, AVERAGE = "what trains", "optimizer state", "average of the weights"
_COPIES, _CHANGES = "copies", "changes of weights"
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of pictures. largest: of those that train. prior: of those of the class, None
    without. together: whether some that train are of that size, and share a pass with them."""

    largest: Size
    prior: Size | None = None
    together: bool = False


def walk(outline: Outline, recipe: Recipe, sizes: Sizes, heap: Heap | None = None) -> Ledger:
    """Go through a run and return what it allocated. heap: the allocator, asked for the same."""
    ledger = outline.ledger(heap)
    run = _Run(outline, recipe, ledger)
    with outline.mode, ledger, _quiet():
        run.prepare(sizes.largest)
        if recipe.train.sample_every:
            with ledger.phase(FIRST):
                run.draw()
        run.train(sizes)
        run.save()
        with ledger.phase(DRAWING):
            run.draw()
        ledger.drop(STATE, AVERAGE)
        run.export()
        with ledger.phase(EVALUATING):
            run.draw()
    return ledger


class _Run:
    def __init__(self, outline: Outline, recipe: Recipe, ledger: Ledger) -> None:
        self.outline, self.recipe, self.ledger = outline, recipe, ledger
        self.family: Any = outline.family
        self.sizes = outline.sizes()
        self.ours = list(outline.trained.values())

    def prepare(self, size: Size) -> None:
        data = self.recipe.data
        with self.ledger.phase(PREPARING):
            self.latents = self.encode(size)
            self.prompt(1)
            if data.prior is not None and data.prior.source is None:
                self.draw()
            self.ledger.keep(TRAINS, self.sizes)

    @torch.no_grad()
    def encode(self, size: Size) -> tuple[int, ...]:
        """Return the shape of a picture's latents, [C, h, w]."""
        width, height = size
        pixels = torch.zeros(1, 3, height, width, dtype=self.family.dtype)
        found = self.family.vae.encode(pixels)
        direct = getattr(found, "latent", None)
        latents: Tensor = found.latent_dist.mode() if direct is None else direct
        self.factor = height // latents.shape[-2]
        return tuple(latents.shape[1:])

    @torch.no_grad()
    def prompt(self, count: int) -> Conditioning:
        found: Conditioning = self.family.encode_prompt(["a"] * count)
        return found

    @torch.no_grad()
    def draw(self) -> None:
        """Draw a picture in two steps: with guidance, of two predictions at a time."""
        evaluate, adapter = self.recipe.evaluate, self.outline.adapter
        if adapter is not None:
            adapter.train(False)
        edge = (self.recipe.data.resolutions or (self.family.default_resolution,))[0]
        count = 2 if evaluate.guidance_scale > 1 else 1
        shape = (self.latents[0], edge // self.factor, edge // self.factor)
        told = self.prompt(count)
        noisy = torch.randn(1, *shape, dtype=self.family.dtype)
        for _ in range(2):
            both = torch.cat([noisy] * count)
            predicted = self.family.predict(both, torch.ones(count, dtype=torch.int64), told)
            noisy = noisy + predicted[:1].to(noisy.dtype)
        picture = self.family.vae.decode(noisy, return_dict=False)[0]
        (picture / 2 + 0.5).clamp(0, 1).float()

    def train(self, sizes: Sizes) -> None:
        """Take two steps: the second has the optimizer's state of the first beside it."""
        settings, ledger = self.recipe.train, self.ledger
        one, two = settings.batch_size, 2 * settings.batch_size
        alone = not sizes.together or sizes.largest != sizes.prior
        shapes = [(one, *self.latents)] if alone else []
        if sizes.prior is not None:
            width, height = (edge // self.factor for edge in sizes.prior)
            shapes.append((two if sizes.together else one, self.latents[0], height, width))
        shapes *= min(2, settings.gradient_accumulation)
        checkpoint(self.family, settings)

        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            ledger.call(GRADIENTS, parameter.grad)
            if settings.fused_backward:
                parameter.grad = None

        hooks = [
            one.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            for one in self.ours
        ]
        told: dict[int, Conditioning | None] = {shape[0]: None for shape in shapes}
        if not self.recipe.trains_text_encoder():
            told = {count: self.prompt(count) for count in told}
        with ledger.phase(TRAINING):
            if settings.ema is not None:
                ledger.keep(AVERAGE, self.sizes)
            for step in range(2):
                if self.outline.adapter is not None:
                    self.outline.adapter.train()
                for shape in shapes:
                    self.step(shape, told[shape[0]])
                if not step:
                    ledger.keep(STATE, state_bytes(settings, self.outline.groups))
                for parameter in self.ours:
                    parameter.grad = None
        for hook in hooks:
            hook.remove()

    def step(self, shape: tuple[int, ...], conditioning: Conditioning | None) -> None:
        """Run one batch, of the shape [B, C, h, w], forward and backward."""
        count = shape[0]
        latents, noise = torch.zeros(shape), torch.zeros(shape)
        noisy = latents + noise
        with self.ledger.forward():
            with self.precision():
                told = conditioning or self.family.encode_prompt(["a"] * count)
                timesteps = torch.ones(count, dtype=torch.int64)
                predicted = self.family.predict(noisy, timesteps, told)
            loss = ((predicted.float() - noise) ** 2).flatten(1).mean(1).sum()
        loss.backward()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.train.precision)
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=kind)

    def save(self) -> None:
        """Copy all that a checkpoint holds; what draws is another copy where it is an average."""
        settings, ledger = self.recipe.train, self.ledger
        averaged = settings.optimizer == "schedulefree_adamw" or (
            settings.ema is not None and settings.ema_export
        )
        with ledger.phase(SAVING):
            if averaged:
                ledger.keep(AVERAGE, self.sizes)
            ledger.keep(_COPIES, saved_bytes(settings, self.outline.groups))
            ledger.drop(_COPIES)

    def export(self) -> None:
        """Write what was learned, in the file's format, and put it into a fresh base."""
        recipe, ledger = self.recipe, self.ledger
        edge = min(self.family.default_resolution, 32 * self.family.size_multiple)
        half = 2 if recipe.export.dtype != "fp32" else 1
        adapter = recipe.adapter
        with ledger.phase(EXPORTING):
            self.encode((edge, edge))
            self.prompt(1)
            ledger.keep(_COPIES, self.sizes)
            ledger.keep(_COPIES, [size // half for size in self.sizes])
            ledger.drop(_COPIES)
            ledger.keep(_CHANGES, [size // half for size in self.sizes])
            # What diffusers reads stays in factors; of others the whole change is reckoned.
            read = adapter is None or adapter.layout_fault("diffusers") is None
            ledger.keep(_CHANGES, self.sizes if read else self.outline.changed())
        ledger.drop(TRAINS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries warn of, which a run tells itself."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
