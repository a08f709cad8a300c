"""An adapter file is described by what it holds, and what is wrong with it is said."""

from __future__ import annotations

import contextlib
import json
import math
import random as dice
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Canary
from taught import recipe_for, teach
from torch import Tensor

from tunekit import checkpoint, export
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.factors import _SPELLINGS
from tunekit.info import AdapterInfo, describe

Write = Callable[..., Path]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(module: str, rank: int = 4, outer: int = 16, inner: int = 8) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": random(rank, inner, seed=1),
        f"{module}.lora_B.weight": random(outer, rank, seed=2),
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(tensors: dict[str, Tensor], **metadata: str) -> Path:
        path = tmp_path / "it.safetensors"
        write_safetensors(path, tensors, metadata)
        return path

    return made


@pytest.fixture(scope="module")
def exported(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_for(tiny_folder(), adapter={"text_encoder": True, "targets": "full"})
    folder = tmp_path_factory.mktemp("info")
    family, adapter = teach(recipe)
    checkpoint.save(folder / "step-000001", {"adapter": adapter.state()}, {})
    return export.export_adapter(family, adapter, recipe, folder)[0].path


@pytest.fixture(scope="module")
def info(exported: Path) -> AdapterInfo:
    return describe(exported)


class TestExported:
    def test_facts(self, info: AdapterInfo, exported: Path) -> None:
        assert (info.kind, info.ranks) == ("LoRA", {4: len(info.modules)})
        assert info.names == "diffusers (unet, text_encoder)"
        assert info.dtypes == {"fp16": 2 * len(info.modules)}
        assert info.trigger == "zorp"
        assert info.architecture == "stable-diffusion-topology-32/lora"
        assert info.bytes == exported.stat().st_size
        assert info.targets["to_q"] == info.targets["to_out.0"]
        assert info.suspicious == info.unread == ()

    def test_norms_are_those_of_the_weight_changes(self, info: AdapterInfo, exported: Path) -> None:
        tensors, _ = read_safetensors(exported)
        for module in info.modules:
            a = tensors[f"{module.name}.lora_A.weight"].double().flatten(1)
            b = tensors[f"{module.name}.lora_B.weight"].double().flatten(1)
            assert module.norm == pytest.approx(float((b @ a).norm()), rel=1e-9)

    def test_lines_and_json(self, info: AdapterInfo) -> None:
        lines = info.lines()
        assert lines[0].startswith("file       zorp-diffusers.safetensors, ")
        assert lines[-1] == "suspicious nothing"
        assert any("trained with 6.0" in line for line in lines)
        assert not any("tunekit.recipe" in line for line in lines)
        whole = json.loads(json.dumps(info.as_dict(), allow_nan=False))
        assert json.loads(whole["metadata"]["tunekit.recipe"])["name"] == "zorp"

    def test_the_adapter_in_a_checkpoint(self, exported: Path) -> None:
        info = describe(exported.parent / "step-000001" / "adapter.safetensors")
        assert (info.kind, info.dtypes.keys()) == ("LoRA", {"fp32"})
        assert info.architecture == "a U-Net over text 32 wide (told by a shape)"


class TestOtherNames:
    def test_kohya(self, write: Write) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {
            f"{name}.lora_down.weight": random(4, 768),
            f"{name}.lora_up.weight": random(16, 4),
            f"{name}.alpha": torch.tensor(8.0),
        }
        info = describe(write(tensors, ss_base_model_version="sd_v1"))
        (module,) = info.modules
        assert (module.rank, module.alpha, module.kind) == (4, 8.0, "LoRA")
        whole = 2 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert module.norm == pytest.approx(float(whole.norm()), rel=1e-5)
        assert info.names == "kohya (lora_unet)"
        assert info.architecture == "sd_v1"
        assert info.targets == {"to_k": 1}
        assert info.suspicious == ()

    def test_kohya_without_alpha(self, write: Write) -> None:
        name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        info = describe(
            write(
                {f"{name}.lora_down.weight": random(4, 8), f"{name}.lora_up.weight": random(8, 4)}
            )
        )
        assert info.targets == {"q_proj": 1}
        assert "no alpha" in info.suspicious[0]

    def test_before_peft(self, write: Write) -> None:
        name = "unet.mid_block.attn1.processor.to_q_lora"
        info = describe(
            write({f"{name}.down.weight": random(4, 8), f"{name}.up.weight": random(8, 4)})
        )
        assert info.names.startswith("diffusers before PEFT")
        (module,) = info.modules
        assert (module.name, module.rank) == ("unet.mid_block.attn1.processor.to_q", 4)

    def test_a_convolution_and_a_factored_one(self, write: Write) -> None:
        tensors = {
            "unet.conv1.lora_A.weight": random(4, 8, 3, 3),
            "unet.conv1.lora_B.weight": random(16, 4, 1, 1),
        }
        (module,) = describe(write(tensors)).modules
        whole = tensors["unet.conv1.lora_B.weight"].flatten(1) @ tensors[
            "unet.conv1.lora_A.weight"
        ].flatten(1)
        assert module.norm == pytest.approx(float(whole.norm()), rel=1e-5)

    def test_loha_and_lokr_and_dora(self, write: Write) -> None:
        hada = {
            f"x.hada_w{n}_{part}": random(*shape, seed=n)
            for n in (1, 2)
            for part, shape in (("a", (6, 2)), ("b", (2, 5)))
        }
        (module,) = describe(write(hada)).modules
        whole = (hada["x.hada_w1_a"] @ hada["x.hada_w1_b"]) * (
            hada["x.hada_w2_a"] @ hada["x.hada_w2_b"]
        )
        assert (module.kind, module.rank) == ("LoHa", 2)
        assert module.norm == pytest.approx(float(whole.norm()), rel=1e-5)

        lokr = {"x.lokr_w1": random(2, 3), "x.lokr_w2_a": random(6, 2), "x.lokr_w2_b": random(2, 5)}
        (module,) = describe(write(lokr)).modules
        whole = torch.kron(lokr["x.lokr_w1"], lokr["x.lokr_w2_a"] @ lokr["x.lokr_w2_b"])
        assert module.kind == "LoKr"
        assert module.norm == pytest.approx(float(whole.norm()), rel=1e-5)

        lora = pair("unet.x") | {"unet.x.alpha": torch.tensor(8.0), "unet.x.diff_b": random(16)}
        (module,) = describe(write(lora)).modules
        product = 2 * lora["unet.x.lora_B.weight"] @ lora["unet.x.lora_A.weight"]
        both = math.hypot(float(product.norm()), float(lora["unet.x.diff_b"].norm()))
        assert module.norm == pytest.approx(both, rel=1e-5), "of weight and bias together"

        dora = pair("unet.x") | {"unet.x.lora_magnitude_vector": random(16)}
        assert describe(write(dora)).kind == "DoRA"
        assert describe(write(dora | pair("unet.y"))).kind == "mixed (DoRA, LoRA)"

    def test_alpha_in_metadata_of_diffusers(self, write: Write) -> None:
        said = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}}
        tensors = pair("unet.attn1.to_q") | pair("unet.attn1.to_k")
        info = describe(write(tensors, lora_adapter_metadata=json.dumps(said)))
        assert {m.name: m.alpha for m in info.modules} == {
            "unet.attn1.to_q": 8.0,
            "unet.attn1.to_k": 2.0,
        }
        assert "only diffusers reads" in info.suspicious[0]


class TestSuspicious:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"unet.a.lora_B.weight": torch.zeros(16, 4)}, "zero change in unet.a"),
            (
                {f"unet.{m}.lora_B.weight": torch.zeros(16, 4) for m in "ab"},
                "the whole adapter changes nothing",
            ),
            ({"unet.a.lora_A.weight": torch.full((4, 8), torch.nan)}, "NaN"),
            ({"unet.a.lora_A.weight": torch.full((4, 8), torch.inf)}, "infinite"),
            ({"unet.c.lora_A.weight": random(4, 8)}, "only one of two factors in unet.c"),
            (pair("unet.a", rank=9), "a rank above the module's own width in unet.a"),
            ({"unet.a.lora_A.weight": torch.full((4, 8), 6e4).half()}, "near what the format"),
            ({"unet.conv_in.weight": random(4)}, "no factor of an adapter: unet.conv_in.weight"),
            ({"unet.c.alpha": torch.tensor(1.0)}, "an alpha without factors in unet.c"),
        ],
    )
    def test_is_said(self, change: dict[str, Tensor], said: str, write: Write) -> None:
        info = describe(write(pair("unet.a") | pair("unet.b") | change))
        assert any(said in line for line in info.suspicious), info.suspicious
        json.dumps(info.as_dict(), allow_nan=False)
        assert any(line.startswith("suspicious") and said in line for line in info.lines())

    def test_magnitudes_alone_may_change_something(self, write: Write) -> None:
        """A DoRA whose factors stayed at zero: what its magnitudes do, only the base tells."""
        tensors = pair("unet.a") | {"unet.a.lora_magnitude_vector": random(16)}
        tensors["unet.a.lora_B.weight"] = torch.zeros(16, 4)
        said = describe(write(tensors)).suspicious
        assert not any("changes nothing" in line or "zero change" in line for line in said)
        assert any("magnitudes alone could change anything, in unet.a" in line for line in said)


class TestReaders:
    """What is so named that some clients, or all, would pass over it."""

    def said(self, tensors: dict[str, Tensor], write: Write) -> tuple[str, ...]:
        return describe(write(tensors)).suspicious

    def test_two_names_for_one_factor(self, write: Write) -> None:
        """One of them is described, and the other is not passed over in silence."""
        tensors = pair("unet.mid_block.to_q")
        other = {"unet.mid_block.to_q.lora_down.weight": random(4, 8, seed=9)}
        assert not describe(write(tensors)).suspicious
        (said,) = describe(write(tensors | other)).suspicious
        assert said.startswith("second names for factors that are there")
        assert "unet.mid_block.to_q.lora_" in said

    def test_names_of_peft_and_its_alpha_beside_the_file(self, tmp_path: Path) -> None:
        tensors = {f"base_model.model.{k}": t for k, t in pair("mid_block.attn1.to_q").items()}
        path = tmp_path / "adapter_model.safetensors"
        write_safetensors(path, tensors)
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "use_rslora": true}')
        info = describe(path)
        assert info.names == "PEFT (base_model)"
        assert info.modules[0].alpha == 16, "8 over the root of 4, in terms of alpha / rank"
        assert any("PEFT's own names" in line for line in info.suspicious)

    @pytest.mark.parametrize(
        "name", ["text_encoder.encoder.layers.0.mlp.fc1", "lora_te1_encoder_layers_0_mlp_fc1"]
    )
    def test_a_text_encoder_of_the_newest_release(self, name: str, write: Write) -> None:
        assert any("without text_model" in line for line in self.said(pair(name), write))
        whole = name.replace(".encoder", ".text_model.encoder").replace(
            "te1_encoder", "te1_text_model_encoder"
        )
        assert not any("without text_model" in line for line in self.said(pair(whole), write))

    def test_what_clients_read_differently(self, write: Write) -> None:
        kohya = {
            "lora_unet_mid_block_a.lora_down.weight": random(4, 8),
            "lora_unet_mid_block_a.lora_up.weight": random(16, 4),
            "lora_unet_mid_block_a.alpha": torch.tensor(4.0),
        }
        assert self.said(kohya, write) == ()
        dora = kohya | {"lora_unet_mid_block_a.dora_scale": random(16, 1)}
        other = {k.replace("block_a", "block_b"): t.clone() for k, t in kohya.items()}
        other["lora_unet_mid_block_b.alpha"] = torch.tensor(2.0)
        for tensors, told in (
            (dora, "DoRA in kohya's naming"),
            (kohya | other, "several alphas: diffusers draws"),
            (kohya | pair("unet.b"), "two clients' names in one file"),
            (pair("unet.b") | {"unet.b.alpha": torch.tensor(4.0)}, "which diffusers refuses"),
            (kohya | {"lora_unet_c.oft_R": random(2, 3)}, "only PEFT reads it"),
        ):
            assert any(told in line for line in self.said(tensors, write)), told

    def test_modules_that_the_base_has_not(
        self, exported: Path, tiny_folder: Callable[..., Path]
    ) -> None:
        fitting = describe(exported, str(tiny_folder()))
        assert fitting.suspicious == ()
        assert any(line.startswith("family     ") for line in fitting.lines())
        tensors, metadata = read_safetensors(exported)
        strange = exported.with_name("strange.safetensors")
        write_safetensors(
            strange, {k.replace("mid_block", "middle"): t for k, t in tensors.items()}, metadata
        )
        assert describe(strange).suspicious == ()
        said = describe(strange, str(tiny_folder())).suspicious
        assert any("no modules of" in line and "unet.middle." in line for line in said)

    def test_a_product_that_would_fill_all_memory(self, write: Write) -> None:
        huge = {
            f"lora_unet_a.{half}_{end}": torch.zeros(*shape)
            for half in ("hada_w1", "hada_w2")
            for end, shape in (("a", (500_000, 1)), ("b", (1, 500_000)))
        }
        (module,) = describe(write(huge)).modules
        assert module.norm is None


class TestRefused:
    def refused(self, path: Path, said: str) -> None:
        with pytest.raises(UserError, match=said) as caught:
            describe(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))

    def test_pickles(self, tmp_path: Path) -> None:
        for name in ("it.bin", "it.safetensors"):
            for zipped in (True, False):
                torch.save(
                    {"x.lora_A.weight": Canary(tmp_path / "canary")},
                    tmp_path / name,
                    _use_new_zipfile_serialization=zipped,
                )
                self.refused(tmp_path / name, "pickle")
        assert not (tmp_path / "canary").exists()

    def test_what_is_no_safetensors_file(self, write: Write, tmp_path: Path) -> None:
        whole = write(pair("unet.a")).read_bytes()
        broken: dict[str, bytes] = {
            "empty": b"",
            "page": b"<!doctype html><html></html>",
            "header": (2**60).to_bytes(8, "little") + b"{" + whole,
            "cut": whole[:-7],
            "json": (20).to_bytes(8, "little") + b"{" * 20,
        }
        for name, data in broken.items():
            (tmp_path / name).write_bytes(data)
            self.refused(tmp_path / name, "safetensors|damaged")
        self.refused(tmp_path / "none", "cannot be read")
        self.refused(tmp_path, "cannot be read")

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            (
                pair("unet.a") | {"unet.a.lora_B.weight": random(16, 5)},
                r"cannot be multiplied: \[16, 5\] by \[4, 8\]",
            ),
            (pair("unet.a") | {"unet.a.lora_A.weight": random(4)}, r"has the shape \[4\]"),
            (pair("unet.a", rank=0), "has the shape"),
            ({"x.alpha": torch.ones(3)}, r"alpha of x has the shape \[3\], not one number"),
            ({"unet.conv.weight": random(3)}, r"holds no adapter.*unet\.conv\.weight"),
            ({}, "holds no adapter"),
        ],
    )
    def test_absurd_shapes(self, tensors: dict[str, Tensor], said: str, write: Write) -> None:
        self.refused(write(tensors), said)

    def test_whatever_is_in_it_the_answer_is_a_description_or_one_line(self, write: Write) -> None:
        throw = dice.Random(0)
        formats = [*[torch.float32] * 6, torch.float16, torch.int64, torch.bool]
        formats += [torch.float8_e4m3fn, torch.complex64]
        modules = ["unet.a", "lora_unet_b", "c", "transformer.x.attn2.to_k"]
        for _ in range(300):
            tensors = {}
            for _ in range(throw.randint(1, 6)):
                key = f"{throw.choice(modules)}.{throw.choice(sorted(_SPELLINGS))}"
                shape = [
                    throw.choice([1, 3, 4, 4, 4]) for _ in range(throw.choice([2, 2, 4, 0, 5]))
                ]
                values = random(*shape) * throw.choice([0, 1, 1e5, float("nan")])
                kind = throw.choice(formats)
                if not kind.is_floating_point:
                    values = torch.zeros(shape)
                tensors[key] = values.to(kind)
            with contextlib.suppress(UserError):
                info = describe(write(tensors))
                assert info.lines()
                json.dumps(info.as_dict(), allow_nan=False)

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_metadata_that_lies(self, text: Any, write: Write) -> None:
        self.refused(write(pair("unet.a"), lora_adapter_metadata=text), "lora_adapter_metadata")
