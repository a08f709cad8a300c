"""Stage 4: the CLIP learns to name subject, colour, place and style among all their combinations.

The text tower stays as it is, since the denoiser has learned its features. In these, captions that
differ in the subject lie about four times closer together than captions that differ in the colour,
so that a projection trained on random pictures loses subjects: here both projections start as
least-squares probes of the attributes, and each picture must find its own caption among every
combination of the world's words.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tunekit.toybox import world
from tunekit.toybox.pretrain.clip import shift, to_tensor
from tunekit.toybox.pretrain.common import Frugal, Stage, batches, device
from tunekit.toybox.pretrain.pictures import Pictures
from tunekit.toybox.pretrain.words import LENGTH, load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

WORDS: dict[str, tuple[str, ...]] = {
    "subject": world.FULL.subjects,
    "colour": world.FULL.colours,
    "place": world.FULL.places,
    "style": world.FULL.styles,
}
SHAPE = tuple(len(words) for words in WORDS.values())
# Form of the sentence, which of a place's phrases, which of a style's.
WORDINGS = ((0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 1), (1, 1, 1), (2, 2, 2))
CENTRES = 0.5  # weight of naming each attribute alone
OWN = 0.25  # weight of finding the picture's own caption, in its own words, in the batch


def captions(wording: tuple[int, int, int]) -> list[str]:
    """All combinations of subject, colour, place and style (in this order) in one wording."""
    form, at_place, at_style = wording
    told = []
    for subject, colour, place, style in itertools.product(*WORDS.values()):
        where = world.PLACE_WORDS[place][at_place % len(world.PLACE_WORDS[place])]
        drawn = world.STYLE_WORDS[style][at_style % len(world.STYLE_WORDS[style])]
        body = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {subject} {where}"
        article = "a " if drawn.endswith("style") else ""
        told.append((f"{body}, {drawn}", f"{drawn}, {body}", f"{body} in {article}{drawn}")[form])
    return told


def labels(facts: list[dict[str, Any]]) -> torch.Tensor:
    """Places of each picture's words in WORDS, [N, 4]; -1 for a colour that no word names."""
    return torch.tensor(
        [[words.index(f[k]) if f[k] in words else -1 for k, words in WORDS.items()] for f in facts]
    )


def _targets(found: torch.Tensor) -> torch.Tensor:
    """Labels [N, 4] as zero-mean one-hot rows [N, 44], attribute after attribute."""
    parts = []
    for column, count in zip(found.T, SHAPE, strict=True):
        part = F.one_hot(column.clamp(min=0), count).float() - 1 / count
        parts.append(part * (column >= 0)[:, None])
    return torch.cat(parts, 1)


def _probe(features: torch.Tensor, targets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Least-squares map of features to targets, filled up with small noise to `like`'s shape."""
    gram = features.T @ features / len(features)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    found = torch.linalg.solve(gram + ridge, features.T @ targets / len(features)).T
    generator = torch.Generator().manual_seed(len(gram))
    rows = torch.randn(len(like) - len(found), len(gram), generator=generator)
    both = torch.cat([found, 0.02 * found.std() * rows])
    scaled: torch.Tensor = both * (0.09 / found.std())
    return scaled


@torch.no_grad()
def _texts(model: CLIPModel, tokenizer: CLIPTokenizer, told: list[str]) -> torch.Tensor:
    """Pooled features [N, 128] of captions, in fp32 as they are computed when the CLIP is used."""
    different = {c: i for i, c in enumerate(dict.fromkeys(told))}
    unique = sorted(different, key=len)
    rows = torch.empty(len(unique), model.config.text_config.hidden_size)
    for start in range(0, len(unique), 256):
        part = unique[start : start + 256]
        ids = tokenizer(part, padding="longest", truncation=True, max_length=LENGTH,
                        return_tensors="pt").input_ids  # fmt: skip
        pooled = model.text_model(ids.to(device())).pooler_output.float().cpu()
        rows[[different[c] for c in part]] = pooled
    return rows[[different[c] for c in told]]


def _mirrored(caption: str) -> bool:
    """Whether the caption still holds when its picture is mirrored."""
    return not {"left", "right"} & set(caption.replace(",", "").split())


def _features(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer,
              facts: list[dict[str, Any]], wordings: Sequence[tuple[int, int, int]]
              ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Text features of all wordings [W, 9600, 128] and of the pictures' captions [N, 128]."""
    path = folder / "texts.safetensors"
    every = [captions(w) for w in wordings]
    own = [f["caption"] for f in facts]
    digest = hashlib.sha256(json.dumps([every, own]).encode())
    for tensor in model.text_model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    made_of = {"made_of": digest.hexdigest()}  # another tower or other words: made anew
    if not path.exists() or _note(path) != made_of:
        folder.mkdir(parents=True, exist_ok=True)
        rows = torch.stack([_texts(model, tokenizer, told) for told in every])
        new = path.with_suffix(".new")
        save_file({"every": rows, "own": _texts(model, tokenizer, own)}, new, made_of)
        new.replace(path)
    return load_file(path)


def _note(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        note: dict[str, str] = file.metadata()
    return note


@torch.no_grad()
def _start(model: CLIPModel, every: torch.Tensor, pixels: Any, found: torch.Tensor) -> None:
    """Set both projections to probes: the text's on all wordings, the pictures' on 5,000."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in SHAPE))
    targets = _targets(grid).repeat(len(every), 1)
    text = model.text_projection.weight
    text.copy_(_probe(every.flatten(0, 1), targets, text.cpu()))
    some = np.random.default_rng(3).permutation(len(found))[:5000]
    seen = [
        model.vision_model(pixel_values=to_tensor(pixels[part]).to(device())).pooler_output.cpu()
        for part in np.array_split(some, max(1, len(some) // 200))
    ]
    visual = model.visual_projection.weight
    visual.copy_(_probe(torch.cat(seen), _targets(found[some]), visual.cpu()))
    model.logit_scale.fill_(float(np.log(20)))


def _named(logits: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mean -log p of the right combination; an unknown colour is summed over."""
    logp = logits.log_softmax(1).view(-1, *SHAPE)
    subject, colour, place, style = found.T
    colours = logp[torch.arange(len(found)), subject, :, place, style]
    known = colours.gather(1, colour.clamp(min=0)[:, None])[:, 0]
    return -torch.where(colour >= 0, known, colours.logsumexp(1)).mean()


def _centred(seen: torch.Tensor, texts: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies against each word's mean caption; `seen` comes with its scale."""
    grid = texts.view(*SHAPE, -1)
    losses = []
    for axis in range(len(SHAPE)):
        centres = F.normalize(grid.mean([i for i in range(len(SHAPE)) if i != axis]), dim=-1)
        losses.append(F.cross_entropy(seen @ centres.T, found[:, axis], ignore_index=-1))
    return torch.stack(losses).sum()


def select(data: Pictures) -> Pictures:
    """Pictures of one figure, without the combinations that are kept out of pretraining."""
    kept = [
        i
        for i, f in enumerate(data.facts)
        if f["figures"] == 1 and not world.held_out(tuple(f[k] for k in WORDS))
    ]
    return Pictures(data.pixels[kept], [data.facts[i] for i in kept])


def train(
    work: Path, data: Pictures, steps: int, wordings: Sequence[tuple[int, int, int]] = WORDINGS,
    batch: int = 64, seed: int = 8,
) -> Path:  # fmt: skip
    """Train the CLIP in `work/clip` on; gives its folder. The text tower keeps its fp16 values."""
    from transformers import CLIPModel

    folder = work / "clip-attributes-training"
    tokenizer = load_tokenizer(work / "tokenizer")
    model: CLIPModel = CLIPModel.from_pretrained(work / "clip", attn_implementation="eager")
    model.half().float()  # learn against the features that ship
    model.to(device()).train()
    model.text_model.requires_grad_(False)
    data = select(data)
    found = labels(data.facts)
    texts = _features(folder, model, tokenizer, data.facts, wordings)
    if not (folder / "state.safetensors").exists():
        _start(model, texts["every"], data.pixels, found)
    stage = Stage(folder, {"clip": model}, Frugal([model], lr=1e-3), steps, warmup=50,
                  cooldown=0.5, ema=0.998)  # fmt: skip
    mirrored = torch.tensor([_mirrored(f["caption"]) for f in data.facts])
    every, own = texts["every"].to(device()), texts["own"]

    def step(number: int) -> dict[str, torch.Tensor]:
        rows = np.fromiter(batches(len(data), batch, number, seed), np.int64)
        pixels = shift(to_tensor(data.pixels[rows]), number, seed)
        rng = np.random.default_rng([seed, number])
        flip = torch.from_numpy(rng.random(batch) < 0.5) & mirrored[rows]
        pixels[flip] = pixels[flip].flip(3)
        with torch.autocast(device().type, torch.bfloat16):
            pooled = model.vision_model(pixel_values=pixels.to(device())).pooler_output
            seen = model.visual_projection(pooled)
        seen = model.logit_scale.exp() * F.normalize(seen.float(), dim=-1)
        all_texts = model.text_projection(every[int(rng.integers(len(every)))])
        all_texts = F.normalize(all_texts, dim=-1)
        right = found[rows].to(seen.device)
        named = _named(seen @ all_texts.T, right)
        centred = _centred(seen, all_texts, right)
        told = F.normalize(model.text_projection(own[rows].to(seen.device)), dim=-1)
        logits, same = seen @ told.T, torch.arange(batch, device=seen.device)
        pairs = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        return {"loss": named + CENTRES * centred + OWN * pairs, "named": named.detach(),
                "centred": centred.detach(), "pairs": pairs.detach()}  # fmt: skip

    stage.run(step, batch)
    model.load_state_dict(stage.averaged("clip"))
    model.eval().save_pretrained(work / "clip")
    return work / "clip"


@torch.no_grad()
def accuracy(images: torch.Tensor, texts: torch.Tensor, found: torch.Tensor
             ) -> dict[str, dict[str, float]]:  # fmt: skip
    """Percent named right by attribute, in four ways of ranking.

    images [N, D] and texts [9600, D] are unit rows, found [N, 4] the right labels. `joint`: the
    best of all captions. `summed`: the word with the most probability over all captions, at a
    scale of 50. `centres`: against each word's mean caption. `given`: the other three told.
    """
    logits = (images @ texts.T).view(-1, *SHAPE)
    rows = torch.arange(len(found))
    best = torch.stack(torch.unravel_index(logits.flatten(1).argmax(1), SHAPE), 1)
    logp = (50 * logits).flatten(1).log_softmax(1).view(-1, *SHAPE)
    told: dict[str, dict[str, float]] = {"joint": {}, "summed": {}, "centres": {}, "given": {}}
    for axis, name in enumerate(WORDS):
        others = [i for i in range(len(SHAPE)) if i != axis]
        centres = F.normalize(texts.view(*SHAPE, -1).mean(others), dim=-1)
        at = tuple(slice(None) if i == axis else found[:, i] for i in range(len(SHAPE)))
        guesses = {
            "joint": best[:, axis],
            "summed": logp.logsumexp([i + 1 for i in others]).argmax(1),
            "centres": (images @ centres.T).argmax(1),
            "given": logits[(rows, *at)].argmax(1),
        }
        for way, guess in guesses.items():
            told[way][name] = round(100 * float((guess == found[:, axis]).float().mean()), 1)
    return told
