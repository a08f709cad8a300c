"""What an exported adapter says about itself: the file's metadata and the model card beside it.

Neither holds a path of this machine or a secret: both travel with the file.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import tunekit
from tunekit import hub
from tunekit.data.captions import expand
from tunekit.lesson import Lesson as Lesson
from tunekit.lesson import hashes as hashes
from tunekit.redaction import without_secrets as without_secrets
from tunekit.schema import BUNDLED

if TYPE_CHECKING:
    from tunekit.recipe import Recipe

_MODELSPEC = "1.0.1"  # https://github.com/Stability-AI/ModelSpec


@dataclass(frozen=True)
class Plain:
    """What people who draw with plain diffusers have to know of the base.

    pipeline: its class. encoders: text encoder -> what a file of a word calls its vectors, where
    there are several. lacks: what the pipeline could have and the base has not.
    """

    pipeline: str = "StableDiffusionPipeline"
    encoders: Mapping[str, str] = field(default_factory=dict)
    lacks: Sequence[str] = ()


def file_metadata(
    recipe: Recipe,
    facts: Mapping[str, str],
    described: Mapping[str, str],
    resolution: int,
    lesson: Lesson | None = None,
    method: str = "/lora",
) -> dict[str, str]:
    """Return an adapter file's metadata: strings, as safetensors wants them.

    facts: what the family says of the base. described: what the adapter says of its tensors.
    resolution: edge of the training pictures in pixels. method: what the specification puts behind
    the architecture; it has one word for every kind of adapter.
    """
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    name, train = base_name(recipe), recipe.train
    architecture = f"{facts.get('modelspec.architecture', 'unknown')}{method}"
    metadata = {
        **facts,
        **described,
        "modelspec.sai_model_spec": _MODELSPEC,
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": recipe.data.trigger,
        "modelspec.date": now.isoformat(),
        "ss_output_name": recipe.name,
        "ss_sd_model_name": name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_learning_rate": str(train.learning_rate),
        "ss_max_train_steps": str(train.steps),
        "ss_seed": str(train.seed),
        "ss_training_comment": f"trained with tunekit {tunekit.__version__}",
        "tunekit.version": tunekit.__version__,
        "tunekit.base": name,
    }
    if recipe.export.license is not None:
        metadata["modelspec.license"] = recipe.export.license
    clean = {key: without_secrets(text) for key, text in metadata.items()}
    # Cleaned value by value, because what is cut from JSON as a text may be no JSON afterwards.
    clean |= (lesson or Lesson()).facts(recipe.name)
    clean["tunekit.recipe"] = json.dumps(travelling(recipe), ensure_ascii=False, sort_keys=True)
    return dict(sorted(clean.items()))


def travelling(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as JSON values, fit to leave this machine.

    Of a path only the last name is left; what looks like a secret is replaced.
    """
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    tree["base"]["model"] = base_name(recipe)
    cleaned = _clean(tree)
    assert isinstance(cleaned, dict)
    return cleaned


def base_name(recipe: Recipe) -> str:
    """Return the base as others can name it: a Hub id as it is, a folder by its last name."""
    return portable(recipe.base.model)


def portable(model: str) -> str:
    """Return a model's Hub id as it is, and only the last name of a path.

    A relative path of two names reads like a Hub id; what stands on this disk is a path.
    """
    if hub.is_id(model) and not Path(model).exists():
        return model
    return _last_name(model)


def _last_name(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name or path


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return _clean_text(value) if isinstance(value, str) else value


def _clean_text(text: str) -> str:
    """Cut a path down to its last name; leave prompts, names and Hub ids as they are."""
    is_path = (
        text.startswith(("/", "~", "./", "../", "\\\\"))
        or re.match(r"[A-Za-z]:[\\/]", text) is not None
        or ("/" in text and " " not in text and "://" not in text and Path(text).exists())
    )
    return without_secrets(_last_name(text) if is_path else text)


def model_card(
    recipe: Recipe,
    files: Sequence[tuple[str, str]],
    resolution: int,
    scores: Mapping[str, str] | None = None,
    diffusers: bool = True,
    words: Sequence[tuple[str, str]] = (),
    plain: Plain | None = None,
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the card (Markdown with Hugging Face's front matter) for an export folder.

    files: (file name, what it is) in order of recommendation. resolution: edge in pixels.
    scores: what to print in the table of scores, by its name; None where nothing was measured.
    diffusers: whether diffusers' own loaders read the first file and those of words. words: new
    words, and the files among `files` that hold them. plain: what diffusers needs to be told of
    the base. pictures: (prompt, file beside the card) of what was drawn with it.
    """
    assert files
    plain = plain or Plain()
    base, data = base_name(recipe), recipe.data
    prompt = expand((), data)[0]
    tags = ["text-to-image", "diffusers", "tunekit"]
    tags += [recipe.adapter.kind] if recipe.adapter is not None else []
    tags += ["textual_inversion"] if words else []
    tags += ["template:sd-lora"] if diffusers and recipe.adapter is not None else []
    front = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if hub.is_id(base) else []),
        *(["base_model_relation: adapter"] if hub.is_id(base) else []),
        *([f"license: {json.dumps(recipe.export.license)}"] if recipe.export.license else []),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"instance_prompt: {json.dumps(prompt, ensure_ascii=False)}",
        f"tags: [{', '.join(tags)}]",
        *(["widget:"] if pictures else []),
        *(line for shown in pictures for line in _widget(*shown)),
        "---",
    ]
    what = "style" if recipe.evaluate.kind == "style" else "subject"
    body = [
        f"# {recipe.name}",
        f"Teaches `{base}` one {what}: `{data.trigger}`, a {data.class_noun}. "
        f"Say `{data.trigger}` in a prompt to call it, as in `{prompt}`.",
        "\n".join(["| file | what it is |", "|---|---|", *(f"| `{f}` | {w} |" for f, w in files)]),
        "## Drawing with it",
        _usage(recipe, files[0][0], prompt, resolution, diffusers, words, plain),
        "## How it was made",
        _settings(recipe, resolution),
        "## How good it is",
        _scores(scores),
    ]
    text = "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"
    return without_secrets(text)


def _widget(prompt: str, file: str) -> list[str]:
    text = json.dumps(prompt, ensure_ascii=False)
    return [f"- text: {text}", "  output:", f"    url: {json.dumps(file)}"]


def _usage(
    recipe: Recipe,
    file: str,
    prompt: str,
    resolution: int,
    diffusers: bool,
    words: Sequence[tuple[str, str]],
    plain: Plain,
) -> str:
    base = base_name(recipe)
    bundled = recipe.base.model == BUNDLED
    where = json.dumps(base if bundled or hub.is_id(base) else f"path/to/{base}")
    together = [name for _, name in words]
    if recipe.adapter is not None:
        together.insert(0, file)
    if diffusers:
        code = _by_diffusers(recipe, base, where, (file, words), prompt, resolution, plain)
    else:
        said = json.dumps(prompt, ensure_ascii=False)
        given = json.dumps(together[0] if len(together) == 1 else together)
        code = ["import tunekit", "", f"painter = tunekit.load({where}, {given})"]
        code += [f"picture = painter.draw({said}, seed=1)"]
    given = " ".join(f"--adapter {name}" for name in together)
    shell = f'tunekit generate {given} --prompt "{prompt}"'
    shown = "\n".join(["```python", *code, "```", "", "or", "", "```sh", shell, "```"])
    if words:
        shown += (
            "\n\nIn ComfyUI, A1111 and Forge a word's file belongs among the embeddings, and is "
            "called by the file's name, which you may change."
        )
    if diffusers:
        return shown
    what = "new words of this base" if words else recipe.adapter.kind if recipe.adapter else ""
    return f"{shown}\n\ndiffusers has no loader for {what}; ComfyUI reads the files as they are."


def _by_diffusers(
    recipe: Recipe,
    base: str,
    where: str,
    files: tuple[str, Sequence[tuple[str, str]]],
    prompt: str,
    resolution: int,
    plain: Plain,
) -> list[str]:
    """Return the lines that draw with plain diffusers."""
    settings, bundled = recipe.evaluate, recipe.base.model == BUNDLED
    if bundled:
        where = "tunekit.toybox.model_path()"
    # A folder says itself which pipeline it is for, a single file does not.
    pipeline, load = "DiffusionPipeline", "from_pretrained"
    if base.endswith(".safetensors"):
        pipeline, load = plain.pipeline, "from_single_file"
    without = "".join(f", {name}=None" for name in plain.lacks)
    file, words = files
    loaded = [line for word, name in words for line in _word_by_diffusers(word, name, plain)]
    if recipe.adapter is not None:
        loaded.insert(0, f'pipe.load_lora_weights(".", weight_name={json.dumps(file)})')
    imports = ["import torch", f"from diffusers import {pipeline}"]
    imports += ["from safetensors.torch import load_file"] if words and plain.encoders else []
    imports += ["import tunekit.toybox"] if bundled else []
    return [
        *imports,
        "",
        f"pipe = {pipeline}.{load}({where}{without})",
        *loaded,
        "picture = pipe(",
        f"    {json.dumps(prompt, ensure_ascii=False)},",
        f"    num_inference_steps={settings.steps},",
        f"    guidance_scale={settings.guidance_scale},",
        f"    height={resolution},",
        f"    width={resolution},",
        *([f"    clip_skip={recipe.base.clip_skip},"] if recipe.base.clip_skip else []),
        "    generator=torch.Generator().manual_seed(1),",
        ").images[0]",
    ]


def _word_by_diffusers(word: str, file: str, plain: Plain) -> list[str]:
    """Return the lines that load a word; of several text encoders diffusers takes one at a time."""
    if not plain.encoders:
        return [f"pipe.load_textual_inversion({json.dumps(file)})"]
    lines = [f"word = load_file({json.dumps(file)})"]
    for encoder, key in plain.encoders.items():
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        lines += [
            "pipe.load_textual_inversion(",
            f'    word["{key}"], token={json.dumps(word, ensure_ascii=False)},',
            f"    text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer},",
            ")",
        ]
    return lines


def methods(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (what, how) for all that trains: the adapter, and each new word."""
    rows = []
    if recipe.adapter is not None:
        settings = recipe.adapter.model_dump(mode="json", exclude_defaults=True)
        own = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "kind")
        rows.append(("method", f"{recipe.adapter.kind}{f' ({own})' if own else ''}"))
    for token in recipe.tokens:
        settings = token.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
        settings.setdefault("vectors", token.vectors)
        settings["init"] = _clean_text(token.init or recipe.data.class_noun)
        own = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append(("new word", f"{token.name} ({own})"))
    return rows


def _settings(recipe: Recipe, resolution: int) -> str:
    train = recipe.train
    # The files of words say their own format: it is always fp32.
    stored = f", stored as {recipe.export.dtype}" if recipe.adapter is not None else ""
    said = {
        "CLIP skip": recipe.base.clip_skip,
        "VAE": recipe.base.vae and _last_name(recipe.base.vae),
        "the base predicts": recipe.base.prediction,
        "the base starts from pure noise": recipe.base.zero_terminal_snr,
    }
    rows = [
        *methods(recipe),
        *((key, str(value)) for key, value in said.items() if value is not None),
        ("steps", f"{train.steps} of {train.batch_size * train.gradient_accumulation} pictures"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}"),
        ("resolution", f"{resolution} pixels"),
        ("precision", f"trained in {train.precision}{stored}"),
        ("seed", str(train.seed)),
        ("made with", f"tunekit {tunekit.__version__}"),
    ]
    table = "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)])
    return f"{table}\n\nThe whole recipe is in the file's metadata: `tunekit info --json FILE`."


def _scores(scores: Mapping[str, str] | None) -> str:
    if not scores:
        return "Not measured. That the file loads and draws what was trained has been verified."
    return "\n".join(
        ["| score | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in scores.items())]
    )
