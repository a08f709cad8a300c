"""The components of a base by their diffusers names: loaded when needed, whole or not at all."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tunekit import singlefile
from tunekit.errors import UserError
from tunekit.modelfolder import ModelFolder, loading

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.schema import Base

# A table of 0, 1, 2, ... that older transformers saved among a text encoder's weights.
_HARMLESS = ("position_ids",)
# What a T5 encoder's files hold a second time: one table, tied under two names.
_TIED = ("encoder.embed_tokens.weight",)


class Parts:
    """The components of one base, frozen (`requires_grad` False, `eval()`), on one device.

    kinds: component -> its class's name in diffusers or transformers. On the device "meta" they are
    built from their configurations alone, and no weight is read.
    """

    def __init__(
        self, folder: ModelFolder, kinds: Mapping[str, str], base: Base, device: torch.device
    ) -> None:
        self.kinds = dict(kinds)
        self.device = device
        self.dtype = dtype_of(base)
        self._folder = folder
        self._variant = base.variant
        self._loaded: dict[str, nn.Module] = {}
        self._counts: dict[str, int] = {}

    def __getitem__(self, name: str) -> nn.Module:
        """Return a component, loaded if it is not in memory."""
        if name not in self._loaded:
            module = self._read(name)
            self._counts[name] = sum(1 for _ in module.parameters())
            self._loaded[name] = module.to(self.device).requires_grad_(False).eval()
        return self._loaded[name]

    def release(self, *names: str) -> None:
        """Drop components from memory; none may train or carry an adapter."""
        import torch

        for name in names:
            assert name in self.kinds, name
            module = self._loaded.get(name)
            if module is None:
                continue
            assert not any(p.requires_grad for p in module.parameters()), f"{name} trains"
            extra = sum(1 for _ in module.parameters()) - self._counts[name]
            assert not extra, f"an adapter is attached to {name}"
            del self._loaded[name], module
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self, name: str) -> nn.Module:
        kind, folder = class_of(self.kinds[name]), self._folder
        if self.device.type == "meta":
            return _outlined(kind, folder, name).to(self.dtype)
        if folder.weights is not None:
            return singlefile.load(kind, folder.weights, folder.path, name, self.dtype)
        return _from_folder(kind, folder, name, self.dtype, self._variant)


def dtype_of(base: Base) -> torch.dtype:
    """Return the number format of `base.dtype`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[base.dtype]


def class_of(name: str) -> Any:
    """Return a model's class by its name in diffusers or transformers."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if hasattr(library, name):
            return getattr(library, name)
    raise AssertionError(f"neither diffusers nor transformers has {name}")


def _outlined(kind: Any, folder: ModelFolder, name: str) -> nn.Module:
    """Return a component without weights: names, shapes and configuration."""
    import torch

    config = dict(folder.configs.get(name, {}))
    with loading(str(folder.path / name)), quiet(), torch.device("meta"):
        if hasattr(kind, "from_config"):  # diffusers
            module: nn.Module = kind.from_config(config)
        else:
            module = kind(kind.config_class.from_dict(config))
    return module


def _from_folder(
    kind: Any, folder: ModelFolder, name: str, dtype: torch.dtype, variant: str | None
) -> nn.Module:
    """Return a component with every one of its weights read from the folder's safetensors."""
    # The two libraries call it by two names.
    precision = "torch_dtype" if hasattr(kind, "from_config") else "dtype"
    where: dict[str, Any] = {"subfolder": name, "use_safetensors": True, "variant": variant}
    where[precision] = dtype
    with loading(str(folder.path / name)), quiet():
        module, report = kind.from_pretrained(folder.path, output_loading_info=True, **where)
    # The libraries fill a missing weight with random numbers and go on.
    if missing := sorted(set(report["missing_keys"]) - set(_TIED)):
        raise UserError(
            f"{folder.path / name}: {len(missing)} weights are missing, such as {missing[0]}; "
            "the folder is incomplete or was saved under names this version does not read"
        )
    # And drop weights that the configuration has no place for, such as whole blocks.
    unused = sorted(key for key in report["unexpected_keys"] if not key.endswith(_HARMLESS))
    if unused:
        raise UserError(
            f"{folder.path / name}: its config.json has no place for {len(unused)} of the weights, "
            f"such as {unused[0]}; configuration and weights do not belong together"
        )
    loaded: nn.Module = module
    return loaded


def scheduler(folder: ModelFolder) -> Any:
    """Return the sampler that the folder names, with its configuration."""
    import diffusers

    name = folder.model_index["scheduler"][1]
    kind = getattr(diffusers, name, None) if str(name).endswith("Scheduler") else None
    if kind is None:
        raise UserError(f"{folder.label}: model_index.json names no scheduler of diffusers: {name}")
    with loading(f"{folder.label}: scheduler"):
        return kind.from_pretrained(folder.path, subfolder="scheduler", local_files_only=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' loading bar, which would run through the run's own progress."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
