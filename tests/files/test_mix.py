"""Adapters merged with each other: exact, of a lower rank, and by peft's methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_files import changes, export, far, low_rank, matrix, random, shapes, write
from torch import Tensor

from tunekit import families
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.files.cut import Keep
from tunekit.files.mix import Way, mix
from tunekit.files.opened import NewFile
from tunekit.schema import Base

Folder = Callable[..., Path]
Made = tuple[list[Path], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def two(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two LoRAs of sd-scripts' naming, of rank 3 and 5, and what they change."""
    folder = tmp_path_factory.mktemp("two")
    known = shapes(families.load(Base(model=str(tiny_folder())), "meta"))
    paths, wanted = [], []
    for number, (rank, alpha) in enumerate([(3, 1.5), (5, 10.0)]):
        tensors: dict[str, Tensor] = {}
        changed: dict[str, Tensor] = {}
        for seed, ((component, name), shape) in enumerate(known.items()):
            down, up = low_rank(shape, 100 * number + 2 * seed, rank)
            whole = "unet" if component == "denoiser" else "te_text_model"
            key = f"lora_{whole}_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            changed[f"{component}.{name}"] = matrix(down, up) * alpha / rank
        said = {"ss_base_model_version": "x", "only": str(number)}
        paths.append(write(folder / f"{number}.safetensors", tensors, **said))
        wanted.append(changed)
    return paths, wanted


def mixed(two: Made, weights: tuple[float, float], out: Path, folder: Path, **way: Any) -> Any:
    keep = Keep.of(way.pop("rank", None), way.pop("energy", None))
    how = Way.of(way.pop("method"), way.pop("density", None), way.pop("seed", None), keep)
    given = list(zip(two[0], weights, strict=True))
    return mix(given, NewFile(out, dtype="fp32", **way), how, keep, base=str(folder))


def summed(two: Made, weights: tuple[float, float]) -> dict[str, Tensor]:
    return {n: weights[0] * c + weights[1] * two[1][1][n] for n, c in two[1][0].items()}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_concatenation_is_the_sum_to_the_last_digit(
    layout: str, two: Made, tiny_folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    made = mixed(two, (0.7, -0.4), out, tiny_folder(), method="concat", layout=layout)
    assert far(summed(two, (0.7, -0.4)), changes(out, tiny_folder())) < 2e-6
    assert {row.rank for row in made.rows} == {8}
    assert made.kept == 1
    said = read_safetensors(out)[1]
    assert said["ss_base_model_version"] == "x", "what the two agree on"
    assert "only" not in said


def test_svd_is_the_nearest_of_its_rank(two: Made, tiny_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    made = mixed(two, (1, 1), out, tiny_folder(), method="svd", rank=4)
    found, whole = changes(out, tiny_folder()), summed(two, (1, 1))
    for row in made.rows:
        values = torch.linalg.svdvals(whole[row.name].flatten(1))
        assert row.rank == 4
        assert row.before == 8
        assert row.lost == pytest.approx(float(values[4:].norm()), rel=1e-4)
        error = float((found[row.name].double() - whole[row.name]).norm())
        assert error == pytest.approx(row.lost, rel=1e-3), "no other of rank 4 is nearer"
    exact = mixed(two, (1, 1), tmp_path / "e.safetensors", tiny_folder(), method="svd", rank=64)
    assert {row.rank for row in exact.rows} == {8}, "no more than there is"
    assert far(whole, changes(exact.path, tiny_folder())) < 2e-6


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_pefts_methods_on_the_changes(
    method: str, two: Made, tiny_folder: Folder, tmp_path: Path
) -> None:
    """All numbers kept: DARE is the sum, TIES takes the mean of those that agree in sign."""
    way = {"method": method, "density": 1.0, "energy": 1.0}
    mixed(two, (1, 0.5), tmp_path / "a.safetensors", tiny_folder(), **way)
    found = changes(tmp_path / "a.safetensors", tiny_folder())
    wanted = summed(two, (1, 0.5))
    if method != "dare_linear":
        for name, sum_of in wanted.items():
            one, other = two[1][0][name], two[1][1][name]
            sign = torch.where(one + other >= 0, 1.0, -1.0)
            first, second = one.sign() == sign, other.sign() == sign
            total = one * first + 0.5 * other * second
            wanted[name] = total / (first.double() + second.double()).clamp(min=1)
            assert wanted[name].shape == sum_of.shape
    assert far(wanted, found) < 1e-5


def test_what_dare_draws_is_its_seeds(two: Made, tiny_folder: Folder, tmp_path: Path) -> None:
    way: dict[str, Any] = {"method": "dare_linear", "density": 0.5, "energy": 1.0}
    data = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.safetensors"
        state = torch.random.get_rng_state()
        mixed(two, (1, 1), out, tiny_folder(), seed=seed, **way)
        assert torch.random.get_rng_state().equal(state)
        data.append(changes(out, tiny_folder()))
    assert far(data[0], data[1]) == 0
    assert far(data[0], data[2]) > 0.1


def test_any_kind_can_be_summed(tiny_folder: Folder, two: Made, tmp_path: Path) -> None:
    """Also those whose change depends on the base's weights."""
    base = tiny_folder()
    paths = [
        [*export(base, kind, tmp_path / kind).values()][-1] for kind in ("DoRA", "LoHa", "OFT")
    ]
    keep = Keep(energy=1.0)
    out = tmp_path / "m.safetensors"
    given = [(path, 1.0) for path in paths]
    way = Way.of("svd", None, None, keep)
    mix(given, NewFile(out, dtype="fp32"), way, keep, base=str(base))
    each = [changes(path, base) for path in paths]
    names = set().union(*each)
    wanted = {n: sum((c[n].double() for c in each if n in c), torch.zeros(())) for n in names}
    assert far(wanted, changes(out, base)) < 1e-5


class TestRefused:
    @pytest.mark.parametrize(
        ("way", "said"),
        [
            ({"method": "tie"}, 'tie is none of .*did you mean "ties"'),
            ({"method": "ties", "rank": 4}, "ties needs --density"),
            ({"method": "svd", "rank": 4, "density": 0.5}, "svd has no --density"),
            ({"method": "ties", "rank": 4, "density": 0.0}, "0 is no share"),
            ({"method": "svd", "rank": 4, "seed": 0}, "--seed: svd draws nothing"),
            ({"method": "svd"}, "svd needs --rank, --energy or --frobenius"),
            ({"method": "concat", "rank": 4}, "keeps all ranks; svd lowers them"),
            ({"method": "svd", "energy": 1.5}, "--energy: 1.5 is no share"),
            ({"method": "svd", "rank": 0}, "--rank: 0 is not in"),
        ],
    )
    def test_what_does_not_go_together(
        self, way: dict[str, Any], said: str, two: Made, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=said):
            mixed(two, (1, 1), tmp_path / "m.safetensors", tiny_folder(), **way)
        assert not list(tmp_path.iterdir())

    def test_concatenation_of_another_kind(
        self, tiny_folder: Folder, two: Made, tmp_path: Path
    ) -> None:
        key = "lora_unet_mid_block_resnets_0_conv1"
        shape = shapes(families.load(Base(model=str(tiny_folder())), "meta"))
        whole = random(*shape["denoiser", "mid_block.resnets.0.conv1"])
        path = write(tmp_path / "a.safetensors", {f"{key}.diff": whole})
        keep = Keep()
        with pytest.raises(UserError, match="is whole, whose factors cannot stand beside others"):
            mix(
                [(path, 1.0), (two[0][0], 1.0)],
                NewFile(tmp_path / "m.safetensors"),
                Way(),
                keep,
                base=str(tiny_folder()),
            )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
