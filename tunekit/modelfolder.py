"""A base model as files: found, described and checked before any weight is read."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import hub, singlefile
from tunekit.errors import UserError, did_you_mean
from tunekit.safefile import check_header, check_sizes
from tunekit.schema import BUNDLED

if TYPE_CHECKING:
    from typing import Self

    from tunekit.schema import Base

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_STEMS = "(diffusion_pytorch_model|model)"
_DESCRIPTIONS = ["model_index.json", "*/config.json", "*/*_config.json"]
_TEXTS = ["model_index.json", "*/*.json", "*/*.txt"]


def names_file(model: str) -> bool:
    """Say whether `base.model` means one file, there or not, and neither a folder nor a Hub id."""
    path = hub.as_path(model)
    if model == BUNDLED:
        return False
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def described_here(base: Base) -> bool:
    """Say whether what describes the base lies on this disk, so that it can be held against it.

    Raises UserError where the base is a single file that is not there or cannot be taken, or where
    keys are set that mean nothing for it. No torch.
    """
    if not names_file(base.model):
        if base.config is not None:
            raise UserError(
                f"base.config: describes a single .safetensors file, but {base.model} is none and "
                "brings its own configuration; leave it out"
            )
        return base.model == BUNDLED or hub.as_path(base.model).is_dir()
    path = hub.as_path(base.model)
    if not path.is_file():
        raise UserError(f"base.model: there is no file {base.model}")
    if path.suffix in PICKLES:
        raise UserError(
            f"base.model: {base.model} is a pickle, which can run code when it is read; tunekit "
            "reads only .safetensors"
        )
    for key, value in (("variant", base.variant), ("revision", base.revision)):
        if value is not None:
            raise UserError(f"base.{key}: {base.model} is a single file, which has none")
    singlefile.check(path)
    return base.config is not None


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder: where it is, what the user calls it, and what its descriptions say.

    For a base that is one file, the folder that describes it.
    """

    path: Path
    label: str
    model_index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    """Component name -> its config.json, where it has one."""
    fetch: Callable[[list[str]], object] | None = None
    """Brings files that match the patterns from the Hub; None for a folder of the user's own."""
    weights: Path | None = None
    """The file that holds all weights, in the original naming; None: they lie in the folder."""

    @classmethod
    def open(cls, base: Base) -> Self:
        """Find `base.model`: the bundled toybox, a folder, a file, or a Hub id.

        No weights are read. Of a Hub id only the descriptions are fetched here, and never code:
        what is not asked for by name stays there. Raises UserError with what to do.
        """
        described_here(base)
        if base.model == BUNDLED:
            from tunekit.toybox import model_path

            return cls.read(model_path(), label=BUNDLED)
        path = hub.as_path(base.model)
        if path.is_dir():
            folder = cls.read(path, label=base.model)
            if not base.trust_remote_code:
                folder.refuse_code()
            return folder
        if names_file(base.model):
            return cls._of_file(base, path)
        if not hub.means_id(base.model):
            near = did_you_mean(base.model, [BUNDLED])
            raise UserError(
                f"base.model: there is no folder {base.model}{near}; "
                "a base is toybox, a diffusers folder, a .safetensors file, or a Hub id such as "
                "owner/name"
            )
        return cls._from_hub(base)

    @classmethod
    def _of_file(cls, base: Base, path: Path) -> Self:
        """Return the folder that describes a single file, with the file as its weights."""
        if base.config is not None:
            where = hub.as_path(base.config)
            folder = cls.read(where, label=f"base.config: {base.config}")
            if not base.trust_remote_code:
                folder.refuse_code()
        else:
            default = singlefile.default_config(path)
            try:
                folder = cls._from_hub(base.model_copy(update={"model": default}), _TEXTS)
            except UserError as error:
                raise UserError(
                    f"base.config: {base.model} holds weights alone, and the configuration and "
                    f"tokenizer of {default}, which diffusers takes for it, are neither in the "
                    "local Hub cache nor to be had from the Hub: name a diffusers folder that has "
                    "them (its weights are not needed)"
                ) from error
            say(f"{base.model}: is taken for a {default}; name base.config if it is another model")
        if singlefile.check(path):
            say(f"{base.model}: holds averaged (EMA) weights too; the plain ones are used")
        return replace(folder, label=base.model, fetch=None, weights=path)

    @classmethod
    def read(
        cls, path: Path, label: str = "", fetch: Callable[[list[str]], object] | None = None
    ) -> Self:
        """Read the descriptions in a folder; UserError where it is no diffusers folder."""
        label = label or str(path)
        index = path / "model_index.json"
        if not index.is_file():
            held = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else []
            raise UserError(
                f"{label}: is no diffusers model folder: it has no model_index.json"
                + (f", only {', '.join(held)}" if held else "")
            )
        model_index = read_json(index)
        for name, value in model_index.items():
            if isinstance(value, list) and not name.isidentifier():  # it is a folder's name
                raise UserError(f"{index}: names {name!r}, which is no name of a component")
        configs = {
            name: read_json(path / name / "config.json")
            for name in model_index
            if name.isidentifier() and (path / name / "config.json").is_file()
        }
        for name, config in configs.items():
            check_sizes(path / name / "config.json", config)
        return cls(path, label, model_index, configs, fetch)

    @classmethod
    def _from_hub(cls, base: Base, wanted: list[str] = _DESCRIPTIONS) -> Self:
        from huggingface_hub import errors, snapshot_download

        def fetch(patterns: list[str]) -> Path:
            try:
                found = snapshot_download(
                    base.model, revision=base.revision, allow_patterns=patterns
                )
            except errors.GatedRepoError:
                raise UserError(
                    f"base.model: {base.model} asks you to accept its licence: do so on "
                    f"https://huggingface.co/{base.model}, then log in with `hf auth login`"
                ) from None
            except errors.RevisionNotFoundError:
                raise UserError(
                    f"base.revision: {base.model} has no revision {base.revision}"
                ) from None
            except (errors.RepositoryNotFoundError, errors.HFValidationError):
                raise UserError(
                    f"base.model: there is no folder {base.model} here, and no such model on the "
                    "Hugging Face Hub (or it is private: log in with `hf auth login`)"
                ) from None
            except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
                raise UserError(
                    f"base.model: there is no folder {base.model} here, it is not in the local Hub "
                    f"cache, and the Hugging Face Hub cannot be reached ({type(error).__name__}): "
                    f"get it with `hf download {base.model}` where there is a network, or name a "
                    "diffusers folder or `toybox`"
                ) from None
            return Path(found)

        return cls.read(fetch(wanted), label=base.model, fetch=fetch)

    def summary(self) -> str:
        """Return what the folder holds, in words: the pipeline and the parts that tell families."""
        parts = [
            f"{name} {value[1]}{self._channels(name)}"
            for name, value in self.model_index.items()
            if isinstance(value, list) and len(value) == 2 and value[1] is not None
            if not name.startswith(("tokenizer", "scheduler", "safety", "feature"))
        ]
        return f"{self.model_index.get('_class_name', 'no named pipeline')} ({', '.join(parts)})"

    def _channels(self, name: str) -> str:
        channels = self.configs.get(name, {}).get("in_channels")
        return f" with {channels} input channels" if channels is not None and name != "vae" else ""

    def refuse_code(self) -> None:
        """Raise UserError where the folder carries Python files."""
        code = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*.py"))
        if code:
            raise UserError(
                f"{self.label}: carries code ({', '.join(code[:3])}), which a model does not need; "
                "remove it, or set base.trust_remote_code: true if you trust whoever wrote it"
            )

    def bring(
        self, components: Iterable[str], weighted: Iterable[str], variant: str | None
    ) -> None:
        """See that every component is complete on this disk, its weights as safetensors.

        `weighted`: the components that have weights. Raises UserError where something is missing or
        is there only as a pickle, which could run code when read.
        """
        kind = f".{variant}" if variant else ""
        if self.fetch is not None:
            shapes = [f"{kind}.safetensors", f"{kind}-*.safetensors", f"-*{kind}.safetensors"]
            stems = _STEMS.strip("()").split("|")
            weights = [f"{c}/{stem}{s}" for c in weighted for stem in stems for s in shapes]
            texts = [f"{c}/{pattern}" for c in components for pattern in ("*.json", "*.txt")]
            self.fetch([*texts, *weights])
        for component in components:
            if not (self.path / component).is_dir():
                where = self.label if self.weights is None else self.path
                raise UserError(f"{where}: has no folder {component}; the model is incomplete")
        for component in weighted if self.weights is None else ():
            self.check_weights(component, kind)

    def has_weights(self, component: str) -> bool:
        """Say whether the folder holds files of weights for a component, of whatever kind."""
        inside = self.path / component
        return any(file.suffix in (".safetensors", *PICKLES) for file in inside.iterdir())

    def check_weights(self, component: str, kind: str = "") -> None:
        """Raise UserError where a component has no whole safetensors of a kind, such as ".fp16"."""
        files = sorted(p.name for p in (self.path / component).iterdir())
        safe = [f for f in files if f.endswith(".safetensors")]
        part = r"(-\d+-of-\d+)?"  # large models are saved in parts
        name = re.compile(rf"{_STEMS}{part}{re.escape(kind)}{part}\.safetensors")
        if wanted := [f for f in safe if name.fullmatch(f)]:
            for file in wanted:  # before diffusers opens them, whose word for a pickle is a riddle
                check_header(self.path / component / file)
            return
        if safe:
            raise UserError(
                f"base.variant: {self.label} has no weights {component}/*{kind}.safetensors, only "
                f"{', '.join(safe)}; name the variant it has"
            )
        pickles = [f for f in files if f.endswith(PICKLES)]
        if pickles:
            raise UserError(
                f"{self.label}: {component}/{pickles[0]} is a pickle, which can run code when it "
                "is read; tunekit reads only .safetensors: convert it with diffusers' "
                "save_pretrained(..., safe_serialization=True) where you trust it"
            )
        raise UserError(f"{self.label}: {component} holds no weights (*.safetensors)")


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads `what` from files into a one-line UserError.

    A broken file shows itself as almost any error, from the JSON parser to the shape of a tensor.
    Around calls of libraries only: an error of our own must stay one.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        names = f"needs the package {error.name}" if error.name else " ".join(str(error).split())
        raise UserError(f"{what}: cannot be loaded: {names[:300]}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        # KeyError and IndexError say next to nothing without their names.
        bare = isinstance(error, LookupError) or not str(error).strip()
        line = " ".join((repr(error) if bare else str(error)).split())
        raise UserError(f"{what}: cannot be loaded: {line[:300]}") from error


@functools.cache  # a run loads its base more than once
def say(line: str) -> None:
    """Tell something of a base, once."""
    logging.getLogger("tunekit").warning(line)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__} where an object belongs")
    return value
