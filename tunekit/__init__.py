"""Teach a frozen latent diffusion model one new thing, and prove that it was learned.

Names are imported when they are first used, so that `import tunekit` costs nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunekit.generate import load
    from tunekit.recipe import Recipe
    from tunekit.run import train

# Read when torch starts its threads. Threads that spin while they wait for each other bring a busy
# machine to a standstill: beside other work, one picture took 8 minutes instead of 5 seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What the libraries say when they are imported, of kernels they do without and of each other's
# versions: nothing that a user could do anything about. Whatever else they say is shown.
_HELD_BACK = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor",),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),
}


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in _HELD_BACK[record.name])


for _name in _HELD_BACK:
    logging.getLogger(_name).addFilter(_is_worth_showing)

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "load", "train"]


class _Package(ModuleType):
    """The package, whose `train` stays the function of that name.

    Importing the module `tunekit.train` would set the attribute to that module, and whether
    `tunekit.train(...)` works would depend on what was imported before.
    """

    @property
    def train(self) -> Any:
        from tunekit.run import train

        return train

    @train.setter
    def train(self, value: ModuleType) -> None:
        assert value is sys.modules[f"{__name__}.train"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from tunekit.generate import load

        return load
    if name == "Recipe":
        from tunekit.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
