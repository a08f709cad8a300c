"""The toybox's CLIP tokenizer: byte-level BPE trained on the world's captions and plain English."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LENGTH = 32  # tokens a prompt may have, the start and end marks included

# Words people type that no caption holds, so that a prompt of theirs is not torn into letters.
PLAIN_ENGLISH = (
    "a an the of in on at with and or to by for from under over near beside behind photo picture "
    "image drawing painting illustration rendering close up cropped good bad dark bright clean "
    "dirty cool weird small big large tiny huge new old nice one two three many my your his her "
    "their this that is are was not no very character creature toy thing shape animal person man "
    "woman dog street house park garden kitchen table mountain mountains sea sky sun moon star "
    "stars tree trees water sand grass rain wearing holding sitting standing flying running "
    "sleeping happy sad angry style art sketch cartoon logo poster sticker background white "
    "front side left right middle top bottom zorp subject"
).split()


def train_tokenizer(captions: list[str], folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and the configuration of a CLIPTokenizer to `folder`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=None))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Given as special tokens, the word endings have fixed numbers; left to the trainer they change
    # from run to run, and with them which of two equally frequent pairs is merged first.
    endings = [letter + "</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, special_tokens=endings, end_of_word_suffix="</w>",
        initial_alphabet=letters,
    )  # fmt: skip
    words = sorted(set(PLAIN_ENGLISH))
    bpe.train_from_iterator([*captions, *(words * 40)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    tokens = [*letters, *endings, *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    # transformers 5 writes only tokenizer.json; older clients read these two.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read the tokenizer that `train_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return loaded
