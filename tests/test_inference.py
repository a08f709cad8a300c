"""Pictures depend on prompt, seed and settings, and not on who draws them, with what, or when."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from taught import recipe_for, teach

import tunekit
from tunekit import adapters, checkpoint, export
from tunekit.adapters import Adapter
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.families.base import PromptCutWarning
from tunekit.inference import DrawSettings, Painter, load
from tunekit.recipe import Recipe, dump_yaml
from tunekit.schedulers import SCHEDULERS, STOCHASTIC
from tunekit.schema import Base, Train
from tunekit.train import train

PROMPT = "a zorp robot"
SAID = "a <blip> robot"  # a new word
QUICK = DrawSettings(steps=2)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def recipe(tiny_folder: Callable[..., Path]) -> Recipe:
    settings = {"targets": "attention+mlp", "text_encoder": True, "dropout": 0.3}
    return recipe_for(tiny_folder(), adapter=settings)


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported adapter file."""
    return export.export_adapter(*teach(recipe), recipe, tmp_path_factory.mktemp("e"))[0].path


@pytest.fixture(scope="module")
def base(recipe: Recipe) -> Painter:
    return load(recipe.base, device="cpu")


@pytest.fixture(scope="module")
def painter(recipe: Recipe, file: Path) -> Painter:
    return load(recipe.base, [file], "cpu")


def steps_of_training(family: Family, adapter: Adapter, precision: Any = "fp32") -> Any:
    """Return the real loop over two pictures, three steps."""
    random = torch.Generator().manual_seed(3)
    size = family.default_resolution
    latents = family.encode_image(torch.rand(2, 3, size, size, generator=random) * 2 - 1)
    batch = Batch(latents, {}, ("one.png", "two.png"), (PROMPT, "a red robot"))
    settings = Train(steps=3, batch_size=2, learning_rate=0.01, precision=precision)
    return train(family, adapter, lambda *_: batch, settings, encode=family.encode_prompt)


class TestDrawingWhileTraining:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_sample_equals_what_its_checkpoint_draws_later(
        self, recipe: Recipe, precision: str, tmp_path: Path
    ) -> None:
        """Dropout, autocast, gradients and the text encoder are all at work in the training."""
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        family, adapter = teach(recipe)
        samples = {}
        for record in steps_of_training(family, adapter, precision):
            if record.step == 2:
                adapter.train()  # the hardest case: even in the midst of a step
            samples[record.step] = Painter.of(family, adapter).draw(PROMPT, 3, QUICK)
            folder = tmp_path / "checkpoints" / f"step-{record.step:06d}"
            checkpoint.save(folder, {"adapter": adapter.state()}, {"step": record.step})
        assert not same(samples[1], samples[3])
        for step, sample in samples.items():
            folder = tmp_path / "checkpoints" / f"step-{step:06d}"
            again = tunekit.load(recipe.base.model, [folder], device="cpu")
            assert same(again.draw(PROMPT, 3, QUICK), sample), step
        named_by_its_file = tunekit.load(
            recipe.base.model, [folder / "adapter.safetensors"], device="cpu"
        )
        assert same(named_by_its_file.draw(PROMPT, 3, QUICK), samples[3])

    def test_drawing_changes_nothing_of_the_training(self, recipe: Recipe) -> None:
        states = []
        for draws in (False, True):
            family, adapter = teach(recipe)
            for _ in steps_of_training(family, adapter):
                if draws:
                    before = torch.get_rng_state()
                    painter = Painter.of(family, adapter)
                    painter.draw(PROMPT, 3, DrawSettings(steps=2, scale=0.5, scheduler="euler_a"))
                    assert torch.equal(torch.get_rng_state(), before)
            states.append(adapter.state())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class TestOnePicture:
    def test_it_never_depends_on_the_others(self, painter: Painter) -> None:
        drawn = list(painter.draw_many([PROMPT, "a blue cat"], [1, 2], QUICK))
        assert [(d.prompt, d.seed, d.number, d.total) for d in drawn] == [
            (PROMPT, 1, 1, 4),
            (PROMPT, 2, 2, 4),
            ("a blue cat", 1, 3, 4),
            ("a blue cat", 2, 4, 4),
        ]
        assert len({d.image.tobytes() for d in drawn}) == 4
        for one in reversed(drawn):
            assert same(painter.draw(one.prompt, one.seed, QUICK), one.image)

    def test_the_adapter_is_at_work(self, painter: Painter, base: Painter) -> None:
        assert not same(painter.draw(PROMPT, 1, QUICK), base.draw(PROMPT, 1, QUICK))

    def test_every_setting_matters(self, painter: Painter) -> None:
        settings: list[dict[str, Any]] = [
            {},
            {"steps": 3},
            {"guidance_scale": 9.0},
            {"guidance_scale": 1.0},
            {"negative_prompt": "blue"},
            {"scheduler": "euler_a"},
            {"width": 40},
            {"height": 40},
            {"scale": 0.5},
        ]
        drawn = [painter.draw(PROMPT, 1, DrawSettings(**({"steps": 2} | s))) for s in settings]
        assert len({(image.size, image.tobytes()) for image in drawn}) == len(settings)
        assert drawn[6].size == (40, 32)
        assert drawn[7].size == (32, 40)

    @pytest.mark.parametrize("name", list(SCHEDULERS))
    def test_every_scheduler_draws(self, name: str, base: Painter) -> None:
        settings = DrawSettings(steps=3, scheduler=name)
        image = base.draw(PROMPT, 1, settings)
        assert same(base.draw(PROMPT, 1, settings), image)

    def test_karras_sigmas_are_others(self, base: Painter) -> None:
        plain = base.draw(PROMPT, 1, DrawSettings(steps=4, scheduler="dpm++_2m"))
        karras = base.draw(PROMPT, 1, DrawSettings(steps=4, scheduler="dpm++_2m_karras"))
        assert not same(plain, karras)

    @pytest.mark.parametrize("name", list(SCHEDULERS))
    def test_from_pure_noise_a_scheduler_draws_or_says_that_it_cannot(
        self, name: str, tiny_folder: Callable[..., Path]
    ) -> None:
        """As the bundled base: there Heun's method and Karras sigmas break down in silence."""
        noisy = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
        base = load(str(tiny_folder(prediction_type="v_prediction", **noisy)), device="cpu")
        settings = DrawSettings(steps=12, scheduler=name)
        if name == "heun" or name.endswith("_karras"):
            with pytest.raises(UserError, match=f"{re.escape(name)} cannot draw with this base"):
                base.draw(PROMPT, 1, settings)
        else:
            plain = base.draw(PROMPT, 1, DrawSettings(steps=12))
            drawn = base.draw(PROMPT, 1, settings)
            if name not in STOCHASTIC:
                far = ImageStat.Stat(ImageChops.difference(plain, drawn)).mean
                assert max(far) < 16, far

    def test_its_settings_come_along(self, painter: Painter, file: Path, recipe: Recipe) -> None:
        drawn = next(painter.draw_many([PROMPT], [5], QUICK))
        assert drawn.settings == {
            "prompt": PROMPT,
            "negative_prompt": "",
            "seed": 5,
            "steps": 2,
            "guidance_scale": 5.0,
            "scheduler": "DDIMScheduler",
            "width": 32,
            "height": 32,
            "scale": 1.0,
            "base": Path(recipe.base.model).name,
            "adapters": [{"name": file.name, "weight": 1.0, "sha256": export.sha256(file)}],
            "version": tunekit.__version__,
        }

    def test_words_that_are_cut_off_are_named(self, base: Painter) -> None:
        long = " ".join(["robot"] * 40) + " purple"
        with pytest.warns(PromptCutWarning, match="purple"):
            base.draw(long, 1, QUICK)


class TestStrength:
    def test_zero_is_the_untouched_base(self, painter: Painter, base: Painter) -> None:
        settings = DrawSettings(steps=2, scale=0)
        assert same(painter.draw(PROMPT, 1, settings), base.draw(PROMPT, 1, QUICK))

    def test_one_is_back_afterwards(self, painter: Painter) -> None:
        before = painter.draw(PROMPT, 1, QUICK)
        painter.draw(PROMPT, 1, DrawSettings(steps=2, scale=3))
        assert same(painter.draw(PROMPT, 1, QUICK), before)

    def test_a_weight_is_a_scale(self, recipe: Recipe, file: Path, painter: Painter) -> None:
        half = load(recipe.base, [(file, 0.5)], "cpu").draw(PROMPT, 1, QUICK)
        assert same(half, painter.draw(PROMPT, 1, DrawSettings(steps=2, scale=0.5)))

    def test_two_files_add_up(self, recipe: Recipe, file: Path, painter: Painter) -> None:
        """A second file must leave the first one's tensors, in the text encoder too, alone."""
        silent = load(recipe.base, [file, (file, 0.0)], "cpu").draw(PROMPT, 1, QUICK)
        assert same(silent, painter.draw(PROMPT, 1, QUICK))
        halves = load(recipe.base, [(file, 1.0), (file, 0.5)], "cpu").draw(PROMPT, 1, QUICK)
        more = painter.draw(PROMPT, 1, DrawSettings(steps=2, scale=1.5))
        assert max(abs(a - b) for a, b in zip(halves.tobytes(), more.tobytes(), strict=True)) <= 1

    def test_a_checkpoint_and_a_file_add_up(
        self, recipe: Recipe, file: Path, painter: Painter, tmp_path: Path
    ) -> None:
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        saved = tmp_path / "checkpoints" / "step-000001"
        checkpoint.save(saved, {"adapter": teach(recipe)[1].state()}, {})
        both = load(recipe.base, [(file, 0.5), (saved, 0.5)], "cpu").draw(PROMPT, 1, QUICK)
        once = painter.draw(PROMPT, 1, QUICK)
        assert max(abs(a - b) for a, b in zip(both.tobytes(), once.tobytes(), strict=True)) <= 1
        with pytest.raises(UserError, match="only one checkpoint"):
            load(recipe.base, [saved, saved], "cpu")


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"steps": 0}, "steps: 0"),
            ({"guidance_scale": -1.0}, "guidance_scale: -1"),
            ({"scale": float("nan")}, "scale: nan"),
            ({"negative_prompt": "blue", "guidance_scale": 1.0}, "negative_prompt: does nothing"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            DrawSettings(**settings)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"width": 30}, "width: 30 is not a multiple of 8.*the nearest is 32"),
            ({"height": 0}, "height: 0 is not a multiple"),
            ({"scheduler": "eulr"}, 'did you mean "euler"'),
            ({"scale": 0.5}, "no adapter is loaded"),
            ({"scheduler": "PNDMScheduler"}, "PNDMScheduler cannot draw in 2 steps"),
        ],
    )
    def test_what_this_base_cannot(
        self, settings: dict[str, Any], said: str, base: Painter
    ) -> None:
        with pytest.raises(UserError, match=said):
            base.draw(PROMPT, 1, DrawSettings(**({"steps": 2} | settings)))

    def test_a_seed_that_is_none(self, base: Painter) -> None:
        with pytest.raises(UserError, match="seed: -1"):
            base.draw(PROMPT, -1, QUICK)

    def test_nan_is_no_black_picture(self, recipe: Recipe) -> None:
        family, adapter = teach(recipe)
        with torch.no_grad():
            next(iter(adapter.trained().values())).fill_(float("nan"))
        with pytest.raises(UserError, match="NaN"):
            Painter.of(family, adapter).draw(PROMPT, 1, QUICK)

    def test_a_file_that_is_not_there(self, recipe: Recipe, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            load(recipe.base, [tmp_path / "none.safetensors"], "cpu")
        with pytest.raises(UserError, match="is no run folder"):
            load(recipe.base, [tmp_path], "cpu")

    def test_a_pickle_is_never_opened(self, recipe: Recipe, tmp_path: Path) -> None:
        canary = tmp_path / "canary"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (canary,))

        for name in ("bomb.bin", "bomb.safetensors"):
            torch.save({"unet.x.lora_A.weight": Bomb()}, tmp_path / name)
            with pytest.raises(UserError, match="pickle"):
                load(recipe.base, [tmp_path / name], "cpu")
        assert not canary.exists()

    def test_an_adapter_for_another_base(
        self, file: Path, tiny_folder: Callable[..., Path], tmp_path: Path, recipe: Recipe
    ) -> None:
        write_safetensors(
            tmp_path / "other.safetensors",
            {
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (
                    torch.ones(4, 320)
                ),
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": (
                    torch.ones(320, 4)
                ),
            },
        )
        with pytest.raises(UserError, match=r"other\.safetensors: diffusers cannot load it"):
            load(recipe.base, [tmp_path / "other.safetensors"], "cpu")
        write_safetensors(tmp_path / "stray.safetensors", {"x.lora_A.weight": torch.ones(4, 4)})
        with pytest.raises(UserError, match=r"of 1 tensors .* diffusers took 0"):
            load(recipe.base, [tmp_path / "stray.safetensors"], "cpu")

    def test_a_checkpoint_out_of_its_run(self, recipe: Recipe, tmp_path: Path) -> None:
        saved = checkpoint.save(tmp_path / "a" / "b", {"adapter": {"x": torch.ones(1)}}, {})
        with pytest.raises(UserError, match="stands in no run folder"):
            load(recipe.base, [saved], "cpu")

    def test_a_damaged_checkpoint(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        saved = tmp_path / "checkpoints" / "step-000001"
        checkpoint.save(saved, {"adapter": teach(recipe)[1].state()}, {})
        data = bytearray((saved / "adapter.safetensors").read_bytes())
        data[-1] ^= 1
        (saved / "adapter.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="content has changed"):
            load(recipe.base, [saved], "cpu")


def test_a_base_in_half_precision_draws(recipe: Recipe, file: Path) -> None:
    half = Base(model=recipe.base.model, dtype="bf16")
    image = load(half, [file], "cpu").draw(PROMPT, 1, QUICK)
    assert image.size == (32, 32)


class TestApart:
    """Denoiser and text encoders at strengths of their own."""

    def test_each_part_has_its_own(self, recipe: Recipe, file: Path, tmp_path: Path) -> None:
        tensors, metadata = read_safetensors(file)
        halves = {}
        for part in ("unet", "text_encoder"):
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
            halves[part] = tmp_path / f"{part}.safetensors"
            write_safetensors(halves[part], own, {"tunekit.base": metadata["tunekit.base"]})
        for (whole, text), part in {(1.0, 0.0): "unet", (0.0, 1.0): "text_encoder"}.items():
            alone = load(recipe.base, [halves[part]], "cpu").draw(PROMPT, 1, QUICK)
            weighted = load(recipe.base, [(file, (whole, text))], "cpu")
            assert same(weighted.draw(PROMPT, 1, QUICK), alone), part
            both = load(recipe.base, [file], "cpu")
            asked = DrawSettings(steps=2, scale=whole, text_scale=text)
            assert same(both.draw(PROMPT, 1, asked), alone), part
            stored = next(both.draw_many([PROMPT], [1], asked)).settings
            assert (stored["scale"], stored["text_scale"]) == (whole, text)
        assert not same(alone, both.draw(PROMPT, 1, QUICK))

    def test_strengths_multiply(self, recipe: Recipe, file: Path) -> None:
        once = load(recipe.base, [(file, (0.5, 0.25))], "cpu")
        asked = DrawSettings(steps=2, scale=0.5, text_scale=0.25)
        whole = load(recipe.base, [file], "cpu").draw(PROMPT, 1, asked)
        assert same(once.draw(PROMPT, 1, QUICK), whole)

    def test_a_checkpoint_has_one(self, recipe: Recipe, tmp_path: Path, base: Painter) -> None:
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        saved = tmp_path / "checkpoints" / "step-000001"
        checkpoint.save(saved, {"adapter": teach(recipe)[1].state()}, {})
        painter = load(recipe.base, [saved], "cpu")
        with pytest.raises(UserError, match="a checkpoint has one strength"):
            painter.draw(PROMPT, 1, DrawSettings(steps=2, text_scale=0.5))
        family, adapter = teach(recipe)
        with pytest.raises(UserError, match="in training is drawn at one strength"):
            Painter.of(family, adapter).draw(PROMPT, 1, DrawSettings(steps=2, text_scale=0.5))
        with pytest.raises(UserError, match=r"text_scale: 0\.5 scales nothing"):
            base.draw(PROMPT, 1, DrawSettings(steps=2, text_scale=0.5))


@pytest.fixture(scope="module")
def several(recipe: Recipe, file: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """Return what may be loaded: of diffusers' reading and of ours, words, a checkpoint."""
    folder = tmp_path_factory.mktemp("several")
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) / 10
    write_safetensors(folder / "words.safetensors", {"<blip>": rows})
    found: dict[str, Any] = {"lora": [file], "words": [folder / "words.safetensors"]}
    loha, full = (
        recipe.model_copy(update={"adapter": adapters.get(kind).Settings(kind=kind)})
        for kind in ("loha", "full")
    )
    found["loha"] = [export.export_adapter(*teach(loha), loha, folder / "loha")[0].path]
    (folder / "recipe.yaml").write_text(dump_yaml(full))
    found["checkpoint"] = [folder / "checkpoints" / "step-000001"]
    checkpoint.save(found["checkpoint"][0], {"adapter": teach(full)[1].state()}, {})
    found["all"] = [found["lora"][0], (found["loha"][0], 0.5), *found["words"]]
    found["none"] = []
    return found


class TestSwap:
    """Other adapters on the base that is in memory."""

    def test_each_draws_as_if_loaded_alone(
        self, recipe: Recipe, several: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = {
            name: load(recipe.base, files, "cpu").draw(SAID, 1, QUICK)
            for name, files in several.items()
        }
        assert len({image.tobytes() for image in alone.values()}) == len(alone)
        painter = load(recipe.base, several["words"], "cpu")
        monkeypatch.setattr("tunekit.families.load", None)  # the base is not read again
        for name in ("all", "none", "lora", "checkpoint", "loha", "words", "lora", "all", "none"):
            painter.swap(several[name])
            drawn = next(painter.draw_many([SAID], [1], QUICK))
            assert same(drawn.image, alone[name]), name
            assert len(drawn.settings["adapters"]) == len(several[name])  # type: ignore[arg-type]

    def test_the_base_is_left_bit_for_bit(self, recipe: Recipe, several: dict[str, Any]) -> None:
        painter = load(recipe.base, [], "cpu")
        before = [
            (name, key, tensor.data_ptr(), tensor.clone())
            for name, module in painter.family.components().items()
            for key, tensor in module.state_dict().items()
            if "token_embedding" not in key  # a table that grows moves
        ]
        words = len(painter.family.tokenizers["text_encoder"])
        for files in several.values():
            painter.swap(files)
        after = {
            (name, key): tensor
            for name, module in painter.family.components().items()
            for key, tensor in module.state_dict().items()
        }
        assert len(painter.family.tokenizers["text_encoder"]) == words
        for name, key, place, tensor in before:
            assert after[name, key].data_ptr() == place
            assert torch.equal(after[name, key], tensor)

    def test_what_does_not_fit_leaves_the_former_on(
        self, recipe: Recipe, several: dict[str, Any], file: Path, tmp_path: Path
    ) -> None:
        painter = load(recipe.base, [(file, 0.5)], "cpu")
        before = painter.draw(SAID, 1, QUICK)
        stray = tmp_path / "stray.safetensors"
        write_safetensors(stray, {"x.lora_A.weight": torch.ones(4, 4)})
        for wrong in ([*several["words"], *several["loha"], stray], [tmp_path / "none"]):
            with pytest.raises(UserError):
                painter.swap(wrong)
            assert same(painter.draw(SAID, 1, QUICK), before)

    def test_what_trains_is_not_swapped(self, recipe: Recipe, file: Path) -> None:
        with pytest.raises(UserError, match="what is in training cannot be swapped"):
            Painter.of(*teach(recipe)).swap(file)
