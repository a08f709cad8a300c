"""A base that is one file in the original naming: as good as the folder it was made from."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ldm
import pytest
import torch
from hostile import Canary
from PIL import Image
from safetensors.torch import load_file, save_file

import tunekit
from tunekit import families, modelfolder
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.generate import Request, generate
from tunekit.progress import Silent
from tunekit.recipe import recipe_from
from tunekit.schema import Base

Folder = Callable[..., Path]
PROMPT = "a zorp robot on the beach"
DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="session")
def configs(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base's folder without its weights."""
    folder = tmp_path_factory.mktemp("configs") / "configs"
    shutil.copytree(tiny_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="session")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny base as one file. Tests may not write to it."""
    return ldm.single_file(tiny_folder(), tmp_path_factory.mktemp("one") / "tiny.safetensors")


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take away what this machine may have in its Hub cache; return the empty one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def load(path: Path, configs: Path | None, **settings: Any) -> Family:
    config = None if configs is None else str(configs)
    return families.load(Base(model=str(path), config=config, **settings))


def refusal(path: Path, configs: Path | None, **settings: Any) -> str:
    """Return the one line that loading this file is refused with."""
    with pytest.raises(UserError) as caught:
        load(path, configs, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write the file with its tensors changed."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target)
    return target


def answers(family: Family) -> list[torch.Tensor]:
    """Return what the base makes of a prompt, a picture and noise, and a picture it draws."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 32, 32, generator=random) * 2 - 1
    latents = family.encode_image(pixels)
    conditioning = family.encode_prompt([PROMPT])
    noisy = torch.randn(latents.shape, generator=random)
    drawn = family.pipeline()(
        PROMPT,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    predicted = family.predict(noisy, torch.tensor([400]), conditioning)
    return [latents, *conditioning.values(), predicted, drawn]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestSameAsTheFolder:
    @pytest.mark.parametrize("open_clip", [False, True], ids=["clip", "open_clip"])
    def test_every_answer(
        self, open_clip: bool, tiny_folder: Folder, configs: Path, tmp_path: Path
    ) -> None:
        path = ldm.single_file(tiny_folder(), tmp_path / "one.safetensors", open_clip=open_clip)
        ours, theirs = load(path, configs), families.load(Base(model=str(tiny_folder())))
        for component in ("denoiser", "text_encoder"):
            same_weights(ours.component(component), theirs.component(component))
        same_weights(ours.vae, theirs.vae)
        # Where weights lie in memory decides the order of sums.
        for one, other in zip(answers(ours), answers(theirs), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert ours.facts() == theirs.facts()
        assert ours.default_resolution == theirs.default_resolution
        assert ours.label == str(path)

    def test_what_was_released_comes_back(self, whole: Path, configs: Path) -> None:
        family = load(whole, configs)
        before = answers(family)
        family.release("vae", "text_encoder")
        for one, other in zip(before, answers(family), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_a_file_of_half_precision(
        self, dtype: Any, tiny_folder: Folder, configs: Path, tmp_path: Path
    ) -> None:
        path = ldm.single_file(tiny_folder(), tmp_path / "half.safetensors", half=True)
        family = load(path, configs, dtype=dtype)
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        for module in (family.denoiser, family.vae, *family.text_encoders.values()):
            assert {p.dtype for p in module.parameters()} == {wanted}
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())

    def test_nothing_is_said_and_nothing_drawn_from_the_global_stream(
        self, whole: Path, configs: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        load(whole, configs)
        assert torch.equal(torch.rand(3), wanted)
        assert capfd.readouterr() == ("", "")

    def test_the_weights_beside_the_configuration_are_not_used(
        self, tiny_folder: Folder, whole: Path, tmp_path: Path
    ) -> None:
        """A text encoder of another naming must not be quietly replaced by the folder's."""
        path = changed(whole, tmp_path / "no.safetensors", without("cond_stage_model."))
        assert "its text_encoder cannot be loaded as" in refusal(path, tiny_folder())


class TestConfiguration:
    def test_none_and_no_hub(self, whole: Path, no_hub: Path) -> None:
        line = refusal(whole, None)
        assert line.startswith(f"base.config: {whole} holds weights alone")
        assert DEFAULT in line
        assert "name a diffusers folder" in line

    def test_that_of_diffusers_default_in_the_hub_s_cache(
        self, whole: Path, configs: Path, no_hub: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        repo = no_hub / f"models--{DEFAULT.replace('/', '--')}"
        shutil.copytree(configs, repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        modelfolder.say.cache_clear()
        with caplog.at_level(logging.WARNING, "tunekit"):
            family = load(whole, None)
            load(whole, None)
        same_weights(family.denoiser, load(whole, configs).denoiser)
        assert [r.message for r in caplog.records] == [
            f"{whole}: is taken for a {DEFAULT}; name base.config if it is another model"
        ]

    def test_averaged_weights_are_told_of(
        self, whole: Path, configs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        averaged = {"model_ema.decay": torch.ones(1)}
        path = changed(whole, tmp_path / "ema.safetensors", lambda t: t.update(averaged))
        load(path, configs)
        assert "averaged (EMA) weights too; the plain ones are used" in caplog.text

    @pytest.mark.parametrize("key", ["variant", "revision"])
    def test_keys_that_mean_nothing_for_a_file(self, key: str, whole: Path, configs: Path) -> None:
        assert refusal(whole, configs, **{key: "fp16"}).startswith(f"base.{key}: ")

    @pytest.mark.parametrize("model", ["toybox", "owner/name", None])
    def test_it_means_nothing_for_another_base(
        self, model: str | None, configs: Path, tiny_folder: Folder
    ) -> None:
        path = Path(model or tiny_folder())
        assert refusal(path, configs).startswith("base.config: describes a single")

    def test_it_is_no_model_folder(self, whole: Path, tmp_path: Path) -> None:
        assert "base.config: " in (line := refusal(whole, tmp_path))
        assert "no model_index.json" in line

    def test_it_carries_code(self, whole: Path, configs: Path, tmp_path: Path) -> None:
        folder = tmp_path / "configs"
        shutil.copytree(configs, folder)
        (folder / "evil.py").touch()
        assert "carries code" in refusal(whole, folder)
        load(whole, folder, trust_remote_code=True)

    def test_a_part_of_it_is_missing(self, whole: Path, configs: Path, tmp_path: Path) -> None:
        folder = tmp_path / "configs"
        shutil.copytree(configs, folder, ignore=shutil.ignore_patterns("tokenizer"))
        assert f"{folder}: has no folder tokenizer" in refusal(whole, folder)

    @pytest.mark.parametrize(
        ("part", "key", "value", "said"),
        [
            ("unet", "block_out_channels", [16, 48], "its unet cannot be loaded"),
            ("unet", "layers_per_block", 2, "its unet cannot be loaded"),
            ("vae", "layers_per_block", 0, "weights of its vae, but"),
            ("vae", "layers_per_block", 2, "weights of its vae are missing"),
            ("text_encoder", "num_hidden_layers", 1, "weights of its text_encoder, but"),
            ("text_encoder", "num_hidden_layers", 3, "weights of its text_encoder are missing"),
        ],
    )
    def test_it_is_of_another_model(
        self, part: str, key: str, value: Any, said: str, whole: Path, configs: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "configs"
        shutil.copytree(configs, folder)
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        assert said in refusal(whole, folder)


def without(prefix: str) -> Callable[[dict[str, Any]], None]:
    """Return what takes away the tensors under a prefix."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


class TestFaults:
    @pytest.mark.parametrize(
        ("gone", "component"),
        [
            ("model.diffusion_model.middle_block.2.in_layers.2.weight", "unet"),
            ("model.diffusion_model.out.", "unet"),
            ("first_stage_model.decoder.mid.attn_1.q.bias", "vae"),
            ("first_stage_model.", "vae"),
            ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
            ("cond_stage_model.transformer.text_model.encoder.layers.1.", "text_encoder"),
        ],
    )
    def test_missing_weights_are_not_made_up(
        self, gone: str, component: str, whole: Path, configs: Path, tmp_path: Path
    ) -> None:
        path = changed(whole, tmp_path / "less.safetensors", without(gone))
        line = refusal(path, configs)
        assert str(path) in line
        assert component in line

    def test_missing_weights_of_an_open_clip(
        self, tiny_folder: Folder, configs: Path, tmp_path: Path
    ) -> None:
        path = ldm.single_file(tiny_folder(), tmp_path / "one.safetensors", open_clip=True)
        gone = without("cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias")
        changed(path, path, gone)
        assert "weights of its text_encoder are missing" in refusal(path, configs)

    def test_a_pickle_is_never_read(self, whole: Path, configs: Path, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        for name in ("model.ckpt", "model.bin", "model.pt", "model.safetensors"):
            torch.save({"state_dict": Canary(canary)}, tmp_path / name)
            assert "is a pickle" in refusal(tmp_path / name, configs)
        assert not canary.exists()

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda b: b[:-10], "is cut short: 10 bytes are missing"),
            (lambda b: b[: len(b) // 2], "is cut short"),
            (lambda b: b[:100], "no whole safetensors file"),
            (lambda b: b"", "no safetensors file"),
            (lambda b: b[:9] + b"\xff" + b[10:], "its header cannot be read"),
            (lambda b: (2**62).to_bytes(8, "little") + b[8:], "no whole safetensors file"),
            (lambda b: (12).to_bytes(8, "little") + b'{"a":{"b":1}}', "its header cannot be read"),
            (lambda b: (2).to_bytes(8, "little") + b"{}", "is no base"),
        ],
    )
    def test_a_damaged_file(
        self, damage: Callable[[bytes], bytes], said: str, whole: Path, tmp_path: Path
    ) -> None:
        """The file is looked at before its configuration is."""
        path = tmp_path / "bad.safetensors"
        path.write_bytes(damage(whole.read_bytes()))
        line = refusal(path, None)
        assert said in line
        assert str(path) in line

    def test_a_header_that_only_the_library_sees_through(
        self, whole: Path, configs: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(whole.read_bytes() + b"more")
        assert "is damaged" in refusal(path, configs)
        path.write_bytes(whole.read_bytes().replace(b'"F32"', b'"F99"', 1))
        assert "is damaged" in refusal(path, None)

    def test_shapes_that_no_model_has(self, whole: Path, configs: Path, tmp_path: Path) -> None:
        name = "model.diffusion_model.input_blocks.0.0.weight"
        path = changed(
            whole, tmp_path / "odd.safetensors", lambda t: t.update({name: torch.ones(3)})
        )
        assert "diffusers cannot tell what model it is" in refusal(path, None)
        assert "its unet cannot be loaded" in refusal(path, configs)

    def test_another_thing_than_a_base(self, whole: Path, configs: Path, tmp_path: Path) -> None:
        path = changed(whole, tmp_path / "vae.safetensors", without("model."))
        assert "is no base in the original naming" in refusal(path, configs)

    def test_the_bundled_base_is_not_a_file_of_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("toybox").touch()
        assert modelfolder.described_here(Base(model="toybox"))

    def test_a_file_that_is_not_there(self, configs: Path, tmp_path: Path) -> None:
        path = tmp_path / "none.safetensors"
        assert f"base.model: there is no file {path}" in refusal(path, configs)
        assert "there is no file" in refusal(Path("models/none.safetensors"), None)


@pytest.fixture(scope="module")
def tree(
    whole: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Return a recipe for the tiny file, with a cache of its own."""
    from tiny_judges import tiny_clip, tiny_resnet

    root = tmp_path_factory.mktemp("run")
    (root / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (200, 90 * number, 30)).save(root / f"pictures/{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEKIT_CACHE", str(root / "cache"))
        yield {
            "name": "tiny",
            "base": {"model": str(whole), "config": str(configs)},
            "data": {"source": str(root / "pictures"), "trigger": "zorp", "class": "robot"},
            "adapter": {"kind": "lora", "rank": 2},
            "train": {"steps": 2, "batch_size": 1, "learning_rate": 1e-2},
            "evaluate": {
                "steps": 2,
                "prompts": ["a {trigger} {class}"],
                "seeds": [1],
                "clip": str(tiny_clip(root / "clip")),
                "subject_encoder": str(tiny_resnet(root / "subject")),
            },
        }


class TestRecipe:
    def test_a_whole_run_and_a_picture_of_it(self, tree: dict[str, Any], tmp_path: Path) -> None:
        """Trained, exported, verified in a fresh pipeline, measured; then drawn from its folder."""
        run = tunekit.train(tree, out=tmp_path / "run", reporter=Silent())
        made = generate(Request(run=run.folder, steps=2), tmp_path / "drawn", device="cpu")
        assert len(made.pictures) == 1
        exported = next((run.folder / "export").glob("*.safetensors"))
        text = exported.read_bytes().decode("latin-1") + (exported.parent / "README.md").read_text()
        for path in (tree["base"]["model"], tree["base"]["config"]):
            assert path not in text, "a path of this machine does not travel"
        assert 'StableDiffusionPipeline.from_single_file("path/to/tiny.safetensors")' in text

    def test_validate_looks_at_the_file_without_torch(
        self, tree: dict[str, Any], whole: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole.read_bytes()[:-4])
        code = (
            "import sys; from tunekit.cli import main; sys.argv[0] = 'tunekit'\n"
            "try: main()\n"
            "finally: assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
        )
        told = {
            change: subprocess.run(
                [sys.executable, "-c", code, "validate", str(tmp_path / "recipe.yaml"), *change],
                capture_output=True,
                text=True,
                timeout=60,
                cwd=tmp_path,
            )
            for change in [(), ("base.config=null",), (f"base.model={cut}",)]
        }
        assert [(done.returncode, done.stderr[:40]) for done in told.values()][:2] == [(0, "")] * 2
        done = told[(f"base.model={cut}",)]
        assert done.returncode == 2
        assert "is cut short: 4 bytes" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("base", "said"),
        [
            ({"model": "models/none.safetensors"}, 'base.model: there is no file "models/none'),
            ({"model": "models/none.ckpt"}, 'base.model: there is no file "models/none'),
            ({"config": "no/such/folder"}, 'base.config: there is no folder "no/such/folder"'),
            ({"model": "owner/name"}, "base.config: describes a single .safetensors file"),
            ({"variant": "fp16"}, "base.variant: "),
        ],
    )
    def test_faults_are_named_by_their_key(
        self, base: dict[str, str], said: str, tree: dict[str, Any]
    ) -> None:
        with pytest.raises(UserError) as caught:
            recipe_from(tree | {"base": tree["base"] | base})
        assert str(caught.value).startswith(f"recipe: {said}")
