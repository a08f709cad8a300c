"""The tools on a base of every family: names of every client, folders that draw the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm
import pytest
import tiny
import torch
from held import memory_of
from made_files import changes, far, matrix, random, write
from torch import Tensor

from tunekit import families
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.files import output, sources
from tunekit.files.convert import convert
from tunekit.files.cut import Keep
from tunekit.files.extract import extract
from tunekit.files.folder import merge
from tunekit.files.mix import Way, mix
from tunekit.files.names import Names, Place
from tunekit.files.opened import NewFile
from tunekit.files.resize import resize
from tunekit.loading import load_file
from tunekit.schema import Base
from tunekit.verification import ask, make_probe

Folder = Callable[..., Path]
FAMILIES = sorted(tiny.BUILDERS)
RANK = 2


def made(
    folder: Path, path: Path, layout: str, first: int = 0
) -> dict[Place, tuple[Tensor, Tensor]]:
    """Write a LoRA for all that the family's fullest preset names, and return down and up.

    first: the number of the first of its random tensors.
    """
    family = sources.outline(Base(model=str(folder)))
    names = Names(family)
    factors = {}
    with output.Output(path, layout, names, None) as result:
        for seed, place in enumerate(sorted(sources.targets(family, "full")), first):
            shape = names.shape(place)
            down = random(RANK, *shape[1:], seed=seed)
            up = random(shape[0], RANK, *[1] * (len(shape) - 2), seed=seed + 1000)
            factors[place] = down, up
            result.add(place, output.lora(up, down))
        result.finish({})
    return factors


@torch.no_grad()
def predict(family: Family) -> Tensor:
    return ask(family, make_probe(family, ["a zorp robot"], 0))


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_by_the_clients_own_loader(
    name: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    base = tiny_folder(name)
    factors = made(base, tmp_path / "one.safetensors", "diffusers")
    there = convert(tmp_path / "one.safetensors", "kohya", base=str(base))
    back = convert(there.path, "diffusers", base=str(base))
    wanted = {".".join(place): matrix(*pair) for place, pair in factors.items()}
    for path in (tmp_path / "one.safetensors", there.path, back.path):
        assert far(wanted, changes(path, base)) < 2e-6
    first, again = (read_safetensors(p)[0] for p in (tmp_path / "one.safetensors", back.path))
    assert first.keys() == again.keys()
    assert all(again[key].equal(tensor) for key, tensor in first.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_by_the_libraries_names_under_kohyas_prefix(
    name: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    """As trainers on diffusers write them, also where kohya's own names are those of ldm."""
    base = tiny_folder(name)
    factors = made(base, tmp_path / "one.safetensors", "kohya")
    tensors = {}
    for (component, module), (down, up) in factors.items():
        if component == "denoiser":
            key = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    path = write(tmp_path / "two.safetensors", tensors)
    convert(path, "kohya", base=str(base), out=tmp_path / "three.safetensors")
    known, _ = read_safetensors(tmp_path / "one.safetensors")
    found, _ = read_safetensors(tmp_path / "three.safetensors")
    assert found.keys() == {key for key in known if not key.startswith("lora_te")}
    assert all(known[key].equal(tensor) for key, tensor in found.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_is_that_of_one_module_or_refused(name: str, tiny_folder: Folder) -> None:
    family = sources.outline(Base(model=str(tiny_folder(name))))
    names = Names(family)
    several = len(family.teachable) > 1
    for component, module in names.modules:
        place = (component, module)
        for layout in ("kohya", "diffusers"):
            assert names.find(names.written(layout, place)) == place
        assert names.find(f"{names.folders[component]}.{module}") == place
        if component == "denoiser":
            assert names.find(f"base_model.model.{module}") == place
        elif several and ".layers.0." in module:
            with pytest.raises(UserError, match="is a module of more than one part"):
                names.find(names.wide(place))
    assert names.find("lora_unet_nothing") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_into_the_base_and_out_of_it(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder(name)
    path = tmp_path / "one.safetensors"
    factors = made(base, path, "kohya")
    family = families.load(Base(model=str(base)))
    untouched = predict(family)
    load_file(family, path, "it")
    wanted = predict(family)
    merge([(path, 1.0)], tmp_path / "merged", base=str(base))
    found = predict(families.load(Base(model=str(tmp_path / "merged"))))
    assert float((found - wanted).norm() / (wanted - untouched).norm()) < 1e-4
    for encoder in family.text_encoders:
        if encoder not in family.teachable:
            continue
        held, _ = read_safetensors(tmp_path / "merged" / encoder / "model.safetensors")
        assert all(key.startswith(("text_model.", "text_projection.")) for key in held)
    out = tmp_path / "out.safetensors"
    report = extract(
        str(tmp_path / "merged"), str(base), NewFile(out, dtype="fp32"), Keep(rank=RANK)
    )
    assert {row.name for row in report.rows} == {".".join(place) for place in factors}
    changed = {".".join(place): matrix(*pair) for place, pair in factors.items()}
    assert far(changed, changes(out, base)) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_form_of_sd_scripts_it_is_mixed_and_resized(
    name: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    """Of Stable Diffusion 3 and FLUX.1 one tensor holds what several modules change."""
    base = tiny_folder(name)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    both = [made(base, path, "kohya", 500 * number) for number, path in enumerate(paths)]
    wanted = {
        ".".join(place): 0.5 * matrix(*both[0][place]) + 2 * matrix(*both[1][place])
        for place in both[0]
    }
    new = NewFile(tmp_path / "mixed.safetensors", dtype="fp32")
    given = [(paths[0], 0.5), (paths[1], 2.0)]
    mix(given, new, Way(), Keep(), base=str(base))
    assert far(wanted, changes(new.path, base)) < 1e-5
    svd = NewFile(tmp_path / "svd.safetensors", dtype="fp32")
    mix(given, svd, Way("svd"), Keep(rank=2 * RANK), base=str(base))
    assert far(wanted, changes(svd.path, base)) < 1e-5
    less = NewFile(tmp_path / "less.safetensors", dtype="fp32")
    report = resize(new.path, less, Keep(rank=RANK), base=str(base))
    assert {row.name: (row.before, row.rank) for row in report.rows} == dict.fromkeys(
        wanted, (2 * RANK, RANK)
    )
    best = {}
    for place, change in wanted.items():
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        cut = left[:, :RANK] * values[:RANK] @ right[:RANK]
        best[place] = cut.reshape(change.shape)
    assert far(best, changes(less.path, base)) < 1e-4


ONE_FILE: dict[str, Callable[[Path, Path], Path]] = {
    "sd": ldm.single_file,
    "sdxl": ldm.single_file_xl,
    "sd3": ldm.single_file_flow,
    "flux": ldm.single_file_flow,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_base_in_one_file_a_part_is_in_memory_at_a_time(
    name: str, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = tiny_folder(name), tmp_path / "one.safetensors"
    whole = ONE_FILE[name](base, tmp_path / "base.safetensors")
    factors = made(base, path, "kohya")
    read: list[tuple[str, int]] = []
    seen: list[weakref.ref[Any]] = []
    kind = type(sources.outline(Base(model=str(base))))
    honest = kind.alone

    def watched(family: Any, part: str, dtype: torch.dtype) -> Any:
        gc.collect()
        read.append((part, sum(one() is not None for one in seen)))
        module = honest(family, part, dtype)
        seen.extend(memory_of(module))
        return module

    monkeypatch.setattr(kind, "alone", watched)
    given = [(path, 1.0)]
    merge(given, tmp_path / "of_file", base=str(whole), config=str(base))
    parts = [*families.load(Base(model=str(base)), "meta").components()]
    assert sorted(read) == sorted((part, 0) for part in parts), "each once, and alone"
    merge(given, tmp_path / "of_folder", base=str(base))
    bases = [families.load(Base(model=str(tmp_path / f"of_{m}"))) for m in ("file", "folder")]
    assert predict(bases[0]).equal(predict(bases[1]))
    read.clear()
    out = NewFile(tmp_path / "out.safetensors", dtype="fp32")
    extract(str(tmp_path / "of_file"), str(whole), out, Keep(rank=RANK), config=str(base))
    assert {held for _, held in read} == {0}
    wanted = {".".join(place): matrix(*pair) for place, pair in factors.items()}
    assert far(wanted, changes(out.path, base)) < 1e-3
