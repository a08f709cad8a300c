"""What every adapter kind promises on every family, on tiny models of the real classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import assert_same, attach, predict, snapshot, teach
from torch import Tensor

from tunekit import adapters, checkpoint, families
from tunekit.adapters.base import Adapter, WeightsAdapter
from tunekit.errors import UserError
from tunekit.families.base import Family
from tunekit.loading import load_file, read_by_diffusers
from tunekit.schema import LAYOUTS

Load = Callable[..., Family]

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


def test_every_kind_is_held_to_the_contract() -> None:
    assert set(VARIANTS) == set(adapters.names())
    for kind, settings in adapters.settings_types().items():
        assert settings.model_fields["kind"].default == kind
        assert adapters.get(kind).kind == kind
        assert issubclass(adapters.get(kind), WeightsAdapter) == settings.trains_weights


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
        if "lora_adapter_metadata" in metadata:  # it says what the tensors do, and no other alpha
            said = json.loads(metadata["lora_adapter_metadata"])
            for component in {key.partition(".")[0] for key in said}:
                assert said[f"{component}.lora_alpha"] == said[f"{component}.r"]
                assert said[f"{component}.alpha_pattern"] == said[f"{component}.rank_pattern"]
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


def test_a_rank_of_its_own_is_that_of_no_name_which_ends_alike(
    load_tiny: Load, tmp_path: Path
) -> None:
    """FLUX's last layer is called proj_out, and so is one of each of its blocks."""
    lora, family = adapters.get("lora"), load_tiny("flux")
    chosen = {"rank": 4, "targets": ["proj_out"], "rank_pattern": {r"denoiser\.proj_out": 2}}
    adapter = lora.attach(family, lora.Settings(kind="lora", **chosen), 0)
    with torch.no_grad():
        for parameter in adapter.trained().values():
            parameter.fill_(0.1)
    tensors, metadata = adapter.export_state("diffusers")
    path = tmp_path / "adapter.safetensors"
    checkpoint.write_safetensors(path, tensors, metadata)
    ranks = {key: len(tensor) for key, tensor in tensors.items() if "lora_A" in key}
    assert set(ranks.values()) == {2, 4}
    load_file(load_tiny("flux"), path, "own")
