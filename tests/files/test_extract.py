"""Differences of bases as LoRAs, and LoRAs of other ranks: what is kept, and that it is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_files import KINDS, changes, export, far, random, write

from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.files.cut import Keep, cut_factors, cut_matrix
from tunekit.files.extract import extract
from tunekit.files.folder import merge
from tunekit.files.opened import NewFile
from tunekit.files.resize import resize

Folder = Callable[..., Path]


class TestCut:
    def test_factors_and_their_product_are_cut_alike(self) -> None:
        for shape in ((12, 20), (20, 12), (8, 6, 3, 3)):
            up, down = random(shape[0], 5, seed=1), random(5, *shape[1:], seed=2)
            up = up.reshape(shape[0], 5, *[1] * (len(shape) - 2))
            whole = (up.flatten(1) @ down.flatten(1)).reshape(shape)
            for keep in (Keep(rank=2), Keep(energy=0.9), Keep(energy=0.99, rank=3), Keep()):
                one, other = cut_factors(up, down, keep), cut_matrix(whole, keep)
                assert one.rank == other.rank
                assert one.norm == pytest.approx(float(whole.norm()), rel=1e-5)
                assert one.lost == pytest.approx(other.lost, rel=1e-3, abs=1e-6)
                product = (one.up.flatten(1) @ one.down.flatten(1)).reshape(shape)
                assert float((whole - product).norm()) == pytest.approx(one.lost, abs=1e-6)
                assert one.down.shape[1:] == shape[1:]

    def test_the_fewest_that_hold_the_share(self) -> None:
        values = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
        squares = [16 / 21.25, 20 / 21.25, 21 / 21.25, 1.0]
        for count, energy in enumerate(squares, 1):
            assert cut_matrix(values, Keep.of(None, energy)).rank == count
            assert cut_matrix(values, Keep.of(None, None, energy**0.5)).rank == count
            kept = cut_matrix(values, Keep(rank=count)).kept
            assert kept == pytest.approx(energy, rel=1e-6)
        assert cut_matrix(torch.zeros(3, 4), Keep(rank=2)).norm == 0


@pytest.fixture(scope="module")
def tuned(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a LoRA of rank 4 in it, and the LoRA."""
    folder = tmp_path_factory.mktemp("tuned")
    lora = export(tiny_folder(), "LoRA", folder / "lora")["kohya"]
    return merge([(lora, 1.0)], folder / "merged", base=str(tiny_folder())).path, lora


class TestExtract:
    def test_what_was_merged_comes_out_again(
        self, tuned: tuple[Path, Path], tiny_folder: Folder, tmp_path: Path
    ) -> None:
        out = tmp_path / "x.safetensors"
        made = extract(str(tuned[0]), str(tiny_folder()), NewFile(out, dtype="fp32"), Keep(rank=4))
        assert far(changes(tuned[1], tiny_folder()), changes(out, tiny_folder())) < 1e-4
        assert {row.rank for row in made.rows} == {4}
        assert made.kept == pytest.approx(1, abs=1e-6)
        assert not made.left_out
        said = read_safetensors(out)[1]
        assert (said["ss_network_dim"], said["ss_network_module"]) == ("4", "networks.lora")
        assert str(tiny_folder()) not in json.dumps(said), "no path of this machine"

    def test_the_error_that_is_told_is_the_error_that_is_made(
        self, tuned: tuple[Path, Path], tiny_folder: Folder, tmp_path: Path
    ) -> None:
        out = tmp_path / "x.safetensors"
        for keep in (Keep(rank=2), Keep(energy=0.8)):
            new = NewFile(out, dtype="fp32", overwrite=True)
            made = extract(str(tuned[0]), str(tiny_folder()), new, keep)
            whole, found = changes(tuned[1], tiny_folder()), changes(out, tiny_folder())
            for row in made.rows:
                error = float((whole[row.name] - found[row.name]).norm())
                assert error == pytest.approx(row.lost, rel=1e-2)
                assert keep.energy is None or row.kept >= 0.8 - 1e-6
            squares = sum(float((whole[n] - found[n]).norm()) ** 2 for n in whole)
            assert made.lost == pytest.approx(squares**0.5, rel=1e-2)

    def test_other_layout_and_half_precision(
        self, tuned: tuple[Path, Path], tiny_folder: Folder, tmp_path: Path
    ) -> None:
        out = tmp_path / "x.safetensors"
        extract(str(tuned[0]), str(tiny_folder()), NewFile(out, "diffusers"), Keep(rank=4))
        assert {t.dtype for t in read_safetensors(out)[0].values()} == {torch.float16}
        assert far(changes(tuned[1], tiny_folder()), changes(out, tiny_folder())) < 3e-3

    def test_what_no_lora_holds_is_told(
        self, tiny_folder: Folder, tmp_path: Path, tuned: tuple[Path, Path]
    ) -> None:
        shutil.copytree(tuned[0], tmp_path / "t")
        path = tmp_path / "t/unet/diffusion_pytorch_model.safetensors"
        tensors, _ = read_safetensors(path)
        tensors["conv_in.weight"] += 1
        tensors["mid_block.resnets.0.conv1.bias"] += 1
        write_safetensors(path, tensors, {"format": "pt"})
        out = tmp_path / "x.safetensors"
        made = extract(str(tmp_path / "t"), str(tiny_folder()), NewFile(out), Keep(rank=4))
        assert {n for n, _ in made.left_out} == {
            "denoiser.conv_in.weight",
            "denoiser.mid_block.resnets.0.conv1.bias",
        }
        assert any(line.startswith("left out: 2 tensors") for line in made.lines())
        less = extract(
            str(tmp_path / "t"),
            str(tiny_folder()),
            NewFile(out, overwrite=True),
            Keep(rank=4),
            targets="attention",
        )
        assert len(less.rows) < len(made.rows)
        assert len(less.left_out) > 2

    def test_refused(self, tuned: tuple[Path, Path], tiny_folder: Folder, tmp_path: Path) -> None:
        base, out = str(tiny_folder()), NewFile(tmp_path / "x.safetensors")
        for args, said in (
            ((base, base, out, Keep(rank=4)), "no module changes"),
            (("toybox", base, out, Keep(rank=4)), "are not of one form"),
            ((str(tuned[0]), base, out, Keep()), "name --rank, --energy or --frobenius"),
            ((str(tuned[0]), base, NewFile(tmp_path / "x.bin"), Keep(rank=4)), "does not end in"),
        ):
            with pytest.raises(UserError, match=said):
                extract(*args)
        with pytest.raises(UserError, match=r'fulll is none of .*did you mean "full"'):
            extract(str(tuned[0]), base, out, Keep(rank=4), targets="fulll")
        assert not list(tmp_path.iterdir())


class TestResize:
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_kind_becomes_a_plain_lora(
        self, kind: str, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """All of it is kept, so that it must change weights as it did; DoRA too."""
        base = tiny_folder()
        path = [*export(base, kind, tmp_path / "k").values()][-1]
        out = tmp_path / "x.safetensors"
        made = resize(path, NewFile(out, dtype="fp32"), Keep(energy=1.0), base=str(base))
        wanted, found = changes(path, base), changes(out, base)
        assert far(wanted, found) < 1e-4
        names = {key.rpartition(".lora")[1] for key in read_safetensors(out)[0] if "lora_" in key}
        assert names
        assert all(row.kept > 1 - 1e-6 for row in made.rows)
        if kind in ("LoRA", "LoKr"):
            assert {row.before for row in made.rows} <= {4, 2, None}
        if kind == "whole":  # norms and biases have no rank
            new = NewFile(tmp_path / "y.safetensors", "diffusers")
            with pytest.raises(UserError, match=r"differences of whole tensors.*write it as kohya"):
                resize(path, new, Keep(rank=4), base=str(base))

    def test_a_lower_rank_keeps_the_most(self, tiny_folder: Folder, tmp_path: Path) -> None:
        base = tiny_folder()
        path = export(base, "LoRA", tmp_path / "k")["diffusers"]
        whole = changes(path, base)
        for keep in (Keep(rank=2), Keep(energy=0.7), Keep.of(None, None, 0.9)):
            out = tmp_path / "x.safetensors"
            new = NewFile(out, dtype="fp32", overwrite=True)
            made = resize(path, new, keep, base=str(base))
            found = changes(out, base)
            for row in made.rows:
                values = torch.linalg.svdvals(whole[row.name].double().flatten(1))
                error = float((whole[row.name] - found[row.name]).norm())
                assert error == pytest.approx(float(values[row.rank :].norm()), rel=1e-2, abs=1e-6)
                assert row.before == 4
                assert row.kept >= (keep.energy or 0) - 1e-9
            assert any(f"rank 4 -> {row.rank}" in line for line in made.lines())
        ranks = {row.rank for row in made.rows}
        assert len(ranks) > 1, "as each needs"
        alphas = {float(t) for k, t in read_safetensors(out)[0].items() if k.endswith("alpha")}
        assert len(alphas) == 1, "diffusers reads one alpha of a file"
        assert read_safetensors(out)[1]["ss_network_dim"] == "Dynamic"

    def test_it_is_another_adapter_and_says_so(self, tiny_folder: Folder, tmp_path: Path) -> None:
        """What the old file says of the training stays; its name and its recipe are its own."""
        path = export(tiny_folder(), "LoRA", tmp_path / "k")["kohya"]
        out = tmp_path / "small.safetensors"
        resize(path, NewFile(out), Keep(rank=2), base=str(tiny_folder()))
        before, after = (read_safetensors(p)[1] for p in (path, out))
        assert after["modelspec.title"] == after["ss_output_name"] == "small"
        for key in ("tunekit.recipe", "modelspec.date"):
            assert key in before
            assert key not in after
        assert after["modelspec.trigger_phrase"] == before["modelspec.trigger_phrase"]
        assert after["ss_learning_rate"] == before["ss_learning_rate"]
        assert after["tunekit.made_by"].startswith(f"resized from {path.name} (tunekit ")

    def test_what_changes_nothing_is_left_out(self, tiny_folder: Folder, tmp_path: Path) -> None:
        base = tiny_folder()
        path = export(base, "LoRA", tmp_path / "k")["kohya"]
        tensors, said = read_safetensors(path)
        still = sorted(k for k in tensors if k.endswith("to_q.lora_up.weight"))
        tensors |= {key: torch.zeros_like(tensors[key]) for key in still}
        made = resize(
            write(tmp_path / "a.safetensors", tensors, **said),
            NewFile(tmp_path / "x.safetensors"),
            Keep(rank=2),
            base=str(base),
        )
        assert any(f"{len(still)} modules change nothing" in line for line in made.remarks)
        nothing = {k: torch.zeros_like(t) if "up" in k else t for k, t in tensors.items()}
        with pytest.raises(UserError, match="no module changes"):
            resize(
                write(tmp_path / "b.safetensors", nothing, **said),
                NewFile(tmp_path / "y.safetensors"),
                Keep(rank=2),
                base=str(base),
            )
        assert not (tmp_path / "y.safetensors").exists()
