"""Adapters merged into a base: the folder draws as base and adapters do together, everywhere."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import single_file
from made_files import KINDS, export, random, write
from torch import Tensor

from tunekit import families
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.files.convert import convert
from tunekit.files.cut import Keep
from tunekit.files.extract import extract
from tunekit.files.folder import merge
from tunekit.files.opened import NewFile
from tunekit.inference import load
from tunekit.schema import Base

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(
    tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            files = export(tiny_folder(), kind, tmp_path_factory.mktemp(kind))
            made[kind] = [*files.values()][-1]
        return made[kind]

    return get


@torch.no_grad()
def predict(family: Family) -> Tensor:
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    conditioning = family.encode_prompt(["a zorp robot", ""])
    return family.predict(noisy, torch.tensor([100, 900]), conditioning).float()


def base_of(folder: Path, **settings: Any) -> Family:
    return families.load(Base(model=str(folder), **settings))


def off(one: Tensor, other: Tensor, base: Tensor) -> float:
    """Return how far predictions are apart, as a share of what was learned."""
    return float((one - other).norm() / (other - base).norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_the_folder_draws_as_the_adapter_does(
    kind: str, weight: float, exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    base = Base(model=str(tiny_folder()))
    wanted = predict(load(base, [(exported(kind), weight)], "cpu").family)
    made = merge([(exported(kind), weight)], tmp_path / "merged", base=base.model)
    found = predict(base_of(tmp_path / "merged"))
    assert off(found, wanted, predict(base_of(tiny_folder()))) < 1e-4
    assert made.modules > 10
    assert made.lost < 1e-6 * made.norm


def test_several_add_up_in_any_order(exported: Any, tiny_folder: Folder, tmp_path: Path) -> None:
    pair = [(exported("LoRA"), 0.7), (exported("LoHa"), 0.5)]
    wanted = predict(load(Base(model=str(tiny_folder())), pair, "cpu").family)
    for name, order in (("one", pair), ("two", pair[::-1])):
        merge(order, tmp_path / name, base=str(tiny_folder()))
        found = predict(base_of(tmp_path / name))
        assert off(found, wanted, predict(base_of(tiny_folder()))) < 1e-4


def test_older_libraries_find_the_names_and_files_they_know(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    """transformers 5 leaves out a level of CLIP's names, and the two files of its tokenizer."""
    held, _ = read_safetensors(tiny_folder() / "text_encoder/model.safetensors")
    assert not any(name.startswith("text_model.") for name in held), "the base is of version 5"
    assert not (tiny_folder() / "tokenizer/merges.txt").exists()
    merge([(exported("LoRA"), 1.0)], tmp_path / "merged", base=str(tiny_folder()))

    names, said = read_safetensors(tmp_path / "merged/text_encoder/model.safetensors")
    assert set(names) == {f"text_model.{name}" for name in held}
    assert said == {"format": "pt"}
    own = json.loads((tiny_folder() / "tokenizer/tokenizer.json").read_text())["model"]
    folder = tmp_path / "merged/tokenizer"
    assert json.loads((folder / "vocab.json").read_text()) == own["vocab"]
    lines = (folder / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    assert [line.split(" ") for line in lines[1:]] == [list(pair) for pair in own["merges"]]
    # and by those two files alone the tokenizer reads what it read
    from transformers import CLIPTokenizer

    (folder / "tokenizer.json").unlink()
    again = CLIPTokenizer.from_pretrained(folder)
    prompt = "a small red zorp on the beach"
    before = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
    assert again(prompt).input_ids == before(prompt).input_ids


def test_the_rest_of_the_base_is_there_and_nothing_else(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    made = merge([(exported("LoRA"), 1.0)], tmp_path / "merged", base=str(tiny_folder()))
    for name in ("vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (made.path / name).read_bytes() == (tiny_folder() / name).read_bytes()
    assert sorted(p.name for p in made.path.iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    ]
    changed, _ = read_safetensors(made.path / "unet/diffusion_pytorch_model.safetensors")
    whole, _ = read_safetensors(tiny_folder() / "unet/diffusion_pytorch_model.safetensors")
    still = [k for k, t in whole.items() if t.equal(changed[k])]
    assert set(still) == {k for k in whole if "norm" in k or k.endswith("bias")} | {
        f"{name}.weight"
        for name in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    }
    assert made.path.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o777 | 0o055
    weights = made.path / "unet/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode & 0o044, "others may read it"


def test_what_drawing_does_not_need_is_left_out_and_said(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_folder(), tmp_path / "base")
    index = tmp_path / "base/model_index.json"
    checked = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    held = json.loads(index.read_text()) | checked | {"requires_safety_checker": True}
    index.write_text(json.dumps(held))
    (tmp_path / "base/safety_checker").mkdir()
    (tmp_path / "base/safety_checker/pytorch_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "base/unet/notes.bin").write_bytes(b"\x80\x04")
    made = merge([(exported("LoRA"), 1.0)], tmp_path / "m", base=str(tmp_path / "base"))
    assert any(remark.startswith("safety_checker: left out") for remark in made.remarks)
    told = json.loads((tmp_path / "m/model_index.json").read_text())
    assert told["safety_checker"] == [None, None]
    assert told["requires_safety_checker"] is False
    assert not list((tmp_path / "m").rglob("*.bin"))
    base_of(tmp_path / "m").pipeline()


def test_parts_of_a_large_base_stay_parts(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    import shutil

    import diffusers

    shutil.copytree(tiny_folder(), tmp_path / "base")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_folder() / "unet")
    shutil.rmtree(tmp_path / "base/unet")
    unet.save_pretrained(tmp_path / "base/unet", max_shard_size="200KB")
    merge([(exported("LoRA"), 1.0)], tmp_path / "merged", base=str(tmp_path / "base"))
    parts = sorted(p.name for p in (tmp_path / "merged/unet").glob("*.safetensors"))
    assert len(parts) > 2
    wanted = predict(load(Base(model=str(tiny_folder())), [exported("LoRA")], "cpu").family)
    assert predict(base_of(tmp_path / "merged")).allclose(wanted, atol=1e-5)


def test_half_precision_says_what_it_rounds(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    made = merge([(exported("LoRA"), 1.0)], tmp_path / "b", base=str(tiny_folder()), dtype="bf16")
    assert 1e-3 < made.lost / made.norm < 0.5
    assert any("number format rounds" in line for line in made.lines())
    tensors, _ = read_safetensors(tmp_path / "b/unet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    base_of(tmp_path / "b", dtype="bf16")


def test_a_base_that_is_one_file(exported: Any, tiny_folder: Folder, tmp_path: Path) -> None:
    base, one = tiny_folder(), single_file(tiny_folder(), tmp_path / "one.safetensors")
    given = [(exported("LoRA"), 1.0)]
    made = merge(given, tmp_path / "m", base=str(one), config=str(base))
    assert any("is one file" in remark for remark in made.remarks)
    wanted = predict(load(Base(model=str(base)), given, "cpu").family)
    found = base_of(tmp_path / "m")
    assert off(predict(found), wanted, predict(base_of(base))) < 1e-4
    grey = torch.zeros(1, 3, 32, 32)
    assert found.encode_image(grey).allclose(base_of(base).encode_image(grey), atol=1e-6)
    new = NewFile(tmp_path / "x.safetensors")
    report = extract(str(tmp_path / "m"), str(one), new, Keep(rank=4), config=str(base))
    assert report.kept > 1 - 1e-6
    assert not report.left_out


def test_room_is_asked_for_what_is_written_alone(
    exported: Any, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold the same weights in several forms; one of them is read."""
    shutil.copytree(tiny_folder(), tmp_path / "base")
    with (tmp_path / "base/all-in-one.safetensors").open("wb") as file:
        file.truncate(10**12)
    asked: list[int] = []
    monkeypatch.setattr("tunekit.files.folder.check_room", lambda _, size, __: asked.append(size))
    out, given = tmp_path / "m", [(exported("LoRA"), 1.0)]
    for dtype in ("fp32", "fp16"):
        merge(given, out, base=str(tmp_path / "base"), dtype=dtype, overwrite=True)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert written <= asked[-1] < written + 10_000_000
    assert asked[1] < asked[0]


def test_a_variant_is_merged_under_the_usual_names(
    exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    family = base_of(tiny_folder())
    family.pipeline().to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    given = [(exported("LoRA"), 1.0)]
    with pytest.raises(UserError, match="name the variant it has"):
        merge(given, tmp_path / "m", base=str(tmp_path / "base"))
    merge(given, tmp_path / "m", base=str(tmp_path / "base"), variant="fp16")
    assert not list((tmp_path / "m").rglob("*fp16*"))
    found = base_of(tmp_path / "m")
    wanted = predict(load(Base(model=str(tiny_folder())), given, "cpu").family)
    assert off(predict(found), wanted, predict(base_of(tiny_folder()))) < 0.05


class TestRefused:
    def refused(self, said: str, adapters: Any, out: Path, **options: Any) -> None:
        before = sorted(out.parent.rglob("*"))
        with pytest.raises(UserError, match=said) as caught:
            merge(adapters, out, **options)
        assert "\n" not in str(caught.value)
        assert sorted(out.parent.rglob("*")) == before

    def test_a_folder_that_is_no_models(
        self, exported: Any, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years of work")
        given, base = [(exported("LoRA"), 1.0)], str(tiny_folder())
        self.refused("is there already", given, tmp_path / "mine", base=base)
        self.refused("no model's", given, tmp_path / "mine", base=base, overwrite=True)
        self.refused("base's own folder", given, tiny_folder(), base=base, overwrite=True)

    def test_a_folder_that_what_is_read_lies_in(
        self, exported: Any, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        given, base, out = [(exported("LoRA"), 1.0)], str(tiny_folder()), tmp_path / "m"
        merge(given, out, base=base)
        inside = out / "lora.safetensors"
        inside.write_bytes(given[0][0].read_bytes())
        self.refused("would be replaced", [(inside, 1.0)], out, base=base, overwrite=True)

    def test_another_base(self, exported: Any, tmp_path: Path) -> None:
        given = [(exported("LoRA"), 1.0)]
        self.refused(
            "no modules of toybox|is for another base", given, tmp_path / "m", base="toybox"
        )

    def test_what_half_precision_cannot_hold(self, tiny_folder: Folder, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.safetensors", {"lora_unet_conv_in.diff": random(16, 4, 3, 3) * 1e7}
        )
        given = [(path, 1.0)]
        said = "denoiser.conv_in: becomes NaN or more than float16 can hold"
        self.refused(said, given, tmp_path / "m", base=str(tiny_folder()), dtype="fp16")

    def test_pickled_weights(self, exported: Any, tiny_folder: Folder, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(tiny_folder(), tmp_path / "base")
        (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").rename(
            tmp_path / "base/unet/diffusion_pytorch_model.bin"
        )
        given = [(exported("LoRA"), 1.0)]
        self.refused("is a pickle", given, tmp_path / "m", base=str(tmp_path / "base"))

    def test_a_base_that_is_cut_short(
        self, exported: Any, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        import shutil

        shutil.copytree(tiny_folder(), tmp_path / "base")
        weights = tmp_path / "base/text_encoder/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        given = [(exported("LoRA"), 1.0)]
        self.refused("is damaged", given, tmp_path / "m", base=str(tmp_path / "base"))

    def test_a_full_disk_leaves_nothing(
        self, exported: Any, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        given, base = [(exported("LoRA"), 1.0)], str(tiny_folder())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes a file
        try:
            self.refused(r"cannot be written: File too large", given, tmp_path / "m", base=base)
            with pytest.raises(UserError, match="cannot be written: File too large"):
                convert(given[0][0], "diffusers", out=tmp_path / "c.safetensors", base=base)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(tmp_path.iterdir())
