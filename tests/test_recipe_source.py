"""A recipe as text: YAML held to its lines, files that extend others, paths, what is written."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
from good import GOOD, faults, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit.recipe import (
    RecipeError,
    dump_yaml,
    load_recipe,
    recipe_from,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a folder of pictures, a base and a recipe; the working directory is in it."""
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "recipes/bad.yaml: is empty"),
        ("- a\n", "recipes/bad.yaml: is not a recipe"),
        ("!other\nname: x\n", "recipes/bad.yaml: is not a recipe"),
        ("name: x\ntrain:\n\tsteps: 5\n", "recipes/bad.yaml:3: not YAML: holds a tab"),
        ("name: x\nbase: [\n", "recipes/bad.yaml:3: not YAML: "),
        ("name: 'x\n", "recipes/bad.yaml:2: not YAML: "),
        ("name: x\n---\nname: y\n", "recipes/bad.yaml:2: not YAML: "),
        ("name: x\nbase: \x07\n", "recipes/bad.yaml:2: not YAML: "),
        ("train:\n%YAML 9.9\n  steps: 2\n", "recipes/bad.yaml: says a version of YAML that is un"),
        ("[" * 5000, "recipes/bad.yaml: is nested too deeply"),
        ("- " * 5000, "recipes/bad.yaml: is nested too deeply"),
        ("name: &a [*a]\n", "recipes/bad.yaml:1: name.0.0: is too large or too deep"),
        ("# \n" * 30_000, "recipes/bad.yaml: is 90000 bytes; a recipe has at most"),
    ],
)
def test_text_that_is_no_recipe(folder: Path, text: str, says: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert found[0].startswith(says)


def test_aliases_cannot_blow_up(folder: Path) -> None:
    text = "a: &a [x, x, x, x, x, x, x, x]\n"
    for old, new in zip(string.ascii_lowercase, string.ascii_lowercase[1:10], strict=False):
        text += f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    assert "is too large or too deep" in faults(text)[0]


def test_keys_twice_tags_and_merge_keys_are_refused_with_their_line(folder: Path) -> None:
    found = faults(
        GOOD
        + "  steps: 5\n  steps: 6\n  seed: !!python/object/apply:os.system [true]\n"
        + "evaluate:\n  <<: {steps: 3}\n  steps: !!int five\n"
    )
    assert found == [
        "recipes/bad.yaml:13: train.steps: is written twice (first in line 12): keep one",
        'recipes/bad.yaml:14: train.seed: "!!python/object/apply:os.system" is refused: '
        "a recipe holds plain values only",
        "recipes/bad.yaml:16: evaluate: merge keys are not read here; "
        "`extends:` inherits from another recipe",
        'recipes/bad.yaml:17: evaluate.steps: "five" is no int',
    ]


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "recipes/latin.yaml").write_bytes("name: ü".encode("latin-1"))
    (folder / "recipes/bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(Path("recipes/bom.yaml")).name == "good"
    for name, says in (
        ("recipes/latin.yaml", "is not UTF-8 text (byte 6)"),
        ("recipes/goood.yaml", 'there is no such recipe (did you mean "good.yaml"?)'),
        ("recipes", "is a folder; a recipe is a .yaml file"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(name))
        assert str(caught.value) == f"{name}: {says}"


def test_extends_inherits_and_faults_name_the_file_of_the_key(folder: Path) -> None:
    (folder / "recipes/child.yaml").write_text(
        "extends: good.yaml\nname: child\ntrain:\n  steps: 8\nadapter: {rank: 2}\n"
    )
    child = load_recipe(Path("recipes/child.yaml"), ["train.batch_size=1"])
    assert (child.name, child.train.steps, child.train.batch_size) == ("child", 8, 1)
    assert child.train.learning_rate == 1e-4
    assert child.adapter.rank == 2  # type: ignore[attr-defined]

    (folder / "recipes/good.yaml").write_text(GOOD + "  stepz: 1\n")
    found = faults("extends: good.yaml\ntrain:\n  sed: 3\ndata:\n  trigger: 5\n")
    assert sorted(found, reverse=True) == [
        'recipes/good.yaml:12: train.stepz: unknown key (did you mean "steps"?)',
        'recipes/bad.yaml:5: data.trigger: must be text, not 5 (quote it: "5")',
        'recipes/bad.yaml:3: train.sed: unknown key (did you mean "seed"?)',
    ]


def test_held_out_pictures_of_another_subject_are_not_inherited(folder: Path) -> None:
    for name in ("apart", "others"):
        (folder / name).mkdir()
    whole = GOOD.replace("class: robot", "class: robot\n  holdout: apart")
    (folder / "recipes/whole.yaml").write_text(whole)
    child = "extends: whole.yaml\ndata:\n  source: more\n"
    says = (
        "data.source: is set here, but data.holdout is still that of other pictures "
        "(recipes/whole.yaml:8): set data.holdout to pictures of this subject kept apart, or to "
        "null"
    )
    assert faults(child) == [f"recipes/bad.yaml:3: {says}"]
    assert faults(whole, "data.source=more") == [
        f'override "data.source=more": {says.replace("whole", "bad")}'
    ]
    Path("recipes/child.yaml").write_text(child)
    grandchild = Path("recipes/grandchild.yaml")
    grandchild.write_text("extends: child.yaml\ndata: {holdout: others}\n")
    assert load_recipe(grandchild).data.holdout == "others"
    for own in ("holdout: others", "holdout: null"):
        Path("recipes/own.yaml").write_text(f"{child}  {own}\n")
        load_recipe(Path("recipes/own.yaml"))
    for value in ("others", "null"):
        overrides = [f"data.holdout={value}", "data.source=pictures"]
        load_recipe(Path("recipes/child.yaml"), overrides)


def test_extends_in_a_circle_or_to_nothing(folder: Path) -> None:
    (folder / "recipes/other.yaml").write_text("extends: bad.yaml\n")
    assert faults("extends: other.yaml\n") == [
        'recipes/other.yaml:1: extends: "bad.yaml" leads back here '
        "(bad.yaml -> other.yaml -> bad.yaml)"
    ]
    assert faults("extends: bad.yaml\n")[0].startswith("recipes/bad.yaml:1: extends: ")
    assert 'did you mean "good.yaml"?' in faults("name: x\nextends: goood.yaml\n")[0]
    assert "must be the name of another recipe file" in faults("extends: 5\n")[0]


def test_paths_are_found_from_the_working_directory_or_from_the_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_recipe(Path("recipes/good.yaml"))
    assert (here.data.source, here.base.model) == ("pictures", "model")

    elsewhere = folder / "more"
    monkeypatch.chdir(elsewhere)
    found = load_recipe(Path("../recipes/good.yaml"))
    assert found.data.source == str(folder / "pictures")
    assert found.base.model == str(folder / "model")

    run = folder / "runs/good"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_yaml(here))
    assert load_recipe(run / "recipe.yaml") == found, "a resolved recipe runs again from anywhere"

    (elsewhere / "pictures").mkdir()
    assert load_recipe(Path("../recipes/good.yaml")).data.source == "pictures"

    monkeypatch.chdir(folder.parent)
    inside = load_recipe(folder / "recipes/good.yaml")
    assert inside.data.source == f"{folder.name}/pictures"


def test_a_hub_id_is_left_alone(folder: Path) -> None:
    recipe = load_recipe(Path("recipes/good.yaml"), ["base.model=org/model-1.5"])
    assert recipe.base.model == "org/model-1.5"


@pytest.mark.parametrize("overrides", [[], ["train.steps=7", "adapter.rank=3", "data.flip=true"]])
def test_what_is_written_loads_to_the_same_recipe(folder: Path, overrides: list[str]) -> None:
    recipe = load_recipe(Path("recipes/good.yaml"), overrides)
    text = dump_yaml(recipe)
    Path("resolved.yaml").write_text(text)
    assert load_recipe(Path("resolved.yaml")) == recipe
    for section in (recipe.data, recipe.train, recipe.evaluate, recipe.export, recipe.adapter):
        for key in section.model_dump():
            assert re.search(rf"^  {key}:", text, re.MULTILINE), f"{key} is not written out"


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0, 10),
    gamma=st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
    negative=TEXT,
    caption=TEXT.map(lambda t: t.replace("{", "{{").replace("}", "}}") + "{trigger}"),
)
def test_any_value_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory,
    rate: float,
    gamma: float | None,
    seeds: list[int],
    negative: str,
    caption: str,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    recipe = recipe_from(
        {
            "name": "any",
            "base": {"model": "org/model"},
            "data": {
                "source": folder,
                "trigger": "zorp",
                "class": "robot",
                "captions": {"template": caption},
            },
            "adapter": {"kind": "lora"},
            "train": {"learning_rate": rate, "objective": {"min_snr_gamma": gamma}},
            "evaluate": {"seeds": seeds, "negative_prompt": negative},
        }
    )
    (folder / "any.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    assert load_recipe(folder / "any.yaml") == recipe


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200) | st.text("abc:-[]{}#&*!|>'\"%@`,? \n\t", max_size=80))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_recipe(path, [f"data.captions.template={text}"])
    except RecipeError as exc:
        assert exc.faults  # noqa: PT017 - any other exception fails the test
