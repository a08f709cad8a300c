"""What every adapter kind promises on every family, on tiny models of the real classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tunekit import adapters, checkpoint, families
from tunekit.adapters.base import Adapter
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.families.base import Family
from tunekit.loading import load_file, read_by_diffusers
from tunekit.schema import LAYOUTS, Train
from tunekit.train import train

Load = Callable[..., Family]
PROMPTS = ["a zorp robot on the beach", ""]

# Settings that between them reach every branch of a kind; the contract holds for each.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "default": {},
        "alpha": {"rank": 4, "alpha": 12.0, "targets": "attention+mlp"},
        "full": {"rank": 3, "targets": "full"},
        "patterns": {"targets": [r"attn2?\.to_(k|v)", r"conv1|ff\.net\.2"]},
        "text": {"rank": 4, "alpha": 2.0, "text_encoder": True, "text_encoder_rank": 2},
        "dropout": {"rank": 4, "dropout": 0.5, "rank_dropout": 0.5, "targets": "full"},
        "dora": {"rank": 4, "alpha": 2.0, "dora": True, "targets": "full", "text_encoder": True},
        "rslora": {"rank": 4, "rslora": True, "loraplus_ratio": 16.0, "init": "gaussian"},
        "by pattern": {
            "rank": 4,
            "alpha": 2.0,
            "targets": "full",
            "text_encoder": True,
            "rank_pattern": {r"conv1|ff\.net\.2": 2, r"text_encoder\..*": 3},
            "alpha_pattern": {r"(mid_block|(single_)?transformer_blocks\.1)\..*to_q": 8.0},
            "learning_rate_scale": {r"attn2?\.to_v": 2.0},
        },
        "pissa": {"rank": 4, "alpha": 2.0, "init": "pissa", "targets": "full"},
        "olora": {"rank": 4, "init": "olora", "text_encoder": True},
        "orthogonal": {"rank": 4, "init": "orthogonal", "targets": "full"},
    },
    "loha": {
        "default": {"rank": 4},
        "full": {"rank": 3, "alpha": 1.5, "targets": "full", "text_encoder": True, "dropout": 0.05},
    },
    "lokr": {
        "default": {},
        "full": {"rank": 2, "alpha": 1.0, "targets": "full", "text_encoder": True, "factor": 4},
        "both": {"rank": 1, "targets": "full", "decompose_both": True, "dropout": 0.05},
    },
    "oft": {
        "default": {},
        "full": {"block_size": 4, "targets": "full", "text_encoder": True},
    },
    "boft": {
        "default": {"block_size": 4},
        "full": {"block_size": 2, "factors": 3, "targets": "full", "text_encoder": True},
    },
    "full": {
        "default": {"text_encoder": True},
        "custom diffusion": {
            "targets": [r"attn2?\.to_k", r"attn2?\.to_v"],
            "learning_rate_scale": {"to_v": 2.0},
        },
    },
}
# Those that start at the base itself draw no numbers.
UNDRAWN = ("oft", "boft", "full")
# What starts in the weight itself adds nothing but the rounding of two sums.
ROUNDED = ("pissa", "olora", "orthogonal")


@dataclass(frozen=True)
class Case:
    """A kind with its settings, on a family."""

    name: str
    kind: str
    settings: dict[str, Any]

    def attach(self, family: Family, seed: int = 0) -> Adapter:
        return attach(family, self.kind, self.settings, seed)

    @property
    def layouts(self) -> tuple[str, ...]:
        return adapters.get(self.kind).Settings(kind=self.kind, **self.settings).layouts()

    @property
    def rounding(self) -> float:
        """How far predictions may be apart that are the same but for what is rounded."""
        return 1e-5 if self.settings.get("init") in ROUNDED else 0.0


CASES = [
    pytest.param(Case(family, kind, settings), id=f"{family}-{kind}-{name}")
    for family in families.names()
    for kind in adapters.names()
    for name, settings in VARIANTS[kind].items()
]


def attach(family: Family, kind: str, settings: dict[str, Any], seed: int = 0) -> Adapter:
    chosen = adapters.get(kind)
    return chosen.attach(family, chosen.Settings(kind=kind, **settings), seed)


def teach(family: Family, adapter: Adapter, steps: int = 3) -> None:
    size = family.default_resolution
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    text = adapter.trains_text_encoder
    batch = Batch(
        latents=family.encode_image(pixels),
        conditioning={} if text else family.encode_prompt(PROMPTS),
        names=("one.png", "two.png"),
        captions=tuple(PROMPTS),
    )
    settings = Train(steps=steps, batch_size=2, learning_rate=0.01)
    encode = family.encode_prompt if text else None
    assert len(list(train(family, adapter, lambda *_: batch, settings, encode=encode))) == steps


@torch.no_grad()
def predict(family: Family) -> Tensor:
    size = family.default_resolution
    latents = family.encode_image(torch.zeros(2, 3, size, size))
    noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return family.predict(noisy, torch.tensor([100, 900]), family.encode_prompt(PROMPTS))


def snapshot(family: Family) -> dict[str, Any]:
    """Return everything that attaching could leave behind: types, flags, attributes, weights."""
    found: dict[str, Any] = {}
    for component, module in {"denoiser": family.denoiser, **family.text_encoders}.items():
        for name, child in module.named_modules():
            found[f"{component}/{name}"] = (type(child), child.training, sorted(vars(child)))
        for name, parameter in module.named_parameters():
            found[f"{component}:{name}"] = (parameter.requires_grad, parameter.detach().clone())
        for name, buffer in module.named_buffers():
            found[f"{component}:{name}"] = (False, buffer.clone())
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for name, value in before.items():
        if ":" in name:
            assert value[0] == after[name][0], name
            assert torch.equal(value[1], after[name][1]), name
        else:
            assert value == after[name], name


def test_every_kind_is_held_to_the_contract() -> None:
    assert set(VARIANTS) == set(adapters.names())
    for kind, settings in adapters.settings_types().items():
        assert settings.model_fields["kind"].default == kind
        assert adapters.get(kind).kind == kind


class Taught:
    """A case on a base of its own: what was so before it was attached, then, and once taught."""

    def __init__(self, case: Case, family: Family) -> None:
        self.family, self.base = family, predict(family)
        self.adapter = case.attach(family)
        self.attached, self.first = predict(family), self.adapter.state()
        components = [family.denoiser, *family.text_encoders.values(), family.vae]
        self.open = {id(p) for c in components for p in c.parameters() if p.requires_grad}
        teach(family, self.adapter)
        self.state, self.predicted = self.adapter.state(), predict(family)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Return each case in turn."""
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def taught_once(case: Case, load_tiny: Load) -> Taught:
    """Return the case, taught."""
    return Taught(case, load_tiny(case.name))


@pytest.fixture
def taught(taught_once: Taught) -> Iterator[Taught]:
    """Return the case as it was taught, whatever the test before did to it."""
    yield taught_once
    taught_once.adapter.set_scale(1)
    taught_once.adapter.load_state(taught_once.state)


class TestContract:
    def test_attached_it_changes_nothing_yet(self, case: Case, taught: Taught) -> None:
        torch.testing.assert_close(taught.attached, taught.base, atol=case.rounding, rtol=0)
        trained = taught.adapter.trained().values()
        own = {id(p) for p in trained}
        assert own == taught.open, "what trains is the adapter's, all of it and nothing else"
        assert all(p.dtype == torch.float32 for p in trained)
        assert taught.adapter.parameter_count() == sum(p.numel() for p in trained)

    def test_every_parameter_is_in_one_group(self, taught: Taught) -> None:
        adapter = taught.adapter
        groups = adapter.parameter_groups()
        grouped = [id(p) for group in groups for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in adapter.trained().values())
        assert groups[0].rate == "learning_rate"
        rates = {group.rate for group in groups}
        assert ("text_encoder_learning_rate" in rates) == adapter.trains_text_encoder

    def test_it_trains_and_every_tensor_moves(self, taught: Taught) -> None:
        first, state = taught.first, taught.state
        assert not torch.equal(taught.predicted, taught.attached)
        still = [name for name in state if torch.equal(state[name], first[name])]
        assert not still, "these never learned"
        assert all(tensor.isfinite().all() for tensor in state.values())

    def test_state_round_trip(self, case: Case, taught: Taught, load_tiny: Load) -> None:
        state = taught.adapter.state()
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in state.values())
        other = load_tiny(case.name)
        fresh = case.attach(other, seed=7)
        fresh.load_state(state)
        assert torch.equal(predict(other), taught.predicted)
        assert all(torch.equal(state[key], value) for key, value in fresh.state().items())
        next(iter(state.values())).zero_()
        shared = "a state shares no memory with what trains"
        assert torch.equal(predict(taught.family), taught.predicted), shared

    def test_a_state_that_does_not_fit_is_refused_whole(self, case: Case, taught: Taught) -> None:
        adapter, good = taught.adapter, taught.first
        first = sorted(good)[0]
        faults = {
            "has no ": {k: v for k, v in good.items() if k != first},
            "holds unknown x.y": good | {"x.y": torch.ones(1)},
            "has another shape of ": good | {first: torch.ones(1)},
        }
        for fault, state in faults.items():
            with pytest.raises(UserError, match=re.escape(fault)) as caught:
                adapter.load_state(state)
            assert "\n" not in str(caught.value)
        kept = adapter.state()
        assert all(torch.equal(kept[key], value) for key, value in taught.state.items())
        adapter.load_state(good)
        now = predict(taught.family)
        torch.testing.assert_close(now, taught.base, atol=case.rounding, rtol=0)

    def test_scale_0_is_the_base_and_1_is_what_was_taught(self, case: Case, taught: Taught) -> None:
        family, adapter, layout = taught.family, taught.adapter, case.layouts[0]
        exported = adapter.export_state(layout)[0]
        adapter.set_scale(0)
        torch.testing.assert_close(predict(family), taught.base, atol=1e-6, rtol=0)
        adapter.set_scale(0.5)
        assert not torch.equal(predict(family), taught.predicted)
        scaled = adapter.export_state(layout)[0]
        assert all(torch.equal(exported[key], value) for key, value in scaled.items())
        state = adapter.state()
        assert all(torch.equal(state[key], value) for key, value in taught.state.items())
        adapter.set_scale(1)
        assert torch.equal(predict(family), taught.predicted)

    def test_detached_the_base_is_bit_for_bit_what_it_was(
        self, case: Case, load_tiny: Load
    ) -> None:
        family = load_tiny(case.name)
        predicted = predict(family)  # transformers notes at first use what it hands out
        before = snapshot(family)
        for seed in range(2):  # and another one can be attached
            adapter = case.attach(family, seed)
            teach(family, adapter, steps=1)
            adapter.detach()
            assert_same(before, snapshot(family))
            assert torch.equal(predict(family), predicted)

    def test_what_is_drawn_in_training_is_drawn_without_dropout(self, taught: Taught) -> None:
        assert torch.equal(predict(taught.family), predict(taught.family))

    def test_first_values_come_from_the_seed_and_the_name_alone(
        self, case: Case, load_tiny: Load
    ) -> None:
        family = load_tiny(case.name)

        def first(seed: int) -> dict[str, Tensor]:
            adapter = case.attach(family, seed)
            state = adapter.state()
            adapter.detach()
            return state

        torch.manual_seed(1)
        one = first(4)
        follow = torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3), follow), "the global stream was used"
        torch.manual_seed(2)
        again, other = first(4), first(5)
        assert one.keys() == again.keys()
        assert all(torch.equal(one[key], again[key]) for key in one)
        drawn = any(not torch.equal(one[key], other[key]) for key in one)
        undrawn = case.kind in UNDRAWN or case.settings.get("init") in ("pissa", "olora")
        assert drawn != undrawn, "those come from the weight"

    def test_its_files_do_in_a_fresh_base_what_was_taught(
        self, case: Case, taught: Taught, load_tiny: Load, tmp_path: Path
    ) -> None:
        family, adapter = taught.family, taught.adapter
        untouched = load_tiny(case.name)
        wanted = {name: change(untouched) for name, change in adapter.changes().items()}
        for layout in case.layouts:
            path = tmp_path / f"{layout}.safetensors"
            checkpoint.write_safetensors(path, *adapter.export_state(layout))
            other = load_tiny(case.name)
            loaded = load_file(other, path, "file")
            assert loaded.changes.keys() == wanted.keys()
            for module, change in loaded.changes.items():
                torch.testing.assert_close(change(), wanted[module], atol=2e-6, rtol=1e-4)
            found = predict(other)
            torch.testing.assert_close(found, taught.predicted, atol=1e-5, rtol=0)
            assert (found - taught.base).abs().max() > 1e-3
            adapter.set_scale(0.5)
            loaded.set_scale(0.5)
            torch.testing.assert_close(predict(other), predict(family), atol=1e-5, rtol=0)
            adapter.set_scale(1)
            loaded.set_scale(0)
            torch.testing.assert_close(predict(other), taught.base, atol=1e-6, rtol=0)

    def test_plain_diffusers_takes_up_every_tensor(
        self,
        case: Case,
        taught: Taught,
        load_tiny: Load,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        tensors, metadata = taught.adapter.export_state(case.layouts[0])
        assert "lora_adapter_metadata" not in metadata, "alpha stands in the tensors alone"
        assert all(t.dtype == torch.float32 for t in tensors.values())
        path = tmp_path / "adapter.safetensors"
        checkpoint.write_safetensors(path, tensors, metadata)
        if not read_by_diffusers(tensors):
            assert case.layouts == ("kohya",)
            return
        other = load_tiny(case.name)
        capfd.readouterr()
        other.pipeline().load_lora_weights(path)
        # diffusers remarks on a component without LoRA, and calls that safe to ignore
        lines = capfd.readouterr().err.splitlines()
        said = "\n".join(line for line in lines if "safe to ignore" not in line)
        assert "unexpected" not in said.lower()
        assert "missing" not in said.lower()
        loaded = sum(
            p.numel()
            for c in (other.denoiser, *other.text_encoders.values())
            for n, p in c.named_parameters()
            if "lora" in n
        )
        assert loaded == sum(t.numel() for t in tensors.values()), "every tensor is taken up"

    def test_an_unknown_layout_is_refused(self, case: Case, taught: Taught) -> None:
        for layout in ("betamax", *(set(LAYOUTS) - set(case.layouts))):
            with pytest.raises(UserError, match=r"export\.layouts"):
                taught.adapter.export_state(layout)

    def test_a_half_precision_base_is_taught_in_fp32(self, case: Case, load_tiny: Load) -> None:
        family = load_tiny(case.name, dtype="bf16")
        if case.kind == "full":
            with pytest.raises(UserError, match=r"base\.dtype: .* set base\.dtype: fp32"):
                case.attach(family)
            return
        before = predict(family)
        adapter = case.attach(family)
        teach(family, adapter)
        assert all(p.dtype == torch.float32 for p in adapter.trained().values())
        assert not torch.equal(predict(family), before)


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
