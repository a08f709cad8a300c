"""What `tunekit doctor` tells: the machine, the versions, what is missing and how to install it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

import tunekit

GIB = 2**30
ENOUGH_DISK_GIB = 1.0


@dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` says what to do; '' where all is well."""

    name: str
    found: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing need be done."""
        return not self.remedy


@dataclass(frozen=True)
class Report:
    """Every check, in the order of the report."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {"ok": self.ok, "checks": [asdict(c) | {"ok": c.ok} for c in self.checks]}

    def lines(self) -> list[str]:
        """Return the report for people, a line a check, then what to do."""
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"{' ' if check.ok else '!'} {check.name:<{width}}  {check.found}"
            for check in self.checks
        ]
        todo = [f"! {check.name}: {check.remedy}" for check in self.checks if not check.ok]
        return [*lines, "", *(todo or ["Nothing is missing."])]


def examine() -> Report:
    """Look at this machine and installation. Loads torch, downloads nothing."""
    return Report((*_machine(), *_packages(), *_torch(), *_models(), *_folders()))


def _machine() -> Iterator[Check]:
    yield Check("tunekit", f"{tunekit.__version__} in {Path(tunekit.__file__).parent}")
    yield Check("python", f"{platform.python_version()} in {sys.prefix}")
    yield Check("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Check("processors", f"{os.cpu_count()}, {memory:.1f} GiB of memory")


def _packages() -> Iterator[Check]:
    """Compare every installed package with what tunekit's own metadata asks for."""
    for line in metadata.requires("tunekit") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue  # belongs to an extra, such as dev
        name, remedy = needed.name, f'pip install "{needed.name}{needed.specifier}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "missing", remedy)
            continue
        fits = needed.specifier.contains(version, prereleases=True)
        yield Check(name, version, "" if fits else f"needs {needed.specifier}: {remedy}")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as exc:  # OSError: a shared library of it is missing
        yield Check("accelerator", f"torch cannot be imported: {exc}", "pip install torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "bf16 and fp16" if torch.cuda.is_bf16_supported() else "fp16"
            yield Check("accelerator", f"{card.name}, {card.total_memory / GIB:.1f} GiB, {bf16}")
    elif torch.backends.mps.is_available():
        yield Check("accelerator", "Apple GPU (mps)")
    else:
        yield Check("accelerator", f"none: processor only, {torch.get_num_threads()} threads")


def _models() -> Iterator[Check]:
    from tunekit import toybox

    for name, path in (
        ("toybox model", toybox.model_path()),
        ("toybox clip", toybox.clip_path()),
        ("toybox subject encoder", toybox.subject_encoder_path()),
    ):
        there = any(path.rglob("*.safetensors"))
        remedy = "" if there else "install tunekit again: its package data is incomplete"
        yield Check(name, str(path) if there else f"no weights in {path}", remedy)


def _folders() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    if not os.access(here, os.W_OK):
        yield Check("working folder", f"{here} is read-only", "give a run another folder: --out")
    else:
        remedy = "" if free >= ENOUGH_DISK_GIB else "free some disk space before a run"
        yield Check("working folder", f"{here}, {free:.1f} GiB free", remedy)
    token = bool(os.environ.get("HF_TOKEN"))
    yield Check("HF_TOKEN", "set" if token else "not set (only gated or private models need it)")
