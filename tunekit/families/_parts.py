"""The components of a base by their diffusers names: loaded when needed, whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import singlefile
from tunekit.errors import UserError
from tunekit.modelfolder import ModelFolder, loading, read_json, say
from tunekit.quantize import quantize

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.changes.joined import Piece
    from tunekit.schema import Base

    Table = Callable[[str, nn.Module], Mapping[str, Sequence[Piece]] | None]

# A table of 0, 1, 2, ... that older transformers saved among a text encoder's weights.
_HARMLESS = ("position_ids",)
# What a T5 encoder's files hold a second time: one table, tied under two names.
TIED = ("encoder.embed_tokens.weight",)


class Parts:
    """The components of one base, frozen (`requires_grad` False, `eval()`), on one device.

    kinds: component -> its class's name in diffusers or transformers. narrow: the component that
    `base.quantize` is about. table, partial: as `Latent.file_table` and `partial_files`. On the
    device "meta" they are built from their configurations alone, and no weight is read, nor
    anything quantised.
    """

    def __init__(
        self,
        folder: ModelFolder,
        kinds: Mapping[str, str],
        base: Base,
        device: torch.device,
        narrow: str,
        table: Table = lambda name, outline: None,
        partial: bool = False,
    ) -> None:
        self.kinds = dict(kinds)
        self._narrow = {narrow: base.quantize}
        self.device = device
        self.dtype = dtype_of(base)
        self._folder, self._table, self._partial = folder, table, partial
        self._variant = base.variant
        self._others = {"vae": Path(base.vae).expanduser()} if base.vae is not None else {}
        self._loaded: dict[str, nn.Module] = {}
        self._counts: dict[str, int] = {}

    def __getitem__(self, name: str) -> nn.Module:
        """Return a component, loaded if it is not in memory."""
        if name not in self._loaded:
            module = self._read(name)
            self._counts[name] = sum(1 for _ in module.parameters())
            if (kind := self._narrow.get(name)) is not None and self.device.type != "meta":
                quantize(module, kind, self.device)
            self._loaded[name] = module.to(self.device).requires_grad_(False).eval()
        return self._loaded[name]

    def alone(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Return a component with its weights, in `dtype` on the CPU, and keep nothing of it.

        Also where these are on "meta".
        """
        import torch

        apart = copy.copy(self)
        apart.device, apart.dtype = torch.device("cpu"), dtype
        apart._loaded, apart._counts = {}, {}
        return apart[name]

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
        if name in self._others:
            return self._read_other(kind, name)
        if self.device.type == "meta":
            return _outlined(kind, folder, name).to(self.dtype)
        if folder.weights is not None:
            return self._from_file(kind, folder, folder.weights, name)
        return _from_folder(kind, folder, name, self.dtype, self._variant)

    def _from_file(self, kind: Any, folder: ModelFolder, path: Path, name: str) -> nn.Module:
        """Return a component of a base that is one file; what it lacks is read from the folder."""
        if not self._partial:
            return singlefile.load(kind, path, folder.path, name, self.dtype)
        outline = _outlined(kind, folder, name, buffers=False)
        table = self._table(name, outline)
        if not singlefile.holds(path, name if table is None else table):
            if not folder.has_weights(name):
                raise UserError(
                    f"{path}: holds no weights of {name}, and {folder.path} has none: name a "
                    "diffusers folder that has its weights as base.config"
                )
            say(f"{folder.label}: holds no {name}; that of {folder.path} is taken")
            folder.check_weights(name)
            return _from_folder(kind, folder, name, self.dtype, None)
        if table is None:
            return singlefile.load(kind, path, folder.path, name, self.dtype)
        return singlefile.load_rows(outline, table, path, folder.path, name, self.dtype)

    def _read_other(self, kind: Any, name: str) -> nn.Module:
        """Return the component that the recipe puts in the place of the base's own."""
        key, path = f"base.{name}", self._others[name]
        if path.is_dir():
            folder = other_folder(path, name)
            if folder.configs[name].get("_class_name", kind.__name__) != kind.__name__:
                raise UserError(
                    f"{key}: {path} is {folder.configs[name]['_class_name']}, and this base takes "
                    f"{kind.__name__}"
                )
            if self.device.type == "meta":
                return _outlined(kind, folder, name).to(self.dtype)
            where = "" if folder.path == path and (path / "config.json").is_file() else name
            return _from_folder(kind, folder, name, self.dtype, None, where)
        if path.suffix != ".safetensors" or not path.is_file():
            raise UserError(
                f"{key}: {path} is no .safetensors file and no folder that is there; nothing else "
                "is read"
            )
        if self.device.type == "meta":
            return _outlined(kind, self._folder, name).to(self.dtype)
        return singlefile.load(kind, path, self._folder.path, name, self.dtype, key)


def other_folder(path: Path, name: str) -> ModelFolder:
    """Return a component's own folder, or that of a model which has one; UserError without."""
    for place in (path, path / name):
        if (place / "config.json").is_file():
            folder = ModelFolder(path, str(path), {}, {name: read_json(place / "config.json")})
            folder.refuse_code()
            return folder
    raise UserError(f"base.{name}: {path} has no config.json, nor has its folder {name}")


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


def _outlined(kind: Any, folder: ModelFolder, name: str, buffers: bool = True) -> nn.Module:
    """Return a component without weights: names, shapes and configuration.

    buffers: whether tables that no file holds are left out as well.
    """
    import torch
    from accelerate import init_empty_weights

    config = dict(folder.configs.get(name, {}))
    empty = torch.device("meta") if buffers else init_empty_weights(include_buffers=False)
    with loading(str(folder.path / name)), quiet(), empty:
        if hasattr(kind, "from_config"):  # diffusers
            module: nn.Module = kind.from_config(config)
        else:
            module = kind(kind.config_class.from_dict(config))
    return module


def _from_folder(
    kind: Any,
    folder: ModelFolder,
    name: str,
    dtype: torch.dtype,
    variant: str | None,
    where: str | None = None,
) -> nn.Module:
    """Return a component with every one of its weights read from the folder's safetensors.

    where: its place in the folder, where it is not called as the component is.
    """
    # The two libraries call it by two names.
    precision = "torch_dtype" if hasattr(kind, "from_config") else "dtype"
    place = name if where is None else where
    what: dict[str, Any] = {"subfolder": place, "use_safetensors": True, "variant": variant}
    what[precision] = dtype
    with loading(str(folder.path / place)), quiet():
        module, report = kind.from_pretrained(folder.path, output_loading_info=True, **what)
    # The libraries fill a missing weight with random numbers and go on.
    if missing := sorted(set(report["missing_keys"]) - set(TIED)):
        raise UserError(
            f"{folder.path / place}: {len(missing)} weights are missing, such as {missing[0]}; "
            "the folder is incomplete or was saved under names this version does not read"
        )
    # And drop weights that the configuration has no place for, such as whole blocks.
    unused = sorted(key for key in report["unexpected_keys"] if not key.endswith(_HARMLESS))
    if unused:
        raise UserError(
            f"{folder.path / place}: its config.json has no place for {len(unused)} of the "
            f"weights, such as {unused[0]}; configuration and weights do not belong together"
        )
    loaded: nn.Module = module
    return loaded


def scheduler(folder: ModelFolder, settings: Mapping[str, Any]) -> Any:
    """Return the sampler that the folder names, by its configuration with `settings` over it.

    DDIM takes its place where it does not know one of the settings.
    """
    import diffusers

    name = folder.model_index["scheduler"][1]
    kind = getattr(diffusers, name, None) if str(name).endswith("Scheduler") else None
    if kind is None:
        raise UserError(f"{folder.label}: model_index.json names no scheduler of diffusers: {name}")
    with loading(f"{folder.label}: scheduler"):
        made = kind.from_pretrained(folder.path, subfolder="scheduler", local_files_only=True)
        if settings.keys() - inspect.signature(kind).parameters.keys():
            kind, settings = diffusers.DDIMScheduler, {**settings, "clip_sample": False}
        return kind.from_config({**made.config, **settings}) if settings else made


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
