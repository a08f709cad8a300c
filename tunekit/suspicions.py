"""What a careful colleague would ask about an adapter file: nothing is refused for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunekit.errors import some
from tunekit.factors import ModuleInfo, is_kohya

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Module -> factor -> shape."""

_LARGEST = {"float16": 65504.0}  # what may come near to overflowing
_PEFT = "base_model.model."
# Factors that a file may hold, and who does not read them.
_RARE = {
    "lokr_t2": "ComfyUI cannot use it",
    "oft_R": "only PEFT reads it",
    "mid": "A1111 and ComfyUI read it, diffusers does not",
}
_UNET = re.compile(r"lora_unet_(down|mid|up|input|middle|output)_block")
_TEXT = re.compile(
    r"^(?:text_encoder(?:_\d)?\.|lora_te\d?_)(?!text_model[._])(?=encoder[._]layers)"
)


@dataclass
class Looks:
    """What is seen of single tensors, as they are read one by one."""

    broken: list[str] = field(default_factory=list)
    huge: list[str] = field(default_factory=list)

    def look(self, key: str, tensor: Tensor) -> None:
        """Note NaN and infinite numbers, and numbers near the end of their format."""
        wide = tensor if tensor.is_complex() else tensor.float()  # 8-bit formats cannot tell
        if not bool(wide.isfinite().all()):
            self.broken.append(key)
        most = _LARGEST.get(str(tensor.dtype).removeprefix("torch."))
        if most is not None and tensor.numel() and float(tensor.abs().max()) > most / 2:
            self.huge.append(key)


def suspicions(
    looks: Looks,
    metadata: Mapping[str, str],
    modules: tuple[ModuleInfo, ...],
    shapes: Shapes,
    unread: tuple[str, ...],
) -> Iterator[str]:
    """Yield in words what a user should look at, the worst first."""
    if looks.broken:
        yield f"NaN or infinite numbers in {some(sorted(looks.broken))}"
    still = [module.name for module in modules if module.norm == 0]
    zero = [name for name in still if "magnitude" not in shapes[name]]
    if turned := [name for name in still if "magnitude" in shapes[name]]:
        yield f"factors of zero, so that magnitudes alone could change anything, in {some(turned)}"
    if zero:
        whole = "the whole adapter changes nothing: " if len(zero) == len(modules) else ""
        yield f"{whole}zero change in {some(zero)}"
    yield from _incomplete(shapes)
    yield from _strength(metadata, modules, shapes)
    if looks.huge:
        yield f"numbers near what the format can hold in {some(sorted(looks.huge))}"
    wide = [m.name for m in modules if m.rank and m.rank > _narrow(shapes[m.name])]
    if wide:
        yield f"a rank above the module's own width in {some(wide)}"
    if unread:
        yield f"tensors that are no factor of an adapter: {some(unread)}"
    yield from _readers(shapes)


def _incomplete(shapes: Shapes) -> Iterator[str]:
    halves = [name for name, parts in shapes.items() if ("down" in parts) != ("up" in parts)]
    if halves:
        yield f"only one of two factors in {some(halves)}"
    bare = [name for name, parts in shapes.items() if set(parts) == {"alpha"}]
    if bare:
        yield f"an alpha without factors in {some(bare)}"


def _strength(
    metadata: Mapping[str, str], modules: tuple[ModuleInfo, ...], shapes: Shapes
) -> Iterator[str]:
    # A whole difference has no rank, and so nothing that an alpha would be held against.
    kohya = [
        name
        for name, parts in shapes.items()
        if is_kohya(name) and "alpha" not in parts and not parts.keys() <= {"diff", "diff_b"}
    ]
    if kohya:
        yield f"no alpha, so that clients take alpha = rank, in {some(kohya)}"
    if any(name.startswith("lora_adapter") for name in metadata) and any(
        module.alpha not in (None, module.rank) for module in modules
    ):
        yield "its alpha is in metadata that only diffusers reads: elsewhere the strength is off"
    alphas = {m.alpha for m in modules if m.rank and "alpha" in shapes[m.name]}
    if len(alphas) > 1 and any(map(_UNET.match, shapes)):
        yield "several alphas: diffusers draws its attention modules with one of them"


def _readers(shapes: Shapes) -> Iterator[str]:
    """Yield what is so named that some or all clients pass over it."""
    peft = [name for name in shapes if name.startswith(_PEFT)]
    if peft:
        yield f"PEFT's own names, which no client draws from (tunekit convert): {some(peft)}"
    flat = [name for name in shapes if _TEXT.match(name)]
    if flat:
        yield (
            "a text encoder's names without text_model, which ComfyUI and sd-scripts pass over "
            f"(tunekit convert): {some(flat)}"
        )
    kohya = [name for name in shapes if is_kohya(name)]
    if kohya and len(kohya) < len(shapes):
        other = [name for name in shapes if not is_kohya(name)]
        yield f"two clients' names in one file, of which each reads its own: {some(other)}"
    dotted = [n for n, parts in shapes.items() if "alpha" in parts and n.startswith("unet.")]
    if dotted:
        yield f"alphas in diffusers' naming, which diffusers refuses: {some(dotted)}"
    dora = [name for name in kohya if "magnitude" in shapes[name]]
    if dora:
        yield (
            "DoRA in kohya's naming, which ComfyUI draws a little off and diffusers without its "
            f"magnitudes (tunekit convert, or resize): {some(dora)}"
        )
    for factor, said in _RARE.items():
        if rare := [name for name, parts in shapes.items() if factor in parts]:
            yield f"{'lora_mid' if factor == 'mid' else factor}: {said}: {some(rare)}"


def _narrow(parts: Mapping[str, tuple[int, ...]]) -> int:
    """Return the smaller of a module's two sizes: no weight change has a higher rank."""
    sizes = []
    if "up" in parts:
        sizes.append(parts["up"][0])
    if "down" in parts:
        wide = 1
        for size in parts["down"][1:]:
            wide *= size
        sizes.append(wide)
    return min(sizes, default=2**31)
