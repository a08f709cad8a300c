"""Encoders: what they return, what they refuse, and that transformers agrees on the pixels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import PREPROCESSING, write_preprocessing
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tunekit.errors import UserError
from tunekit.evaluation.embedders import Clip, ImageEncoder, Preprocessing, SubjectEncoder

Paint = Callable[..., Image.Image]
TOWER: dict[str, int] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_rows_are_unit_vectors_and_do_not_depend_on_their_neighbours(
    subject_folder: Path, paint: Paint
) -> None:
    encoder = SubjectEncoder.load(str(subject_folder))
    pictures = [paint(seed, size=24 + seed) for seed in range(20)]  # of several sizes
    rows = encoder.embed_images(pictures)
    assert rows.shape == (20, 32)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(encoder.embed_images(pictures[17:18])[0], rows[17])
    assert torch.equal(rows, encoder.embed_images(pictures))


def test_clip_reads_words_and_pictures_into_one_space(clip_folder: Path, paint: Paint) -> None:
    clip = Clip.load(str(clip_folder))
    texts = clip.embed_texts(["a zorp robot", "a blue cat in the snow"])
    pictures = clip.embed_images([paint(1)])
    assert texts.shape == (2, 16)
    assert pictures.shape == (1, 16)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    # Padding to full length and batching change nothing: each text alone gives the same row.
    torch.testing.assert_close(clip.embed_texts(["a zorp robot"])[0], texts[0])


def test_a_text_too_long_is_refused_not_cut(clip_folder: Path) -> None:
    clip = Clip.load(str(clip_folder))
    assert clip.fits("a robot")
    with pytest.raises(UserError, match=r"longer than the 24 tokens.*shorten it"):
        clip.embed_texts(["a robot " * 30])


@pytest.mark.parametrize("size", [(48, 32), (31, 70), (32, 32), (500, 333)])
def test_pixels_are_those_of_transformers_own_processor(size: tuple[int, int]) -> None:
    config = {
        **PREPROCESSING,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_convert_rgb": True,
    }
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    ours = Preprocessing.from_config(config, "here")(image)
    theirs = CLIPImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_convnext_rule_and_plain_sizes() -> None:
    read = Preprocessing.from_config
    assert read({"size": 224, "crop_pct": 0.875}, "x").size == 256
    assert read({"size": 224, "crop_pct": 0.875}, "x").crop == (224, 224)
    assert read({"size": {"height": 20, "width": 30}}, "x").size == (20, 30)
    assert read({"do_resize": False}, "x").size is None
    unscaled = read({"do_resize": False, "do_rescale": False, "do_normalize": False}, "x")
    assert float(unscaled(Image.new("RGB", (2, 2), (255, 0, 0))).max()) == 255


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 8, "do_pad": True}, "do_pad is set"),
        ({"size": {"longest_edge": 8}}, "longest_edge"),
        ({"do_resize": True}, "size None"),
    ],
)
def test_unknown_preprocessing_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing.from_config(config, "preprocessor_config.json")


def test_a_projection_is_used_where_there_is_one(tmp_path: Path, paint: Paint) -> None:
    config = CLIPVisionConfig(**TOWER, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    write_preprocessing(tmp_path, size={"height": 32, "width": 32})
    assert SubjectEncoder.load(str(tmp_path)).embed_images([paint(1)]).shape == (1, 12)


def test_an_untrained_pooler_is_not_used(tmp_path: Path, paint: Paint) -> None:
    """DINO's published ViT has no pooler; transformers would fill one with random numbers."""
    config = ViTConfig(**TOWER)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    write_preprocessing(tmp_path, size={"height": 32, "width": 32})
    first = SubjectEncoder.load(str(tmp_path)).embed_images([paint(1)])
    assert torch.equal(first, SubjectEncoder.load(str(tmp_path)).embed_images([paint(1)]))


def test_half_precision_weights_are_computed_with_in_full(
    subject_folder: Path, tmp_path: Path, paint: Paint
) -> None:
    AutoModel.from_pretrained(subject_folder).half().save_pretrained(tmp_path)
    shutil.copy(subject_folder / "preprocessor_config.json", tmp_path)
    half = SubjectEncoder.load(str(tmp_path)).embed_images([paint(1)])
    assert half.dtype == torch.float32
    whole = SubjectEncoder.load(str(subject_folder)).embed_images([paint(1)])
    torch.testing.assert_close(half, whole, atol=1e-2, rtol=0)


def test_missing_weights_are_refused(subject_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(subject_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if key.endswith("convolution.weight")))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights"):
        SubjectEncoder.load(str(folder))


def test_pickled_weights_are_refused(subject_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(subject_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        SubjectEncoder.load(str(folder))


@pytest.mark.parametrize("kind", [SubjectEncoder, Clip])
def test_a_truncated_file_is_refused(
    kind: type[ImageEncoder], subject_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(clip_folder if kind is Clip else subject_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"truncated': cannot be loaded") as caught:
        kind.load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"size": 8, "resample": [2]}', "\xff"])
def test_broken_preprocessing_is_refused(subject_folder: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(subject_folder, folder)
    (folder / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: cannot be loaded") as caught:
        SubjectEncoder.load(str(folder))
    assert "\n" not in str(caught.value)


def test_code_beside_the_weights_is_not_run(subject_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    shutil.copytree(subject_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "c.C", "AutoModel": "c.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "c.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(UserError, match="subject encoder"):
        SubjectEncoder.load(str(folder))
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"CLIP '{tmp_path}': cannot be loaded"):
        Clip.load(str(tmp_path))


def test_an_encoder_without_words_is_no_clip(subject_folder: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.clip: .* reads no words"):
        Clip.load(str(subject_folder))


def test_there_is_no_bundled_nameless_encoder() -> None:
    with pytest.raises(UserError, match="no bundled picture encoder"):
        ImageEncoder.load("toybox")
