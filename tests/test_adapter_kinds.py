"""What each adapter kind does that others do not: its settings, its files, its start."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attached import assert_same, attach, snapshot, teach
from pydantic import ValidationError
from torch import nn

from tunekit import adapters
from tunekit.errors import UserError
from tunekit.families.base import Family

Load = Callable[..., Family]


class TestLora:
    def settings(self, **values: Any) -> Any:
        return adapters.get("lora").Settings(kind="lora", **values)

    def test_the_default_is_all_of_attention_and_nothing_else(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family, "lora", {})
        found = {
            name.rpartition(".lora_")[0].removeprefix("denoiser.") for name in adapter.trained()
        }
        adapter.detach()
        from diffusers.models.attention_processor import Attention

        wanted = {
            f"{name}.{part}"
            for name, module in family.denoiser.named_modules()
            if isinstance(module, Attention)
            for part in ("to_q", "to_k", "to_v", "to_out.0")
        }
        assert found == wanted

    def test_a_second_one_is_a_mistake_of_ours(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        attach(family, "lora", {"targets": "full"})
        with pytest.raises(AssertionError, match="attached already"):
            attach(family, "lora", {"targets": ["base_layer"]})

    def test_presets_grow_and_full_leaves_out_what_clients_refuse(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        found = {}
        for preset in ("attention", "attention+mlp", "full"):
            adapter = attach(family, "lora", {"targets": preset})
            found[preset] = {name.rpartition(".lora_")[0] for name in adapter.trained()}
            adapter.detach()
        assert found["attention"] < found["attention+mlp"] < found["full"]
        every = {
            f"denoiser.{name}"
            for name, module in family.denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        refused = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
        assert every - found["full"] == {f"denoiser.{name}" for name in refused}

    def test_the_scale_stands_in_the_tensors(self, load_tiny: Load) -> None:
        """W x + (alpha / rank) B A x, computed from the exported tensors by hand."""
        family = load_tiny("sd")
        adapter = attach(family, "lora", {"rank": 4, "alpha": 12.0})
        teach(family, adapter)
        tensors, metadata = adapter.export_state("diffusers")
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        layer: Any = family.denoiser.get_submodule(name)
        a, b = (tensors[f"unet.{name}.lora_{x}.weight"] for x in "AB")
        x = torch.randn(5, a.shape[1])
        with torch.no_grad():
            wanted = layer.base_layer(x) + x @ a.T @ b.T
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
            trained_b = adapter.trained()[f"denoiser.{name}.lora_B.weight"]
            torch.testing.assert_close(b, 3 * trained_b)
        assert metadata["tunekit.trained_alpha"] == "12.0"

    def test_text_encoder_keys_are_those_that_every_client_reads(self, load_tiny: Load) -> None:
        adapter = attach(load_tiny("sd"), "lora", {"text_encoder": True})
        keys = adapter.export_state("diffusers")[0]
        text = [key for key in keys if not key.startswith("unet.")]
        assert text
        assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in text)

    def test_a_pattern_that_finds_nothing_is_refused_before_anything_changes(
        self, load_tiny: Load
    ) -> None:
        family = load_tiny("sd")
        before = snapshot(family)
        with pytest.raises(UserError, match=r'adapter\.targets: "to_qq".*to_q'):
            attach(family, "lora", {"targets": ["to_k", "to_qq"]})
        with pytest.raises(UserError, match=r"adapter\.text_encoder_targets"):
            attach(family, "lora", {"text_encoder": True, "text_encoder_targets": ["transformer"]})
        assert_same(before, snapshot(family))

    @pytest.mark.parametrize(
        "values",
        [
            {"rank": 0},
            {"rank": 2.5},
            {"alpha": 0},
            {"alpha": float("nan")},
            {"dropout": 1.0},
            {"targets": "atention"},
            {"targets": []},
            {"targets": ["(to_q"]},
            {"text_encoder_rank": 4},
            {"text_encoder_targets": "full"},
            {"rnk": 3},
            {"dora": True, "init": "pissa"},
            {"dora": True, "rank_dropout": 0.1},
            {"init": "olora", "dropout": 0.1},
            {"init": "orthogonal", "rank": 5},
            {"init": "orthogonal", "rank_pattern": {"to_q": 3}},
            {"rank_pattern": {"(to_q": 3}},
            {"rank_pattern": {"to_q": 0}},
            {"learning_rate_scale": {"to_q": 0}},
            {"loraplus_ratio": 0.5},
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            self.settings(**values)

    def test_a_null_alpha_is_the_rank(self) -> None:
        plan = {"denoiser": ["a", "b"], "text_encoder": ["c"]}
        assert self.settings(rank=7).alphas(plan)["denoiser.a"] == 7
        text = {"text_encoder": True, "text_encoder_rank": 2}
        narrow = self.settings(rank=8, alpha=4.0, rank_pattern={"b": 16}, **text)
        assert narrow.ranks(plan) == {"denoiser.a": 8, "denoiser.b": 16, "text_encoder.c": 2}
        assert narrow.alphas(plan) == {"denoiser.a": 4, "denoiser.b": 4, "text_encoder.c": 1}
        assert not self.settings().trains_text_encoder()
        assert self.settings(text_encoder=True).trains_text_encoder()

    def test_patterns_decide_rank_alpha_and_rate(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(
            family,
            "lora",
            {
                "rank": 4,
                "alpha": 2.0,
                "text_encoder": True,
                "rank_pattern": {"to_k": 3, r"text_encoder\..*q_proj": 2},
                "alpha_pattern": {r"mid_block\..*to_k": 12.0},
                "learning_rate_scale": {"to_v": 0.5, r"text_encoder\..*": 3.0},
                "loraplus_ratio": 16.0,
            },
        )
        trained = adapter.trained()
        rates = {id(p): g.scale for g in adapter.parameter_groups() for p in g.parameters}
        for name, parameter in trained.items():
            if not name.endswith("lora_A.weight"):
                continue
            module = name.removesuffix(".lora_A.weight")
            rank = 3 if module.endswith("to_k") else 2 if module.endswith("q_proj") else 4
            assert len(parameter) == rank, name
            text, halved = module.startswith("text_encoder."), module.endswith("to_v")
            rate = 3.0 if text else 0.5 if halved else 1.0
            assert rates[id(parameter)] == rate
            assert rates[id(trained[f"{module}.lora_B.weight"])] == 16 * rate
        tensors = adapter.export_state("kohya")[0]
        alphas = {key.split(".")[0]: float(t) for key, t in tensors.items() if "alpha" in key}
        middle = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_"
        inner = "denoiser.mid_block.attentions.0.transformer_blocks.0.attn2."
        # One alpha for the whole file; what a pattern says of it has gone into the factors.
        assert set(alphas.values()) == {4.0}
        strengths = {
            "k": (12.0 / 3, trained[f"{inner}to_k.lora_B.weight"]),
            "q": (2.0 / 4, trained[f"{inner}to_q.lora_B.weight"]),
        }
        for letter, (strength, up) in strengths.items():
            written = tensors[f"{middle}{letter}.lora_up.weight"]
            rank = written.shape[1]
            torch.testing.assert_close(written * (4.0 / rank), up.detach() * strength)

    def test_patterns_that_name_nothing_or_contradict_are_refused(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        before = snapshot(family)
        for settings, said in (
            ({"rank_pattern": {"to_x": 3}}, r'rank_pattern: "to_x" is the end of no name'),
            ({"rank_pattern": {"to_q": 3, "attn1.to_q": 2}}, "both name .* and say 3 and 2"),
            ({"learning_rate_scale": {"q_proj": 3}}, 'learning_rate_scale: "q_proj" is the end'),
            ({"init": "pissa", "rank": 64}, r"adapter\.rank: init pissa .* has 16, fewer than 64"),
        ):
            with pytest.raises(UserError, match=said):
                attach(family, "lora", settings)
        assert_same(before, snapshot(family))

    def test_rslora_and_kohya_say_the_strength_that_was_trained(self, load_tiny: Load) -> None:
        """W x + (alpha / sqrt(rank)) B A x, by the rule of those files: alpha / rank."""
        family = load_tiny("sd")
        adapter = attach(family, "lora", {"rank": 4, "alpha": 3.0, "rslora": True})
        teach(family, adapter)
        tensors, metadata = adapter.export_state("kohya")
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        down, up = (tensors[f"{key}.lora_{x}.weight"] for x in ("down", "up"))
        alpha = float(tensors[f"{key}.alpha"])
        assert alpha == pytest.approx(3.0 * 4**0.5)
        layer: Any = family.denoiser.get_submodule(
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        )
        x = torch.randn(5, down.shape[1])
        with torch.no_grad():
            wanted = layer.base_layer(x) + 3.0 / 4**0.5 * x @ down.T @ up.T
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
        assert metadata["ss_network_module"] == "networks.lora"
        assert metadata["ss_network_dim"] == "4"

    def test_rank_dropout_leaves_out_ranks_and_keeps_the_mean(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family, "lora", {"rank": 4, "rank_dropout": 0.5, "targets": "full"})
        teach(family, adapter)
        for name in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"):
            if name == "conv_in":
                name = "mid_block.resnets.0.conv1"
            layer: Any = family.denoiser.get_submodule(name)
            inner = layer.lora_A["tunekit"]
            x = torch.randn(2, 3, 32) if layer.base_layer.weight.ndim == 2 else None
            given = torch.randn(2, 32, 4, 4) if x is None else x
            with torch.no_grad():
                whole = inner(given)
                adapter.train()
                torch.manual_seed(0)
                drawn = torch.stack([inner(given) for _ in range(400)])
                adapter.train(False)
                assert inner(given).equal(whole)
            torch.testing.assert_close(drawn.mean(0), whole, atol=0.4, rtol=0.2)
            share = (drawn == 0).float().mean()
            assert 0.4 < float(share) < 0.6

    def test_a_dora_at_half_strength_lies_between(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family, "lora", {"rank": 4, "dora": True})
        teach(family, adapter)
        name = next(iter(adapter.changes()))
        whole = adapter.changes()[name](family)
        adapter.set_scale(0.5)
        half = adapter.changes()[name](family)
        assert 0.3 < float(half.norm() / whole.norm()) < 0.7
        adapter.set_scale(0)
        assert float(adapter.changes()[name](family).norm() / whole.norm()) < 1e-5

    def test_what_starts_in_the_weight_is_exported_as_a_plain_difference(
        self, load_tiny: Load
    ) -> None:
        for init in ("pissa", "olora"):
            family = load_tiny("sd")
            adapter = attach(family, "lora", {"rank": 3, "alpha": 6.0, "init": init})
            first = adapter.state()
            assert all(float(t.norm()) > 0.01 for t in first.values()), "it starts somewhere"
            assert all(float(c(family).norm()) < 1e-5 for c in adapter.changes().values())
            teach(family, adapter)
            tensors, _ = adapter.export_state("diffusers")
            for name, change in adapter.changes().items():
                key = f"unet.{name.removeprefix('denoiser.')}"
                a, b = (tensors[f"{key}.lora_{x}.weight"] for x in "AB")
                assert len(a) <= 6
                torch.testing.assert_close(b @ a, change(family), atol=1e-6, rtol=1e-4)
                assert float(a.norm()) < 10 * float(change(family).norm()) ** 0.5, "balanced"


class TestOthers:
    @pytest.mark.parametrize(
        ("kind", "values"),
        [
            ("lokr", {"factor": 1}),
            ("loha", {"rank": 0}),
            ("loha", {"dora": True}),
            ("oft", {"block_size": 1}),
            ("boft", {"block_size": 3}),
            ("full", {"rank": 4}),
            ("full", {"targets": "everything"}),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(
        self, kind: str, values: dict[str, Any]
    ) -> None:
        with pytest.raises(ValidationError):
            adapters.get(kind).Settings(kind=kind, **values)

    def test_blocks_that_do_not_divide_a_width_are_refused(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        before = snapshot(family)
        with pytest.raises(UserError, match=r"adapter\.block_size: blocks of 5 .* \(16\)"):
            attach(family, "oft", {"block_size": 5})
        with pytest.raises(UserError, match="blocks of 8 need widths that are multiples of 64"):
            attach(family, "boft", {"block_size": 8, "factors": 4})
        assert_same(before, snapshot(family))

    def test_two_whole_halves_carry_their_strength_themselves(self, load_tiny: Load) -> None:
        adapter = attach(load_tiny("sd"), "lokr", {"rank": 16, "alpha": 4.0})
        tensors, _ = adapter.export_state("kohya")
        key = next(key for key in tensors if key.endswith(".lokr_w2")).removesuffix(".lokr_w2")
        assert float(tensors[f"{key}.alpha"]) == 16, "alpha / rank is 1 for whoever reckons it"

    def test_turning_keeps_every_length(self, load_tiny: Load) -> None:
        for kind in ("oft", "boft"):
            family = load_tiny("sd")
            adapter = attach(family, kind, {"block_size": 4})
            teach(family, adapter)
            name, change = next(iter(adapter.changes().items()))
            module: Any = family.denoiser.get_submodule(name.removeprefix("denoiser."))
            turned = module.weight + change(family)
            assert float(change(family).norm()) > 0.01
            torch.testing.assert_close(turned.T @ turned, module.weight.T @ module.weight)

    def test_custom_diffusion_is_two_patterns(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family, "full", {"targets": [r"attn2\.to_k", r"attn2\.to_v"]})
        teach(family, adapter)
        keys = adapter.export_state("kohya")[0]
        assert keys
        assert all(re.search(r"_attn2_to_[kv]\.diff$", key) for key in keys)
