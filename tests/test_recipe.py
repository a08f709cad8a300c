"""A recipe is read whole, and refused whole: every fault, with its place and its remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from good import GOOD, faults, fill

from tunekit import adapters, recipe_source
from tunekit.recipe import (
    Recipe,
    RecipeError,
    dump_yaml,
    json_schema,
    load_recipe,
    recipe_from,
)

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a folder of pictures, a base and a recipe; the working directory is in it."""
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def test_a_good_recipe_has_its_values_and_defaults(folder: Path) -> None:
    recipe = load_recipe(folder / "recipes/good.yaml")
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data.class_noun == "robot"
    assert recipe.adapter.kind == "lora"
    assert recipe.train.steps == 400
    assert recipe.train.sample_every == 100
    assert recipe.evaluate.prompts[0] == "a {trigger} {class}"


def test_every_fault_at_once_with_line_value_and_remedy(folder: Path) -> None:
    found = faults(
        """\
name: my run
base:
  model: model
  dtyp: fp16
data:
  source: picturez
  trigger: zorp
  class: robot
  flip: yes
adapter:
  kind: lora
  rank: 0
  targets: 5
train:
  stepz: 100
  lr: 1e-4
  batch_size: "8"
  optimizer: adam
  objective: {min_snr_gamma: .inf}
  betas: [0.9]
evaluate:
  prompts: []
  seeds: [1, x]
  scheduler: eulr
colour: blue
"""
    )
    expected = [
        r'bad.yaml:1: name: "my run" is not allowed: .*Letters, digits',
        r'bad.yaml:4: base.dtyp: unknown key \(did you mean "dtype"\?\)',
        r'bad.yaml:6: data.source: there is no folder or file "picturez" \(looked for /.*\)',
        r'bad.yaml:9: data.flip: must be true or false, not "yes" \(write true\)',
        r"bad.yaml:12: adapter.rank: must be at least 1 and at most 1024, not 0",
        r"bad.yaml:13: adapter.targets: must be attention, .* or a list, not 5",
        r'bad.yaml:15: train.stepz: unknown key \(did you mean "steps"\?\)',
        r'bad.yaml:16: train.lr: unknown key \(did you mean "learning_rate"\?\)',
        r'bad.yaml:17: train.batch_size: must be a whole number, not "8" \(without the quotes: 8\)',
        r'bad.yaml:18: train.optimizer: must be adamw, .* not "adam" \(did you mean "adamw"\?\)',
        r"bad.yaml:19: train.objective.min_snr_gamma: must be a finite number, not Infinity",
        r"bad.yaml:20: train.betas: has too few items: \[0.9\]",
        r"bad.yaml:22: evaluate.prompts: must not be empty",
        r'bad.yaml:23: evaluate.seeds.1: must be a whole number, not "x"',
        r'bad.yaml:24: evaluate.scheduler: must be ddim, .*not "eulr" \(did you mean "euler"\?\)',
        r"bad.yaml:25: colour: unknown key; known here: name, base, data,",
    ]
    assert len(found) == len(expected), "\n".join(found)
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(f"recipes/{pattern}", line), f"{line}\ndoes not say\n{pattern}"


def test_missing_keys_are_named_where_their_section_stands(folder: Path) -> None:
    found = faults("name: x\nbase:\n  model: model\ndata:\n  source: pictures\nadapter: {}\n")
    assert [line.split(": ", 2)[:2] for line in found] == [
        ["recipes/bad.yaml:4", "data.trigger"],
        ["recipes/bad.yaml:4", "data.class"],
        ["recipes/bad.yaml:6", "adapter.kind"],
    ]
    assert "is missing: The new word that will call the subject" in found[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train: {steps: 10, warmup_steps: 10}", "train.warmup_steps: 10 is not fewer than steps"),
        ("train: {steps: 10, sample_every: 11}", "train.sample_every: 11 is more than steps (10)"),
        ("train: {steps: 10, checkpoint_every: 11}", "train.checkpoint_every: 11 is more than"),
        (
            "train: {text_encoder_learning_rate: 1e-5}",
            "train.text_encoder_learning_rate: is set, but the adapter trains no text encoder",
        ),
        ("evaluate: {prompts: [a robot]}", 'evaluate.prompts: "a robot" lacks {trigger}'),
        ("evaluate: {prompts: ['{trigger} {x}']}", "evaluate.prompts.0: "),
        (
            "evaluate: {negative_prompt: blur, guidance_scale: 1}",
            "evaluate.negative_prompt: does nothing at guidance_scale 1: set that above 1",
        ),
        ("evaluate: {seeds: [3, 3]}", "evaluate.seeds: 3 stands there more than once"),
    ],
)
def test_contradictions_between_keys(folder: Path, line: str, says: str) -> None:
    text = GOOD[: GOOD.index("train:")] + line + "\n"
    assert [f"recipes/bad.yaml:10: {says}" in found for found in faults(text)] == [True]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("class: robot", "class: zorp", '7: data.class: "zorp" is the trigger as well'),
        ("class: robot", "class: robot\n  holdout: pictures", "8: data.holdout: "),
        ("class: robot", "class: robot\n  holdout: .", '8: data.holdout: "." overlaps with data'),
        ("class: robot", "class: robot\n  captions: {template: a robot}", "8: data.captions: "),
        (
            "class: robot",
            "class: robot\n  resolution: 60",
            "8: data.resolution: must be a multiple of 8 for model, not 60",
        ),
        ("model: model", "model: model\n  family: sdd", "4: base.family: must be "),
        ("model: model", "model: pictures", "3: base.model: pictures: is no diffusers model"),
        ("model: model", "model: toybx", '3: base.model: there is no folder "toybx" (looked'),
        ("model: model", "model: ./org/model", '3: base.model: there is no folder "./org/model"'),
        (
            "source: pictures",
            "source: recipes/good.yaml",
            "holds no pictures; give a folder, a .parquet file or a .tar",
        ),
    ],
)
def test_contradictions_with_what_is_on_the_disk(
    folder: Path, old: str, new: str, says: str
) -> None:
    found = faults(GOOD.replace(old, new))
    assert len(found) == 1
    assert says in found[0]


def test_overrides_obey_the_same_rules_and_are_named(folder: Path) -> None:
    found = faults(
        GOOD,
        "train.stepz=5",
        "adapter.rank=many",
        "data.captions.template=",
        "nonsense",
        "train.seed=1",
        "train.seed=2",
        "extends=x.yaml",
        "evaluate.prompts=[a",
        "train.betas=[0.9, 2]",
        "name=<<",
    )
    assert set(found) == {
        'override "name=<<": name: "!!merge" is refused: a recipe holds plain values only',
        'override "train.stepz=5": train.stepz: unknown key (did you mean "steps"?)',
        'override "adapter.rank=many": adapter.rank: must be a whole number, not "many"',
        'override "data.captions.template=": data.captions.template: must not be empty',
        'override "nonsense": is not KEY=VALUE, such as train.steps=500',
        'override "train.seed=2": contradicts override "train.seed=1": give the key once',
        'override "extends=x.yaml": extends stands in recipe files only',
        "override \"evaluate.prompts=[a\": not YAML: expected ',' or ']', but got '<stream end>'",
        'override "train.betas=[0.9, 2]": train.betas.1: must be below 1, not 2',
    }


def test_a_number_that_is_none_gets_no_hint_to_write_it_without_quotes(folder: Path) -> None:
    for text in ("nan", "inf", "-inf"):
        assert faults(GOOD, f"train.learning_rate={text}") == [
            f'override "train.learning_rate={text}": train.learning_rate: must be a number, '
            f'not "{text}"'
        ]


def test_a_key_of_another_section_comes_before_a_word_that_is_near(folder: Path) -> None:
    assert faults(GOOD, "train.resolution=64")[0].endswith('(did you mean "data.resolution"?)')


def test_overrides_take_numbers_lists_sections_and_plain_text(folder: Path) -> None:
    recipe = load_recipe(
        folder / "recipes/good.yaml",
        [
            "train.learning_rate=3e-4",
            "train.betas=[0.8, 0.9]",
            "adapter={rank: 4, alpha: 2}",
            "data.captions.template={trigger} {class} # 1: of its kind",
            "evaluate.negative_prompt=",
            "data.trigger='007'",
            "train.objective.min_snr_gamma=null",
        ],
    )
    assert recipe.train.learning_rate == 3e-4
    assert recipe.train.betas == (0.8, 0.9)
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (4, 2)  # type: ignore[attr-defined]
    assert recipe.data.captions.template == "{trigger} {class} # 1: of its kind"
    assert recipe.evaluate.negative_prompt == ""
    assert recipe.data.trigger == "007"


def test_from_python(folder: Path) -> None:
    recipe = recipe_from(
        {
            "name": "python",
            "base": {"model": "model"},
            "data": {"source": Path("pictures"), "trigger": "zorp", "class": "robot"},
            "adapter": {"kind": "lora", "rank": 8},
            "train": {"betas": (0.8, 0.9)},
        },
        ["train.steps=3"],
    )
    assert isinstance(recipe, Recipe)
    assert recipe.train.steps == 3
    assert recipe_from(recipe) == recipe
    assert recipe_from(recipe, ["adapter.rank=4"]).adapter.rank == 4  # type: ignore[attr-defined]
    assert recipe_from("recipes/good.yaml").name == "good"
    assert recipe_from("recipes/good.yaml", "train.steps=3").train.steps == 3
    for wrong in ({"train.steps": 3}, [{"train.steps": 3}], [3]):
        with pytest.raises(RecipeError, match=r'^overrides: must be texts such as \["train.st.*$'):
            recipe_from(recipe, wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"^recipe: adapter.kind: must be .*not \"lorra\""):
        recipe_from({**recipe.model_dump(), "adapter": {"kind": "lorra"}})


TOY = """
from typing import Literal
from pydantic import Field
from tunekit.adapters.base import Adapter
from tunekit.schema import AdapterSettings, also

class ToySettings(AdapterSettings):
    kind: Literal["toy"] = Field("toy", description="A toy.")
    bricks: int = Field(2, ge=1, description="Bricks.", json_schema_extra=also("blocks"))

class Toy(Adapter):
    Settings = ToySettings
"""


def test_an_adapter_kind_is_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(folder)])
    recipe = load_recipe(Path("recipes/good.yaml"), ["adapter.kind=toy", "adapter.bricks=5"])
    assert recipe.adapter.bricks == 5  # type: ignore[attr-defined]
    assert "  bricks: 5\n" in dump_yaml(recipe)
    assert "ToySettings" in json_schema()["$defs"]
    text = GOOD.replace("kind: lora", "kind: toy\n  blocks: 3\n  bricks: 0")
    assert faults(text) == [
        'recipes/bad.yaml:10: adapter.blocks: unknown key (did you mean "bricks"?)',
        "recipes/bad.yaml:11: adapter.bricks: must be at least 1, not 0",
    ]


def test_words_of_other_trainers_lead_to_ours(folder: Path) -> None:
    theirs = {
        "max_train_steps": "train.steps",
        "train_batch_size": "train.batch_size",
        "network_dim": "rank",
        "mixed_precision": "train.precision",
        "instance_data_dir": "data.source",
        "pretrained_model_name_or_path": "base.model",
        "lr_warmup_steps": "train.warmup_steps",
        "validation_prompt": "evaluate.prompts",
        "checkpointing_steps": "train.checkpoint_every",
    }
    found = faults(GOOD + "".join(f"{word}: 1\n" for word in theirs))
    for line, (word, ours) in zip(found, theirs.items(), strict=True):
        assert f" {word}: unknown key (did you mean " in line
        assert f'{ours}"?)' in line


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = path.relative_to(ROOT)
    text = path.read_text()
    assert text.startswith(f"# tunekit train {name}\n"), "opens with its command"
    assert "# yaml-language-server: $schema=schema.json\n" in text
    assert load_recipe(name).name == path.stem
    values = recipe_source.from_file(name).tree
    jsonschema.validate(values, json_schema(), jsonschema.Draft202012Validator)


def test_the_schema_on_disk_is_the_schema() -> None:
    on_disk = json.loads((ROOT / "recipes/schema.json").read_text())
    assert on_disk == json_schema(), "run: make schema"


def test_the_schema_describes_every_key_and_refuses_what_we_refuse() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, key
    good = {
        "name": "x",
        "base": {"model": "toybox"},
        "data": {"source": "p", "trigger": "zorp", "class": "robot"},
        "adapter": {"kind": "lora"},
    }
    assert validator.is_valid(good)
    assert validator.is_valid({"extends": "x.yaml"})
    for wrong in (
        {**good, "trainn": {}},
        {**good, "train": {"steps": 0}},
        {**good, "data": {"source": "p"}},
        {**good, "adapter": {"kind": "lora", "rank": "x"}},
        {key: value for key, value in good.items() if key != "base"},
    ):
        assert not validator.is_valid(wrong), wrong


NESTED = """
name: nested
base: {model: org/model}
data:
  source:
    - pictures
    - {path: pictures, repeets: 2}
    - {path: pictures, repeats: 0}
    - {dataset: owner/name, path: pictures}
    - picturez/more
  trigger: zorp
  class: robot
  caption_dropout: 0.1
  resolution: [64, 8]
  captions: {shufle: true, keep_tokens: 1}
  buckets: {min_bucket_reso: 64}
  prior: {prompts: ["a {trigger} robot"], source: nowhere}
adapter: {kind: lora}
"""


def test_sections_inside_sections_are_held_to_the_same_rules(folder: Path) -> None:
    found = faults(NESTED)
    at = "recipes/bad.yaml"
    for says in (
        f'{at}:7: data.source.1.repeets: unknown key (did you mean "repeats"?)',
        f"{at}:8: data.source.2.repeats: must be at least 1 and at most 10000, not 0",
        f"{at}:9: data.source.3: needs `path` (on this disk) or `dataset` (on the Hub), one of",
        f'{at}:10: data.source.4: there is no folder or file "picturez/more"',
        f'{at}:13: data.caption_dropout: unknown key (did you mean "data.captions.dropout"?)',
        f"{at}:14: data.resolution.1: must be at least 16, not 8",
        f'{at}:15: data.captions.shufle: unknown key (did you mean "shuffle"?)',
        f'{at}:16: data.buckets.min_bucket_reso: unknown key (did you mean "min"?)',
        f'{at}:17: data.prior.prompts.0: "a {{trigger}} robot" holds {{trigger}}',
        f'{at}:17: data.prior.source: there is no folder "nowhere"',
    ):
        assert [line for line in found if line.startswith(says)], (says, found)
    assert len(found) == 10, found


def test_sources_of_pictures_are_found_from_the_recipe(folder: Path) -> None:
    recipe = load_recipe(
        Path("recipes/good.yaml"), ["data.source=[pictures, {path: pictures, repeats: 3}]"]
    )
    assert [(part.path, part.repeats) for part in recipe.data.sources] == [
        ("pictures", 1), ("pictures", 3),
    ]  # fmt: skip


def test_a_path_with_a_typing_error_is_not_taken_for_a_hub_id(folder: Path) -> None:
    (folder / "models").mkdir()
    (line,) = faults(GOOD.replace("model: model", "model: models/sd15"))
    assert 'base.model: there is no folder "models/sd15"' in line
