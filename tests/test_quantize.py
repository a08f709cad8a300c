"""A base in few bits: smaller by what is said, trained on, and exported as if on the full one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import tunekit
from tunekit import adapters, families, identity, packed, quantize, verification
from tunekit.checkpoint import write_safetensors
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.evaluation.measure import picture_name
from tunekit.families.base import Family
from tunekit.generate import Request, generate
from tunekit.progress import Silent, Ticker
from tunekit.recipe import RecipeError, recipe_from
from tunekit.schema import Base, Quantized, Train
from tunekit.train import train

Tree = dict[str, dict[str, Any]]
KINDS: tuple[str, ...] = get_args(Quantized)
# How far a weight moves, as a share of itself: normal numbers in so many steps.
MOVED = {"nf4": 0.11, "int8": 0.015, "int8_torchao": 0.015, "fp8_torchao": 0.035}


@pytest.fixture
def load(tiny_folder: Callable[..., Path]) -> Callable[..., Family]:
    """Return a function that loads the tiny base, quantised as told."""

    def load(kind: str | None = None, dtype: str = "fp32") -> Family:
        base = {"model": str(tiny_folder()), "quantize": kind, "dtype": dtype}
        return families.load(Base.model_validate(base))

    return load


def answer(family: Family) -> Tensor:
    """Return the family's prediction for one question."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        conditioning = family.encode_prompt(["a red robot", "a blue cat"])
        return family.predict(noisy, torch.tensor([100, 700]), conditioning).float()


def linear(out: int, into: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(into, out, bias=bias).requires_grad_(False)


def narrow(layer: nn.Linear, kind: str) -> Any:
    model = nn.Sequential(layer)
    quantize.quantize(model, kind)
    return model[0]


class TestStorage:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_base_is_smaller_by_what_is_reckoned(
        self, load: Callable[..., Family], kind: str, dtype: str
    ) -> None:
        full, small = load(None, dtype), load(kind, dtype)
        held = quantize.held(small.denoiser)
        assert len(held) >= 3
        saved = 0
        for name, (layer, stored) in held.items():
            weight: Any = full.denoiser.get_submodule(name).weight
            assert stored == kind
            shape = (layer.out_features, layer.in_features)
            assert shape == weight.shape
            saved += weight.numel() * full.dtype.itemsize - quantize.bytes_of(shape, kind)
        before, after = (quantize.bytes_held(f.denoiser) for f in (full, small))
        assert before == sum(p.numel() * p.element_size() for p in full.denoiser.parameters())
        assert before - after == saved > 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_does_not_pay_stays_bit_for_bit(
        self, load: Callable[..., Family], kind: str
    ) -> None:
        full, small = load(), load(kind)
        names = dict(small.denoiser.named_modules())
        for name, module in full.denoiser.named_modules():
            pays = isinstance(module, nn.Linear) and quantize.pays(module.weight.shape, kind)
            assert (name in quantize.held(small.denoiser)) == pays
            if not pays:
                for key, value in module.named_parameters(recurse=False):
                    assert torch.equal(getattr(names[name], key), value)

    @pytest.mark.parametrize("width", [32, 64, 160, 192])
    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_stay_near_whatever_the_width(self, kind: str, width: int) -> None:
        """Blocks of 64 that reach into the next row would come back wrong by half the weight."""
        layer = linear(256, width)
        weight = layer.weight.clone()
        from tunekit.changes.layers import weight_of

        found = weight_of(narrow(layer, kind)).float()
        assert float((found - weight).norm() / weight.norm()) < MOVED[kind]

    def test_widths_that_no_block_divides_stay(self) -> None:
        assert not quantize.pays((512, 48), "nf4")
        assert type(narrow(linear(512, 48), "nf4")) is nn.Linear
        assert quantize.pays((512, 48), "int8")

    def test_text_encoder_and_vae_are_not_touched(self, load: Callable[..., Family]) -> None:
        full, small = load(), load("nf4")
        assert identity.of_words(full) == identity.of_words(small)
        assert identity.of_pictures(full) == identity.of_pictures(small)

    @pytest.mark.parametrize("kind", KINDS)
    def test_drawn_pictures_of_the_class_are_cached_apart(
        self, load: Callable[..., Family], kind: str
    ) -> None:
        found = {identity.of_drawing(load(k)) for k in (None, kind)}
        assert len(found) == 2
        assert identity.of_drawing(load(kind)) in found


class TestProduct:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_product_and_gradient_are_those_of_the_unpacked_weight(
        self, kind: str, bias: bool
    ) -> None:
        """Also after drawing, when bitsandbytes' own layers have repacked what gradients need."""
        layer = narrow(linear(128, 64, bias=bias), kind).eval()
        x = torch.randn(2, 5, 64)
        with torch.no_grad():
            drawn = layer(x)
        x.requires_grad_(True)
        trained = layer(x)
        assert torch.equal(trained, drawn)
        trained.square().sum().backward()
        again = x.detach().clone().requires_grad_(True)
        plain = nn.functional.linear(again, layer.whole(), layer.bias)
        plain.square().sum().backward()
        torch.testing.assert_close(trained, plain)
        torch.testing.assert_close(x.grad, again.grad)

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_nothing_is_kept_for_the_backward_pass(self, kind: str) -> None:
        layer, kept = narrow(linear(128, 64), kind), []
        x = torch.randn(3, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            layer(x)
        assert not kept

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_autocast_is_followed(self, kind: str) -> None:
        layer = narrow(linear(128, 64), kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.randn(3, 64)).dtype == torch.bfloat16

    def test_nf4_is_what_the_paper_says(self) -> None:
        """16 values, the nearest of which stands for each weight as a share of its block's most."""
        layer = linear(64, 64)
        weight = layer.weight.clone()
        made = narrow(layer, "nf4")
        assert isinstance(made, packed.Nf4)
        blocks = weight.reshape(-1, 64)
        most = blocks.abs().amax(1, keepdim=True)
        code = made.weight.quant_state.code
        near = code[((blocks / most).unsqueeze(-1) - code).abs().argmin(-1)] * most
        torch.testing.assert_close(made.whole(), near.reshape(64, 64))


def attach(family: Family, kind: str, **more: Any) -> adapters.Adapter:
    made = adapters.get(kind)
    return made.attach(family, made.Settings(kind=kind, targets="full", **more), 0)


def batch(family: Family) -> Batch:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        conditioning = family.encode_prompt(["a zorp robot", "a red robot"])
    return Batch(latents, conditioning, ("a", "b"), ("a zorp robot", "a red robot"))


def variants() -> Iterator[Any]:
    special = [{"dora": True}, {"init": "pissa"}, {"init": "olora"}, {"init": "orthogonal"}]
    for kind in KINDS:
        for name in adapters.names():
            if adapters.get(name).Settings(kind=name).quantize_fault(kind) is None:
                yield pytest.param(kind, name, {}, id=f"{kind}-{name}")
        for more in special:
            yield pytest.param(kind, "lora", more, id=f"{kind}-{'-'.join(map(str, more.values()))}")


class TestAdapters:
    @pytest.fixture(autouse=True)
    def _more_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Quantise attention too, which is small in the tiny base."""
        monkeypatch.setattr(quantize, "LEAST", 1024)

    @pytest.mark.parametrize(("kind", "name", "more"), list(variants()))
    def test_what_was_learned_comes_back_from_the_file(
        self,
        load: Callable[..., Family],
        tmp_path: Path,
        kind: str,
        name: str,
        more: dict[str, Any],
    ) -> None:
        family = load(kind)
        before = answer(family)
        adapter = attach(family, name, **({"rank": 4, **more} if more else more))
        rate = 1e-3 if "block_size" in type(adapter).Settings.model_fields else 1e-2
        pictures = batch(family)
        settings = Train(steps=2, batch_size=2, learning_rate=rate)
        list(train(family, adapter, lambda step, micro: pictures, settings))
        layout = adapter.Settings(kind=name, **more).layouts()[0]
        path = tmp_path / "adapter.safetensors"
        write_safetensors(path, *adapter.export_state(layout))
        fresh = load(kind)
        probe = verification.make_probe(fresh, ["a red robot"], 0)
        trained = verification.measure(family, adapter, probe)
        parity = verification.compare([path], fresh, trained, "fp32", "fp32")
        assert parity.change > 1e-3
        adapter.detach()
        assert torch.equal(answer(family), before)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_loss_is_nearly_that_on_the_full_base(
        self, load: Callable[..., Family], kind: str
    ) -> None:
        curves = []
        for quantised in (None, kind):
            family = load(quantised)
            adapter, pictures = attach(family, "lora", rank=4), batch(family)
            settings = Train(steps=6, batch_size=2, learning_rate=1e-2)
            records = train(family, adapter, lambda s, m, b=pictures: b, settings)
            curves.append([record.loss for record in records])
        assert curves[0] != curves[1]
        assert curves[1] == pytest.approx(curves[0], rel=0.05)


class TestRecipe:
    def faults(self, tree: Tree) -> list[str]:
        with pytest.raises(RecipeError) as error:
            recipe_from(tree)
        return str(error.value).splitlines()

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_that_learn_themselves_are_refused(
        self, tree: Callable[..., Tree], kind: str
    ) -> None:
        made = tree(base={"quantize": kind}) | {"adapter": {"kind": "full"}}
        (line,) = self.faults(made)
        assert line.startswith(f"recipe: base.quantize: {kind} leaves the weights too few digits")

    @pytest.mark.parametrize("name", ["loha", "lokr"])
    def test_kinds_that_peft_computes_beside_a_shape_take_8_bits(
        self, tree: Callable[..., Tree], name: str
    ) -> None:
        (line,) = self.faults(tree(base={"quantize": "nf4"}, adapter={"kind": name}))
        assert line.startswith("recipe: base.quantize: ")
        assert recipe_from(tree(base={"quantize": "int8"}, adapter={"kind": name}))

    def test_a_near_miss_is_named(self, tree: Callable[..., Tree]) -> None:
        (line,) = self.faults(tree(base={"quantize": "nf8"}))
        assert 'did you mean "nf4"' in line

    @pytest.mark.parametrize(
        ("kind", "package"), [("nf4", "bitsandbytes"), ("int8_torchao", "torchao")]
    )
    def test_a_missing_package_is_named_with_its_extra(
        self,
        tree: Callable[..., Tree],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        package: str,
    ) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: None if name == package else real(name, *a),
        )
        with pytest.raises(UserError) as error:
            tunekit.train(tree(base={"quantize": kind}), out=tmp_path / "run", reporter=Silent())
        assert str(error.value) == (
            f"base.quantize: {kind} needs the package {package}: pip install 'tunekit[quantize]'"
        )
        assert not (tmp_path / "run").exists()


class Killed(BaseException):
    """What no code of ours catches: the run ends where it stands."""


class KillAt(Silent):
    """Ends the run at a tick of its training."""

    def __init__(self, tick: int) -> None:
        self.left = tick

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        def tick(told: str = "") -> None:
            self.left -= name == "training"
            if self.left == 0:
                raise Killed

        yield tick


@pytest.fixture(scope="module")
def recipe(tree: Callable[..., Tree]) -> Tree:
    return tree(
        base={"quantize": "nf4"},
        train={"checkpoint_every": 2},
        adapter={"kind": "lora", "rank": 2, "dropout": 0.2},
    )


@pytest.fixture(scope="module")
def run(recipe: Tree, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a finished run on a base of 4 bits. Tests may not write in its folder."""
    out = tmp_path_factory.mktemp("nf4") / "run"
    return tunekit.train(recipe, out=out, reporter=Silent())


class TestRun:
    def test_the_export_is_verified_and_the_report_tells_what_was_saved(self, run: Any) -> None:
        assert len(run.files) == 2
        assert "layers of the denoiser are held as nf4" in run.report.read_text()
        assert "quantize: nf4" in (run.folder / "recipe.yaml").read_text()

    def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(
        self, run: Any, recipe: Tree, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        with pytest.raises(Killed):
            tunekit.train(recipe, out=out, reporter=KillAt(3))
        again = tunekit.train(recipe, out=out, reporter=Silent(), resume=True)
        for one, other in zip(run.files, again.files, strict=True):
            first, second = load_file(one.path), load_file(other.path)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
        lines = [
            [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (run.folder, out)
        ]
        assert lines[0] == lines[1]

    def test_a_sample_is_drawn_again_to_the_pixel_on_the_same_few_bits(
        self, run: Any, tmp_path: Path
    ) -> None:
        prompt = "a zorp robot, red"
        asked = Request(
            run=run.folder,
            checkpoint="step-000004",
            quantize="nf4",
            prompts=(prompt,),
            seed=1,
            count=1,
        )
        made = generate(asked, tmp_path / "out").pictures[0]
        sample = run.folder / "samples" / picture_name("step-000004", prompt, 1)
        assert Image.open(made).tobytes() == Image.open(sample).tobytes()
        full = generate(replace(asked, quantize=None), tmp_path / "full").pictures[0]
        assert Image.open(made).tobytes() != Image.open(full).tobytes()
        with pytest.raises(UserError, match='not "nf8"'):
            generate(replace(asked, quantize="nf8"), tmp_path / "none")

    def test_pictures_are_drawn_on_the_full_base(self, run: Any, tmp_path: Path) -> None:
        painter = tunekit.load(run.folder)
        assert not quantize.held(painter.family.denoiser)
        of_file = tunekit.load(adapters=run.files[0].path, base=run.recipe.base.model)
        assert not quantize.held(of_file.family.denoiser)
        made = generate(Request(run=run.folder, count=1, steps=1), tmp_path / "out")
        assert made.grid.exists()
