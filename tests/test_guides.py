"""Pictures drawn from others: all of them, parts of them, beyond them, or held to them."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    FluxControlNetModel,
    SD3ControlNetModel,
)
from numpy.typing import NDArray
from PIL import Image
from taught import recipe_for, teach

import tunekit
from tunekit import export, families
from tunekit.errors import UserError
from tunekit.generate import Generated, Request, generate
from tunekit.guides import Control, Start
from tunekit.inference import DrawSettings, Painter, load
from tunekit.pictures import read_settings
from tunekit.request import sides_of
from tunekit.schema import Base

Folder = Callable[..., Path]
FAMILIES = families.names()
PROMPT = "a zorp robot"
QUICK: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0}


def pixels(image: Image.Image | Path) -> NDArray[np.int64]:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"), dtype=np.int64)
    return np.asarray(image, dtype=np.int64)


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(pixels(one) - pixels(other)).mean())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a picture of 40 by 32 pixels, and a mask that is white at its right."""
    folder = tmp_path_factory.mktemp("guides")
    blocks = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / "photo.png")
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def painters(tiny_folder: Folder) -> Callable[[str], Painter]:
    made: dict[str, Painter] = {}
    return lambda name: made.setdefault(name, load(str(tiny_folder(name)), device="cpu"))


def small(picture: Path, width: int, height: int) -> Image.Image:
    with Image.open(picture) as image:
        return image.convert("RGB").crop((0, 0, width, height))


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    def test_from_a_picture(
        self, name: str, painters: Callable[[str], Painter], tiny_folder: Folder, tmp_path: Path
    ) -> None:
        """As diffusers' own pipeline draws it, and nearer to it the less is drawn anew."""
        noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise.png")
        painter = painters(name)
        drawn = {}
        for strength in (0.25, 1.0):
            start = Start.read(tmp_path / "noise.png", strength)
            settings = DrawSettings(**QUICK, width=32, height=32, start=start)
            drawn[strength] = painter.draw(PROMPT, 1, settings)
        vae = painter.draw(
            PROMPT,
            1,
            DrawSettings(**QUICK | {"steps": 100}, start=Start.read(tmp_path / "noise.png", 0.01)),
        )
        assert far(drawn[0.25], vae) < far(drawn[1.0], vae)
        lacks = {} if name != "sd" else {"safety_checker": None}
        plain = AutoPipelineForImage2Image.from_pretrained(tiny_folder(name), **lacks)
        plain.set_progress_bar_config(disable=True)
        takes = inspect.signature(plain.__call__).parameters
        size = {edge: 32 for edge in ("width", "height") if edge in takes}
        theirs = plain(
            PROMPT,
            image=small(tmp_path / "noise.png", 32, 32),
            strength=0.25,
            **size,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
        assert np.abs(pixels(theirs) - pixels(drawn[0.25])).max() <= 1

    def test_only_what_is_masked(
        self, name: str, painters: Callable[[str], Painter], tiny_folder: Folder, files: Path
    ) -> None:
        painter, edge = painters(name), 48 if name in ("sd3", "flux") else 40
        start = Start.read(files / "photo.png", mask=files / "mask.png")
        if edge == 48:  # these draw in steps of 16 pixels
            start = Start.read(files / "photo.png", mask=files / "mask.png", extend={"right": 8})
        drawn = painter.draw(PROMPT, 1, DrawSettings(**QUICK, width=40, height=32, start=start))
        assert drawn.size == (edge, 32)
        before = pixels(files / "photo.png")
        assert np.array_equal(pixels(drawn)[:, :24], before[:, :24])
        assert not np.array_equal(pixels(drawn)[:, 24:40], before[:, 24:])
        lacks = {} if name != "sd" else {"safety_checker": None}
        plain = AutoPipelineForInpainting.from_pretrained(tiny_folder(name), **lacks)
        plain.set_progress_bar_config(disable=True)
        theirs = plain(
            PROMPT,
            image=start.image,
            mask_image=start.mask,
            strength=1.0,
            width=edge,
            height=32,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
        assert np.abs(pixels(theirs)[:, 24:] - pixels(drawn)[:, 24:]).max() <= 1

    def test_held_by_a_controlnet_with_an_adapter_on_top(
        self, name: str, tiny_folder: Folder, files: Path, tmp_path: Path
    ) -> None:
        net = controlnet(name, tiny_folder(name), tmp_path / "net")
        recipe = recipe_for(tiny_folder(name))
        adapter = export.export_adapter(*teach(recipe), recipe, tmp_path / "export")[0].path
        plain = load(recipe.base, [], "cpu").draw(PROMPT, 1, DrawSettings(**QUICK))
        painter = load(recipe.base, [], "cpu", controlnet=net)
        held = {}
        for scale in (0.0, 1.0):
            control = Control.read(files / "photo.png", scale)
            held[scale] = painter.draw(PROMPT, 1, DrawSettings(**QUICK, control=control))
        if name != "flux":  # there diffusers takes noise for the picture first, of the same seed
            assert far(held[0.0], plain) == 0, "at no strength it holds nothing"
        assert far(held[0.0], held[1.0]) > 0
        painter.swap(adapter)
        both = painter.draw(PROMPT, 1, DrawSettings(**QUICK, control=control))
        assert far(both, held[1.0]) > 0
        assert far(both, load(recipe.base, [adapter], "cpu").draw(PROMPT, 1, DrawSettings(**QUICK)))
        painter.swap()
        again = painter.draw(PROMPT, 1, DrawSettings(**QUICK, control=control))
        assert far(again, held[1.0]) == 0

    def test_a_controlnet_of_another_base(
        self, name: str, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        other = {"sd": "sdxl", "sdxl": "sd", "sd3": "flux", "flux": "sd3"}[name]
        net = controlnet(other, tiny_folder(other), tmp_path / "net")
        with pytest.raises(UserError, match=r"^controlnet: .*(was made for another base|takes )"):
            load(str(tiny_folder(name)), device="cpu", controlnet=net)


def controlnet(name: str, base: Path, out: Path, seed: int = 2) -> Path:
    """Save a ControlNet of the real class whose every weight holds something."""
    denoiser: Any = families.load(Base(model=str(base))).denoiser
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")
        torch.manual_seed(seed)
        made: Any
        if name in ("sd", "sdxl"):
            channels = (8, 8, 8)  # the tiny autoencoder halves a picture twice
            made = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=channels)
        elif name == "sd3":
            made = SD3ControlNetModel.from_transformer(
                denoiser, num_layers=1, num_extra_conditioning_channels=0
            )
        else:
            made = FluxControlNetModel.from_transformer(
                denoiser,
                num_layers=1,
                num_single_layers=0,
                attention_head_dim=24,
                num_attention_heads=4,
            )
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(out)
    return out


class TestAround:
    def test_outpainting_keeps_what_is_there(
        self, painters: Callable[[str], Painter], files: Path
    ) -> None:
        extend = {"left": 8, "bottom": 16}
        start = Start.read(files / "photo.png", extend=extend)
        drawn = painters("sd").draw(PROMPT, 1, DrawSettings(**QUICK, start=start))
        assert drawn.size == (48, 48)
        assert np.array_equal(pixels(drawn)[:32, 8:], pixels(files / "photo.png"))
        assert start.told["extend"] == extend
        added = pixels(drawn)[32:]
        assert far(Image.fromarray(added.astype("uint8")), start.image.crop((0, 32, 48, 48))) > 0
        odd = Start.read(files / "photo.png", extend={"top": 3})
        with pytest.raises(UserError, match="height: 35 is not a multiple of 8"):
            painters("sd").draw(PROMPT, 1, DrawSettings(**QUICK, start=odd))

    def test_another_size_is_scaled_and_cut(
        self, painters: Callable[[str], Painter], files: Path
    ) -> None:
        start = Start.read(files / "photo.png", 0.5, files / "mask.png")
        image, mask = start.fitted(64, 64)
        assert image.size == mask.size == (64, 64)  # type: ignore[union-attr]
        drawn = painters("sd").draw(
            PROMPT, 1, DrawSettings(**QUICK, width=64, height=64, start=start)
        )
        assert drawn.size == (64, 64)
        kept = pixels(mask).squeeze() == 0  # type: ignore[arg-type]
        assert np.array_equal(pixels(drawn)[kept], pixels(image)[kept])

    def test_batches_start_from_it_too(
        self, painters: Callable[[str], Painter], files: Path
    ) -> None:
        settings = DrawSettings(**QUICK, start=Start.read(files / "photo.png", 0.5))
        together = [
            d.image for d in painters("sd").draw_many([PROMPT], [1, 2], settings, together=2)
        ]
        alone = [d.image for d in painters("sd").draw_many([PROMPT], [1, 2], settings)]
        assert all(
            np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(alone, together, strict=True)
        )


class TestAgain:
    @pytest.fixture(autouse=True)
    def here(self, files: Path, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(files)
        base = tiny_folder()
        if not Path(base.name).exists():
            Path(base.name).symlink_to(base)

    def draw(self, told: list[str] | None = None, **asked: Any) -> Generated:
        notes = told if told is not None else []
        return generate(Request(**asked), device="cpu", note=notes.append)

    def test_with_all_that_guided_it(self, tiny_folder: Folder, files: Path) -> None:
        controlnet("sd", tiny_folder(), files / "net")
        made = self.draw(
            base=str(tiny_folder()), prompts=[PROMPT], steps=4, init=Path("photo.png"),
            mask=Path("mask.png"), strength=0.8, extend={"left": 8}, controlnet=Path("net"),
            control_image=Path("photo.png"), control_scale=0.7,
        )  # fmt: skip
        stored = read_settings(made.pictures[0])
        assert (stored["width"], stored["height"]) == (48, 32)
        assert str(files) not in json.dumps(stored)
        told: list[str] = []
        again = self.draw(told, picture=made.pictures[0])
        assert told == [f"{made.pictures[0]}: drawn again, equal pixel for pixel"]
        assert read_settings(again.pictures[0]) == stored
        controlnet("sd", tiny_folder(), files / "other", seed=3)
        told.clear()
        self.draw(told, picture=made.pictures[0], controlnet=Path("other"), strength=0.5)
        assert told == [f"{made.pictures[0]}: was drawn with another ControlNet than other"]

    def test_from_another_picture_is_refused(
        self, tiny_folder: Folder, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = str(tiny_folder())
        made = self.draw(base=base, prompts=[PROMPT], steps=4, init=Path("photo.png"))
        picture = (files / made.pictures[0]).rename(tmp_path / "one.png")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"a file, photo\.png, which is not in .* --init"):
            self.draw(picture=picture, base=base)
        with Image.open(files / "photo.png") as photo:
            photo.rotate(180).save("photo.png")
        with pytest.raises(UserError, match=r"is not the photo\.png of which .* with --init"):
            self.draw(picture=picture, base=base)
        told: list[str] = []
        self.draw(told, picture=picture, base=base, init=Path("photo.png"))
        assert f"{picture}: was drawn with another picture than photo.png" in told
        told.clear()
        self.draw(told, picture=picture, base=base, init=files / "photo.png")
        assert told == [f"{picture}: drawn again, equal pixel for pixel"]


class TestRefused:
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"strength": 0.5}, "init: mask, strength and extend need a picture to start from"),
            ({"mask": Path("mask.png")}, "init: mask"),
            ({"init": Path("none.png")}, "none.png"),
            ({"init": Path("text.png")}, "text.png: not a picture"),
            ({"init": Path("photo.png"), "strength": 0.0}, "strength: 0 is not above 0 to 1"),
            ({"init": Path("photo.png"), "strength": 0.1}, "strength: 0.1 of 4 steps is none"),
            (
                {"init": Path("photo.png"), "mask": Path("small.png")},
                "is 8x8, and photo.png is 40x",
            ),
            (
                {"init": Path("photo.png"), "mask": Path("black.png")},
                "black, so nothing may change",
            ),
            ({"init": Path("photo.png"), "extend": {"up": 8}}, "extend: up is no side"),
            ({"init": Path("photo.png"), "extend": {"top": 9999}}, "top=9999 is not in 0 to 4096"),
            (
                {"init": Path("photo.png"), "extend": {"top": 8}, "width": 32},
                "extend: the size is that of the picture with what is added",
            ),
            ({"controlnet": Path("net")}, "a ControlNet and the picture it is given go together"),
            ({"control_image": Path("photo.png")}, "go together"),
            ({"control_scale": 0.5}, "control_scale: scales nothing"),
            (
                {"controlnet": Path("none"), "control_image": Path("photo.png")},
                "controlnet: none is no folder with a config.json",
            ),
            (
                {
                    "controlnet": Path("none"),
                    "control_image": Path("photo.png"),
                    "control_scale": 3.0,
                },
                "control_scale: 3 is not in 0 to 2",
            ),
        ],
    )
    def test_before_anything_is_drawn(
        self,
        asked: dict[str, Any],
        said: str,
        files: Path,
        tiny_folder: Folder,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(files)
        (files / "text.png").write_text("a text")
        Image.new("L", (8, 8), 255).save(files / "small.png")
        Image.new("L", (40, 32), 0).save(files / "black.png")
        request = Request(
            **{"base": str(tiny_folder()), "prompts": [PROMPT], "steps": 4, **asked}  # type: ignore[arg-type]
        )
        with pytest.raises(UserError, match=said):
            generate(request, tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

    def test_a_controlnet_that_is_a_pickle_or_carries_code(
        self, tiny_folder: Folder, tmp_path: Path
    ) -> None:
        net = controlnet("sd", tiny_folder(), tmp_path / "net")
        (net / "run.py").write_text("")
        with pytest.raises(UserError, match=r"carries code \(run\.py\)"):
            load(str(tiny_folder()), device="cpu", controlnet=net)
        (net / "run.py").unlink()
        (net / "diffusion_pytorch_model.safetensors").rename(net / "diffusion_pytorch_model.bin")
        with pytest.raises(UserError, match="is a pickle, which can run code"):
            load(str(tiny_folder()), device="cpu", controlnet=net)

    def test_a_base_that_has_no_such_pipeline(self, tiny_folder: Folder, files: Path) -> None:
        """diffusers' inpainting with a ControlNet of SD 3 means a ControlNet that inpaints."""
        net = controlnet("sd3", tiny_folder("sd3"), files / "net3")
        painter = tunekit.load(str(tiny_folder("sd3")), device="cpu", controlnet=net)
        control = Control.read(files / "photo.png")
        for mask in (None, files / "mask.png"):
            start = Start.read(
                files / "photo.png", mask=mask, extend={"right": 8} if mask else None
            )
            settings = DrawSettings(**QUICK, width=32, height=32, start=start, control=control)
            with pytest.raises(UserError, match="controlnet: diffusers has no pipeline for this"):
                painter.draw(PROMPT, 1, settings)
        with pytest.raises(UserError, match="no picture is given to it"):
            painter.draw(PROMPT, 1, DrawSettings(**QUICK))

    def test_sides_on_the_command_line(self) -> None:
        assert sides_of(["left=8", "top=16"]) == {"left": 8, "top": 16}
        for texts in (["left"], ["left=x"], ["left=-8"], ["left=8", "left=16"]):
            with pytest.raises(UserError, match="is no SIDE=PIXELS"):
                sides_of(texts)
