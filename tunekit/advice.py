"""What would lower a run's memory: settings of its recipe, the cheapest first, with their prices.

Pure: `tunekit plan` and a run that ran out of memory say the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunekit.recipe import Recipe

_HALF = ("bf16", "fp16")
_NARROW = {
    "int8": "the denoiser's frozen weights are rounded to 8 bits; steps are slower",
    "nf4": "the denoiser's frozen weights are rounded to 4 bits, which can be seen; slower steps",
}
# What an optimizer keeps for each number that trains is at least a fourth with these.
_LEANER = {
    "adamw": "adamw8bit",
    "schedulefree_adamw": "adamw8bit",
    "prodigy": "adamw8bit",
    "lion": "lion8bit",
    "came": "adafactor",
    "muon": "adafactor",
}


@dataclass(frozen=True)
class Advice:
    """Settings that together lower the memory.

    settings: ``KEY=VALUE``, as a verb takes them behind the recipe. lowers: the part that gets
    smaller, by its name in a plan. price: what they cost, in words; `free` where the result stays
    the same but for rounding.
    """

    settings: tuple[str, ...]
    lowers: str
    price: str
    free: bool = False

    def __str__(self) -> str:
        return f"{' '.join(self.settings)}: {self.price}"


def lower_memory(recipe: Recipe, resolution: int | None = None) -> list[Advice]:
    """Return what would lower the memory that training takes, the cheapest first.

    resolution: edge of the pictures in pixels, where the recipe leaves it to the base. Whatever is
    set already, or would contradict the recipe, is not advised.
    """
    return [*_free(recipe), *_rounding(recipe), *_less(recipe, resolution)]


def lower_drawing(recipe: Recipe, resolution: int | None = None) -> list[Advice]:
    """Return what of `lower_memory` also lowers what drawing takes: a smaller base and picture."""
    return [
        advice
        for advice in lower_memory(recipe, resolution)
        if advice.lowers == "base" or advice.settings[0].startswith("data.resolution=")
    ]


def lower_asked(
    quantize: str | None, batch: int = 1, size: tuple[int, int] | None = None
) -> list[Advice]:
    """Return the options of `tunekit generate` that would lower its memory, the cheapest first.

    quantize: as of `base.quantize`; batch: pictures at a time; size: their width and height in
    pixels, None where none is drawn yet, or no option changes it.
    """
    found = []
    if batch > 1:
        price = "the same pictures but for rounding; slower on a GPU, hardly on a processor"
        found.append(Advice((f"--batch={batch // 2}",), "activations", price, free=True))
    for kind, price in _NARROW.items():
        if quantize is None or (quantize != "nf4" and kind == "nf4"):  # all others are of 8 bits
            found.append(Advice((f"--quantize={kind}",), "base", price))
    if size is not None and max(size) >= 512:
        width, height = (max(64, edge * 3 // 4 // 64 * 64) for edge in size)
        settings = (f"--width={width}", f"--height={height}")
        found.append(Advice(settings, "activations", "smaller pictures, with less in them"))
    return found


def _free(recipe: Recipe) -> Iterator[Advice]:
    """Yield what leaves the result as it is, and costs time alone."""
    train = recipe.train
    if train.batch_size > 1 and not train.fused_backward:
        size = next(n for n in range(train.batch_size // 2, 0, -1) if train.batch_size % n == 0)
        passes = train.gradient_accumulation * (train.batch_size // size)
        yield Advice(
            (f"train.batch_size={size}", f"train.gradient_accumulation={passes}"),
            "activations",
            "the same steps in smaller parts; slower on a GPU, hardly on a processor",
            free=True,
        )
    if not train.gradient_checkpointing:
        yield Advice(
            ("train.gradient_checkpointing=true",),
            "activations",
            "the same result; each step takes about a third longer",
            free=True,
        )


def _rounding(recipe: Recipe) -> Iterator[Advice]:
    """Yield what rounds numbers, or leaves a guard away, and mostly goes unnoticed."""
    base, train = recipe.base, recipe.train
    if _can_fuse(recipe):
        clipped = train.max_grad_norm > 0
        yield Advice(
            ("train.fused_backward=true", *(["train.max_grad_norm=0"] if clipped else [])),
            "gradients",
            "each weight is stepped as soon as its gradient is there"
            + (", which is no longer clipped" if clipped else ", with the same result"),
            free=not clipped,
        )
    if train.precision == "fp32":
        yield Advice(
            ("train.precision=bf16",),
            "activations",
            "forward and backward passes round to 3 digits; slow on processors without bf16",
        )
    # Parameters of one optimizer are not another's.
    if (leaner := _LEANER.get(train.optimizer)) and not train.optimizer_args:
        settings = [f"train.optimizer={leaner}"]
        if leaner == "adafactor" and train.betas is not None:
            settings.append("train.betas=null")  # it has none
        if train.optimizer == "prodigy":
            settings.append("train.learning_rate=1e-4")  # prodigy's is a factor on what it finds
        yield Advice(
            tuple(settings),
            "optimizer state",
            "its state is held in 8 bits or in factors; the way of training differs a little",
        )
    adapter = recipe.adapter
    held = adapter is not None and adapter.trains_weights
    if base.dtype not in _HALF and not held and base.quantize is None:
        yield Advice(
            ("base.dtype=bf16",), "base", "the frozen weights are rounded to 3 digits, and half"
        )
    for kind, price in _NARROW.items() if base.quantize is None else ():
        if adapter is None or adapter.quantize_fault(kind) is None:
            yield Advice((f"base.quantize={kind}",), "base", price)


def _less(recipe: Recipe, resolution: int | None) -> Iterator[Advice]:
    """Yield what learns less, or otherwise."""
    train, adapter = recipe.train, recipe.adapter
    if train.ema is not None:
        yield Advice(("train.ema=null",), "average", "no average of the weights: the last counts")
    if adapter is not None and adapter.trains_text_encoder():
        settings = ["adapter.text_encoder=false"]
        for key in ("text_encoder_targets", "text_encoder_rank"):
            if getattr(adapter, key, None) is not None:
                settings.append(f"adapter.{key}=null")
        yield Advice(
            tuple(settings), "activations", "the words themselves learn nothing, only the pictures"
        )
    rank = getattr(adapter, "rank", None)
    if isinstance(rank, int) and rank > 4 and train.optimizer != "muon":
        yield Advice((f"adapter.rank={rank // 2}",), "what trains", "half as much can be learned")
    edges = recipe.data.resolutions or ((resolution,) if resolution else ())
    if len(edges) == 1 and edges[0] >= 512:
        smaller = edges[0] * 3 // 4 // 64 * 64
        yield Advice(
            (f"data.resolution={smaller}",), "activations", "finer details are not learned"
        )
    everything = getattr(adapter, "targets", None) == "all"
    if adapter is not None and adapter.trains_weights and everything:
        yield Advice(
            ("adapter.targets=attention",),
            "what trains",
            "only what ties pictures to words learns, not the whole denoiser",
        )


def _can_fuse(recipe: Recipe) -> bool:
    """Say whether `fused_backward` would save something and contradict nothing."""
    train = recipe.train
    return (
        recipe.adapter is not None
        and recipe.adapter.trains_weights
        and not train.fused_backward
        and train.optimizer not in ("prodigy", "schedulefree_adamw")
        and train.gradient_accumulation == 1
        and recipe.data.prior is None
        and train.precision != "fp16"
        and train.on_nonfinite == "stop"
        and train.on_spike == "warn"
    )
