"""Adapter files of every trainer in another client's naming: the same changes, or refused."""

from __future__ import annotations

import json
import math
import random as dice
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Canary
from made_files import KINDS, changes, export, far, low_rank, matrix, random, shapes, write
from torch import Tensor

from tunekit import families
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.factors import _SPELLINGS
from tunekit.files.adapter import AdapterFile
from tunekit.files.convert import convert
from tunekit.files.cut import Keep
from tunekit.files.names import Names
from tunekit.files.opened import NewFile
from tunekit.files.resize import resize
from tunekit.files.sources import outline
from tunekit.files.stream import TensorFile
from tunekit.schema import Base

Folder = Callable[..., Path]
Wanted = dict[str, Tensor]


@pytest.fixture(scope="module")
def exported(
    tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Path]]:
    made: dict[tuple[str, str], dict[str, Path]] = {}

    def get(kind: str, dtype: str = "fp32") -> dict[str, Path]:
        if (kind, dtype) not in made:
            made[kind, dtype] = export(tiny_folder(), kind, tmp_path_factory.mktemp(kind), dtype)
        return made[kind, dtype]

    return get


def undotted(name: str) -> str:
    return name.replace(".", "_")


def kohya(component: str, name: str) -> str:
    if component == "denoiser":
        return f"lora_unet_{undotted(name)}"
    return f"lora_te_text_model_{undotted(name)}"


class Trainer:
    """Files as a trainer writes them, and the change that each module should have."""

    def __init__(self, folder: Path) -> None:
        self.shapes = shapes(families.load(Base(model=str(folder)), "meta"))

    def sd_scripts(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """kohya's naming, an alpha for each module: here not the same for all."""
        tensors: dict[str, Tensor] = {}
        wanted: Wanted = {}
        for seed, ((component, name), shape) in enumerate(self.shapes.items()):
            down, up = low_rank(shape, seed)
            alpha = 2.0 if seed % 2 else 1.0
            key = kohya(component, name)
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            wanted[f"{component}.{name}"] = matrix(down, up) * alpha / 3
        return tensors, wanted, {"ss_network_module": "networks.lora", "ss_tag_frequency": "{}"}

    def locon(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """LyCORIS: convolutions as three factors, 1 x 1 ends and a kernel in the middle."""
        tensors, wanted, _ = self.sd_scripts()
        for (component, name), shape in self.shapes.items():
            if len(shape) == 4:
                key = kohya(component, name)
                down = random(3, shape[1], 1, 1, seed=50)
                mid, up = random(3, 3, 3, 3, seed=51) * 20, random(shape[0], 3, 1, 1, seed=52)
                tensors[f"{key}.lora_mid.weight"] = mid
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
                one, two, three = up.double(), mid.double(), down.double()
                whole = torch.einsum("orxy,rskl,sicd->oikl", one, two, three)
                wanted[f"{component}.{name}"] = whole * float(tensors[f"{key}.alpha"]) / 3
        return tensors, wanted, {"ss_network_module": "lycoris.kohya"}

    def processors(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """diffusers before PEFT: factors of attention processors, no alpha."""
        tensors: dict[str, Tensor] = {}
        wanted: Wanted = {}
        for seed, ((component, name), shape) in enumerate(self.shapes.items()):
            if "attn" not in name:
                continue
            down, up = low_rank(shape, seed)
            if component == "denoiser":
                head, _, last = name.removesuffix(".0").rpartition(".")
                key = f"unet.{head}.processor.{last}_lora"
            else:
                key = f"text_encoder.text_model.{name}.lora_linear_layer"
            tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = down, up
            wanted[f"{component}.{name}"] = matrix(down, up)
        return tensors, wanted, {}

    def peft(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """PEFT around the U-Net alone: alpha stands in adapter_config.json beside the file."""
        tensors: dict[str, Tensor] = {}
        wanted: Wanted = {}
        for seed, ((component, name), shape) in enumerate(self.shapes.items()):
            if component != "denoiser":
                continue
            down, up = low_rank(shape, seed)
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = down, up
            alpha = 6.0 if name.endswith("to_q") else 9.0
            wanted[f"{component}.{name}"] = matrix(down, up) * alpha / math.sqrt(3)
        return tensors, wanted, {}

    def diffusers(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """diffusers' scripts: PEFT's names, alpha in metadata that only diffusers reads; of the
        release that leaves text_model out."""
        tensors: dict[str, Tensor] = {}
        wanted: Wanted = {}
        for seed, ((component, name), shape) in enumerate(self.shapes.items()):
            down, up = low_rank(shape, seed)
            key = f"{'unet' if component == 'denoiser' else component}.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = down, up
            wanted[f"{component}.{name}"] = matrix(down, up) * 7 / 3
        said = {f"{c}.{k}": v for c in ("unet", "text_encoder") for k, v in _CONFIG.items()}
        return tensors, wanted, {"lora_adapter_metadata": json.dumps(said)}

    def onetrainer(self) -> tuple[dict[str, Tensor], Wanted, dict[str, str]]:
        """OneTrainer: kohya's naming in bf16, alphas as tensors of one number."""
        tensors, wanted, _ = self.sd_scripts()
        narrow = {k: t.bfloat16() for k, t in tensors.items()}
        names = {kohya(*place): ".".join(place) for place in self.shapes}
        for key, name in names.items():
            down, up = narrow[f"{key}.lora_down.weight"], narrow[f"{key}.lora_up.weight"]
            wanted[name] = matrix(down, up) * float(narrow[f"{key}.alpha"]) / 3
        return narrow, wanted, {"modelspec.title": "of OneTrainer"}


_CONFIG = {"lora_alpha": 7, "r": 3, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
TRAINERS = ("sd_scripts", "locon", "processors", "peft", "diffusers", "onetrainer")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_files_of_other_trainers_change_what_they_should(
    trainer: str, layout: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    tensors, wanted, metadata = getattr(Trainer(tiny_folder()), trainer)()
    path = write(tmp_path / "adapter_model.safetensors", tensors, **metadata)
    if trainer == "peft":
        config = _CONFIG | {"lora_alpha": 9, "alpha_pattern": {"attn1.to_q": 6}, "use_rslora": True}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    made = convert(path, layout, base=str(tiny_folder()), out=tmp_path / "out.safetensors")
    assert made.modules == len(wanted)
    assert max(made.there, made.back) < 1e-6
    found = changes(made.path, tiny_folder())
    assert far(wanted, found) < 2e-6  # diffusers, which reckons in float32
    says_none = any("says no alpha" in remark for remark in made.remarks)
    assert says_none == (trainer == "processors")
    assert convert(made.path, layout, out=tmp_path / "again.safetensors", base=str(tiny_folder()))


@pytest.mark.parametrize("trainer", ["processors", "diffusers"])
def test_what_diffusers_reads_itself_is_converted_to_what_it_reads(
    trainer: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    """The judge of an old format is the library whose format it is."""
    tensors, _, metadata = getattr(Trainer(tiny_folder()), trainer)()
    if trainer == "diffusers":  # its own metadata must be whole for it
        from peft import LoraConfig

        whole = LoraConfig(r=3, lora_alpha=7, target_modules=["x"]).to_dict()
        kept = {k: v for k, v in whole.items() if k in ("r", "lora_alpha", "target_modules")}
        kept["target_modules"] = sorted(
            {k.rpartition(".lora_")[0].split(".", 1)[1] for k in tensors}
        )
        said = {f"{c}.{k}": v for c in ("unet", "text_encoder") for k, v in kept.items()}
        metadata = {"lora_adapter_metadata": json.dumps(said)}
    path = write(tmp_path / "it.safetensors", tensors, **metadata)
    made = convert(path, "kohya", base=str(tiny_folder()))
    assert far(changes(path, tiny_folder()), changes(made.path, tiny_folder())) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_ours_there_and_back(
    kind: str, exported: Any, tiny_folder: Folder, tmp_path: Path
) -> None:
    base = tiny_folder()
    for source, path in exported(kind).items():
        for layout in ("diffusers", "kohya"):
            out = tmp_path / f"{source}-{layout}.safetensors"
            refused = (kind == "DoRA") == (layout == "kohya") if kind != "LoRA" else False
            if refused:
                with pytest.raises(UserError, match="tunekit resize"):
                    convert(path, layout, out=out, base=str(base))
                assert not out.exists()
                continue
            made = convert(path, layout, out=out, base=str(base))
            assert (made.source, made.layout) == (source, layout)
            assert max(made.there, made.back) < 1e-6
            assert far(changes(path, base), changes(out, base)) < 2e-6


class TestDora:
    def test_of_lycoris_becomes_that_of_diffusers(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """`dora_scale` is one number an output; diffusers itself drops it from kohya's naming."""
        trainer = Trainer(tiny_folder())
        tensors, low, _ = trainer.sd_scripts()
        family = families.load(Base(model=str(tiny_folder())))
        wanted = {}
        for (component, name), shape in trainer.shapes.items():
            weight = family.component(component).get_submodule(name).weight.detach().double()
            scale = 0.1 + random(shape[0], *[1] * (len(shape) - 1), seed=9).abs()
            tensors[f"{kohya(component, name)}.dora_scale"] = scale
            whole = weight + low[f"{component}.{name}"]
            length = whole.flatten(1).norm(dim=1).reshape(scale.shape)
            wanted[f"{component}.{name}"] = whole / length * scale - weight
        path = write(tmp_path / "it.safetensors", tensors)
        made = convert(path, "diffusers", base=str(tiny_folder()))
        assert made.kinds == ("DoRA",)
        assert far(wanted, changes(made.path, tiny_folder())) < 2e-6
        assert far(wanted, changes(path, tiny_folder())) < 2e-6, "drawn with as it is"

    def test_a_magnitude_of_inputs_becomes_a_plain_lora(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """As OneTrainer and older LyCORIS have it: a length for each input, which no PEFT has."""
        base, trainer = str(tiny_folder()), Trainer(tiny_folder())
        tensors, low, _ = trainer.sd_scripts()
        family = families.load(Base(model=base))
        wanted = {}
        for (component, name), shape in trainer.shapes.items():
            weight = family.component(component).get_submodule(name).weight.detach().double()
            scale = 0.1 + random(1, shape[1], *[1] * (len(shape) - 2), seed=9).abs()
            tensors[f"{kohya(component, name)}.dora_scale"] = scale
            whole = weight + low[f"{component}.{name}"]
            length = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(scale.shape)
            wanted[f"{component}.{name}"] = whole / length * scale - weight
        path = write(tmp_path / "it.safetensors", tensors)
        with pytest.raises(UserError, match=r"magnitude for each input.*tunekit resize --base"):
            convert(path, "diffusers", base=base)
        new = NewFile(tmp_path / "plain.safetensors", dtype="fp32")
        plain = resize(path, new, Keep(energy=1.0), base=base)
        assert far(wanted, changes(plain.path, tiny_folder())) < 1e-5


class TestStrength:
    def test_alpha_is_one_number_for_all_and_written_out(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        tensors, _, metadata = Trainer(tiny_folder()).sd_scripts()
        path = write(tmp_path / "it.safetensors", tensors, **metadata)
        back, said = read_safetensors(convert(path, "kohya", base=str(tiny_folder())).path)
        assert {float(t) for k, t in back.items() if k.endswith(".alpha")} == {1.0}
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("3", "1.0")
        there, said = read_safetensors(convert(path, "diffusers", base=str(tiny_folder())).path)
        assert not [key for key in there if key.endswith("alpha")]
        assert "lora_adapter_metadata" not in said
        assert said["ss_tag_frequency"] == "{}", "carried over"
        assert said["modelspec.architecture"].startswith("stable-diffusion"), "completed"
        assert said["tunekit.made_by"].startswith("converted from kohya to diffusers (tunekit ")

    def test_an_alpha_of_nothing_stays_nothing(self, tiny_folder: Folder, tmp_path: Path) -> None:
        tensors, wanted, _ = Trainer(tiny_folder()).sd_scripts()
        still = next(key for key in tensors if key.endswith("conv1.alpha"))
        for number, off in enumerate(([still], [k for k in tensors if k.endswith(".alpha")])):
            zeros = {key: torch.tensor(0.0) for key in off}
            path = write(tmp_path / f"{number}.safetensors", tensors | zeros)
            for layout in ("kohya", "diffusers"):
                found = changes(convert(path, layout, base=str(tiny_folder())).path, tiny_folder())
                silent = {name for name, change in found.items() if not bool(change.any())}
                every = set(wanted)
                assert silent == (every if number else {"denoiser.mid_block.resnets.0.conv1"})

    def test_half_precision_is_kept_where_it_holds_and_widened_where_not(
        self, exported: Any, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        path, base = exported("LoRA", "fp16")["kohya"], str(tiny_folder())
        forms = TensorFile(path).forms
        assert {f.dtype for k, f in forms.items() if not k.endswith("alpha")} == {"float16"}
        same = convert(path, "kohya", base=base, out=tmp_path / "same.safetensors")
        assert TensorFile(same.path).forms == forms
        assert same.there < 1e-12
        wide = convert(
            path, "diffusers", base=base, out=tmp_path / "wide.safetensors"
        )  # alpha 3 of rank 4
        kinds = {k: f.dtype for k, f in TensorFile(wide.path).forms.items()}
        assert {v for k, v in kinds.items() if "lora_A" in k} == {"float16"}
        assert {v for k, v in kinds.items() if "lora_B" in k} == {"float32"}
        assert any("held in fp32" in remark for remark in wide.remarks)
        assert wide.there < 1e-6
        asked = convert(
            path, "diffusers", base=base, out=tmp_path / "asked.safetensors", dtype="fp16"
        )
        assert {f.dtype for f in TensorFile(asked.path).forms.values()} == {"float16"}
        assert 1e-6 < asked.there < 2e-3


class TestRefused:
    def refused(self, path: Path, said: str, folder: Path | None, layout: str = "diffusers") -> str:
        before = sorted(path.parent.rglob("*"))
        with pytest.raises(UserError, match=said) as caught:
            convert(path, layout, base=str(folder) if folder else None)
        assert "\n" not in str(caught.value)
        assert sorted(path.parent.rglob("*")) == before
        return str(caught.value)

    def test_unknown_keys_are_all_listed(self, tiny_folder: Folder, tmp_path: Path) -> None:
        tensors, _, _ = Trainer(tiny_folder()).sd_scripts()
        path = write(tmp_path / "a.safetensors", tensors | {"x.weight": random(2), "y": random(3)})
        self.refused(path, r"2 tensors are no factors of an adapter: x\.weight, y$", tiny_folder())
        renamed = {k.replace("mid_block", "midblock"): t for k, t in tensors.items()}
        path = write(tmp_path / "b.safetensors", renamed)
        said = self.refused(path, "2 names are no modules of", tiny_folder())
        assert "lora_unet_midblock_resnets_0_conv1" in said
        assert 'did you mean "lora_unet_mid_block_' in said

    def test_a_state_of_a_run_whose_alpha_stands_elsewhere(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        key = "denoiser.mid_block.resnets.0.conv1"
        down, up = low_rank((32, 32, 3, 3), 0)
        tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        path = write(tmp_path / "adapter.safetensors", tensors)
        self.refused(path, "is of a checkpoint, whose strength", tiny_folder())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"lora_up.weight": torch.zeros(16, 5)}, "cannot be multiplied"),
            ({"lora_up.weight": torch.zeros(15, 3)}, "is for another base"),
            ({"lora_up.weight": torch.full((16, 3), torch.nan)}, "NaN or infinite"),
            ({"lora_up.weight": torch.zeros(0, 3)}, "has the shape"),
            ({"hada_w1_a": torch.zeros(3, 3)}, "that is no kind"),
            ({"hada_t1": torch.zeros(3, 3)}, "hada_t1, which this cannot reckon with"),
            ({"alpha": torch.zeros(3)}, "not one number"),
            ({"diff_b": torch.zeros(3)}, r"changes a bias \[3\], and that of .* is none"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_fits_nothing(
        self, change: dict[str, Tensor], said: str, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        tensors, _, _ = Trainer(tiny_folder()).sd_scripts()
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        own = {f"{key}.{factor}": tensor for factor, tensor in change.items()}
        self.refused(write(tmp_path / "a.safetensors", tensors | own), said, tiny_folder(), "kohya")

    def test_factors_that_would_fill_all_memory(self, tiny_folder: Folder, tmp_path: Path) -> None:
        key = "lora_unet_mid_block_resnets_0_conv1"
        huge = {
            f"{key}.{half}_{end}": torch.zeros(*shape)
            for half in ("hada_w1", "hada_w2")
            for end, shape in (("a", (500_000, 1)), ("b", (1, 500_000)))
        }
        path = write(tmp_path / "a.safetensors", huge)
        self.refused(path, "changes 250000000000 numbers", tiny_folder())

    def test_whatever_is_in_it_it_is_read_or_refused_in_one_line(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        throw = dice.Random(0)
        names = Names(outline(Base(model=str(tiny_folder()))))
        formats = [*[torch.float32] * 5, torch.float16, torch.int64, torch.bool]
        formats += [torch.float8_e4m3fn, torch.complex64]
        shapes = [(16, 16), (4, 16), (16, 4), (4, 4, 4), (1,), (), (16, 4, 1, 1), (4, 16, 3, 3)]
        modules = ["mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.conv2", "conv_in", "x"]
        read = 0
        for number in range(300):
            tensors = {}
            for _ in range(throw.randint(1, 5)):
                module = throw.choice(modules).replace(".", "_")
                key = f"lora_unet_{module}.{throw.choice(sorted(_SPELLINGS))}"
                shape = throw.choice(shapes)
                tensors[key] = torch.randn(shape).to(throw.choice(formats))
            path = write(tmp_path / f"{number}.safetensors", tensors)
            refused = ""
            try:
                file = AdapterFile(path, names)
                for place in file.places:
                    parts = file.read(place)
                    weight = names.modules[place].weight
                    file.change(place, parts, torch.zeros(weight.shape))
                    read += 1
            except UserError as fault:
                refused = str(fault)
            assert not refused or refused.startswith(str(path))
            assert "\n" not in refused
        assert read

    def test_pickles_and_broken_files(self, tiny_folder: Folder, tmp_path: Path) -> None:
        torch.save({"x": Canary(tmp_path / "canary")}, tmp_path / "a.safetensors")
        self.refused(tmp_path / "a.safetensors", "pickle", tiny_folder())
        whole = write(tmp_path / "b.safetensors", {"x": random(4)}).read_bytes()
        for name, data in (
            ("cut", whole[:-3]),
            ("header", (2**60).to_bytes(8, "little") + b"{" + whole),
            ("json", (20).to_bytes(8, "little") + b"{" * 20),
        ):
            (tmp_path / f"{name}.safetensors").write_bytes(data)
            self.refused(tmp_path / f"{name}.safetensors", "safetensors|damaged", tiny_folder())
        self.refused(tmp_path / "none.safetensors", "cannot be read", tiny_folder())

    def test_words_have_no_layout(self, tiny_folder: Folder, tmp_path: Path) -> None:
        self.refused(
            write(tmp_path / "a.safetensors", {"<zorp>": random(2, 32)}), "new words", None
        )

    def test_a_base_that_nobody_knows(self, tiny_folder: Folder, tmp_path: Path) -> None:
        tensors, _, _ = Trainer(tiny_folder()).sd_scripts()
        path = write(tmp_path / "a.safetensors", tensors, ss_base_model_version="sd_v1")
        self.refused(path, r"says it is for sd_v1: name a base of its kind with --base", None)
        named = {"ss_sd_model_name": "v1-5-pruned.safetensors"}
        path = write(tmp_path / "b.safetensors", tensors, **named)
        self.refused(path, 'made for "v1-5-pruned.safetensors", which is no folder here', None)

    def test_a_file_brings_nothing_from_the_hub(self, tiny_folder: Folder, tmp_path: Path) -> None:
        """Whoever wrote it would choose what is downloaded; the user may."""
        tensors, _, _ = Trainer(tiny_folder()).sd_scripts()
        path = write(tmp_path / "a.safetensors", tensors, ss_sd_model_name="someone/model")
        self.refused(path, r"says it is for someone/model, .*: --base someone/model does", None)

    def test_what_is_there_stays(self, exported: Any, tiny_folder: Folder, tmp_path: Path) -> None:
        path, base = exported("LoRA")["kohya"], str(tiny_folder())
        out = write(tmp_path / "out.safetensors", {"x": random(1)})
        before = out.read_bytes()
        with pytest.raises(UserError, match="is there already; --overwrite"):
            convert(path, "diffusers", out=out, base=base)
        assert out.read_bytes() == before
        convert(path, "diffusers", out=out, base=base, overwrite=True)
        assert out.read_bytes() != before
