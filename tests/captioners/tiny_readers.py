"""Models that describe pictures: the real classes and processors, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %} answer:"
)


def letters(special: Sequence[str], **words: Any) -> Any:
    """Return a tokenizer with a token a byte, after the special ones."""
    vocabulary = {word: number for number, word in enumerate([*special, *LETTERS])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="<pad>",
        additional_special_tokens=[s for s in special if s not in ("<s>", "</s>", "<pad>")],
        **words,
    )


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    """Save a BLIP, which continues the beginning of a caption."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "robot", "on"]
    words += ["the", "beach", "photo", "of", "at", "night", "big"]
    file = folder / "vocab.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder, bos_token="[DEC]")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4}
    text = {"vocab_size": len(words), "encoder_hidden_size": 32, "projection_dim": 16}
    text |= {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**tower, **text, "is_decoder": True, "initializer_range": 0.1},
        vision_config={**tower, "image_size": 32, "patch_size": 16, "initializer_range": 0.5},
        projection_dim=16,
    )
    size = {"height": 32, "width": 32}
    images = transformers.BlipImageProcessorPil(size=size)
    processor = transformers.BlipProcessor(images, tokenizer)
    return _save(folder, transformers.BlipForConditionalGeneration(config), processor)


def florence(folder: Path) -> Path:
    """Save a Florence-2, which knows tasks."""
    special = ["<s>", "<pad>", "</s>", "<image>"]
    tokenizer = letters(special, extra_special_tokens={"image_token": "<image>"})
    text = {
        "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_bos_token_id": 0, "forced_eos_token_id": 2, "model_type": "bart",
        "init_std": 0.5,
    }  # fmt: skip
    vision = {
        "in_channels": 3, "depths": [1, 1, 1, 1], "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True], "embed_dim": [16, 16, 16, 16],
        "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2], "window_size": 4,
        "projection_dim": 16, "drop_path_rate": 0.0,
    }  # fmt: skip
    config = transformers.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=3, is_encoder_decoder=True
    )
    size = {"height": 64, "width": 64}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    images.image_seq_length = 5
    processor = transformers.Florence2Processor(images, tokenizer, num_additional_image_tokens=1)
    return _save(folder, transformers.Florence2ForConditionalGeneration(config), processor)


def qwen(folder: Path) -> Path:
    """Save a Qwen2.5-VL, which is asked in a chat, and sees films where torchvision is there."""
    special = ["<s>", "<pad>", "</s>", "<|image_pad|>", "<|video_pad|>"]
    special += ["<|vision_start|>", "<|vision_end|>"]
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = letters(special)
    tokenizer.chat_template = template
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
            "intermediate_size": 48, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [0],
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    )
    images.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def llava(folder: Path, chat: bool = True) -> Path:
    """Save a LLaVA; without its chat template nobody knows how to ask it."""
    tokenizer = letters(["<s>", "<pad>", "</s>", "<image>"])
    tokenizer.add_bos_token = False
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "model_type": "llama",
        "initializer_range": 0.5,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
        "model_type": "clip_vision_model",
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, image_seq_length=4
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 1
    size = {"height": 32, "width": 32}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>") if chat else None,
    )
    return _save(folder, model, processor)


READERS = {"blip": blip, "florence": florence, "qwen": qwen, "llava": llava}


def save(kind: str, folder: Path) -> Path:
    """Save the reader called `kind`, always with the same random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return READERS[kind](folder)
