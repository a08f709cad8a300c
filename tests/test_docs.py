"""What the documentation tells people to type is typed here, and what it shows is what comes out.

Blocks are fenced and say their language. A block of commands or a recipe that no rule covers fails.
Training is cut to seconds; a recipe that names models of the Hub is checked and not run, and the
page must say before it that something is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click import Group
from told import Typed

from tunekit.cli import app
from tunekit.recipe import Recipe, load_recipe
from tunekit.reference import markdown

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "datasets/README.md",
]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
LANGUAGES = {"bash", "console", "json", "python", "text", "yaml"}
SMALL = {
    "train.steps": "2",
    "train.batch_size": "1",
    "export.dtype": "fp32",  # two steps change some weights by less than fp16 can tell
    "evaluate.steps": "1",
    "evaluate.seeds": "[1]",
    "evaluate.prompts": '["a {trigger} {class} on the beach"]',
}
# Where a recipe draws pictures of the class.
FEW = {"data.prior.count": "2", "data.prior.steps": "1"}
VERBS: Group = typer.main.get_command(app)  # type: ignore[assignment]


@dataclass(frozen=True)
class Block:
    """A fenced block, and what the page says between its heading and it."""

    language: str
    text: str
    line: int
    before: str


def blocks(text: str) -> list[Block]:
    """Return a page's fenced blocks; code that stands in no fence is refused."""
    found: list[Block] = []
    said: list[str] = []
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if fence is None:
            assert not (line.startswith("    ") and said and not said[-1].strip()), (
                f"line {number}: put code into a fence"
            )
            said = [line] if line.startswith("#") else [*said, line]
            continue
        inside = []
        for _, line in lines:
            if line.strip() == "```":
                break
            inside.append(line.removeprefix(fence[1]))
        assert fence[2] in LANGUAGES, f"line {number}: say one of {sorted(LANGUAGES)}"
        found.append(Block(fence[2], "\n".join(inside) + "\n", number, "\n".join(said)))
        said.append("")
    return found


@pytest.fixture
def here(tmp_path: Path, run_cache: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder with the project's recipes and pictures, and pictures of one's own."""
    for name in ("recipes", "datasets", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pictures").symlink_to(ROOT / "datasets/zorp/train")
    (tmp_path / "pictures-kept-apart").symlink_to(ROOT / "datasets/zorp/held_out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Reader:
    """Someone who does what a page says, in order, in one folder."""

    folder: Path
    say: Typed
    trained: Path
    """Where runs are kept as they were made, for pages that say the same words again."""
    runs: dict[str, Recipe] = field(default_factory=dict)

    def follow(self, page: list[Block]) -> None:
        shown = "".join(block.text for block in page if block.language == "console")
        for block in page:
            if block.language == "bash":
                for command in commands(block.text):
                    self.type(command, block.before)
            elif block.language == "console":
                self.compare(block)
            elif block.language == "yaml":
                self.keep(block, shown)
            elif block.language == "python":
                exec(compile(block.text, "page", "exec"), {})
            elif block.language == "json":
                json.loads(block.text)

    def keep(self, block: Block, shown: str) -> None:
        """Save a recipe under its name; a part of one goes over the character's recipe."""
        named = re.match(r"# (\S+\.yaml)\n", block.text) or re.search(
            r"^name: (\S+)$", block.text, re.MULTILINE
        )
        name = named[1].removesuffix(".yaml") if named else f"part-{block.line}"
        text = block.text if named else f"extends: recipes/character-lora.yaml\n{block.text}"
        if not named:
            text = f"name: {name}\n{text}"
        (self.folder / f"{name}.yaml").write_text(text)
        if f"validate {name}.yaml" not in shown:  # else the page shows what comes out
            load_recipe(f"{name}.yaml")

    def compare(self, block: Block) -> None:
        """Type each ``$`` line and compare what comes out with what the page shows."""
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            words = shlex.split(command)
            assert words[0] == "tunekit", command
            said = self.say(*words[1:])
            assert said.out + said.err == expected, command

    def type(self, command: str, before: str) -> None:
        words = shlex.split(command, comments=True)
        if words[0] == "OMP_NUM_THREADS=1":  # the tests run with it anyway
            words = words[1:]
        program = words[0].removeprefix(".venv/bin/")
        if program == "tunekit":
            self.tunekit(words[1:], before)
        elif program == "make":
            make(words[1:])
        elif program in ("python", "python3"):
            self.python(words[1:])
        elif program == "pip":
            pip(words[1:])
        else:
            raise AssertionError(f"no rule covers this command: {command}")

    def tunekit(self, words: list[str], before: str) -> None:
        check_options(words)
        verb, *rest = words
        if verb == "train":
            self.train(rest, before)
            return
        if verb == "caption" and any(re.match(r"(model|clip)=[\w.-]+/", word) for word in rest):
            assert "download" in before, f"{words}: say that the model is downloaded"
            return
        if verb == "generate":
            rest = [self.checkpoint(rest, word) for word in rest] + ["--steps", "1", "--count", "1"]
        said = self.say(verb, *rest)
        assert said.code == 0, f"{words}: {said.out}{said.err}"

    def train(self, words: list[str], before: str) -> None:
        recipe, *rest = words
        overrides = [word for word in rest if re.match(r"\w+(\.\w+)+=", word)]
        options = [word for word in rest if word not in overrides]
        meant = load_recipe(recipe, overrides)
        judges = (meant.evaluate.clip, meant.evaluate.subject_encoder)
        remote = [m for m in (meant.base.model, *judges) if m != "toybox" and not Path(m).exists()]
        if remote:
            assert "download" in before, f"{recipe}: say that {remote} is downloaded"
            return
        less = SMALL | (FEW if meant.data.prior is not None else {})
        small = [word for word in overrides if word.partition("=")[0] not in less]
        small += [f"{key}={value}" for key, value in less.items()]
        folder = options[options.index("--out") + 1] if "--out" in options else f"runs/{meant.name}"
        self.runs[folder] = meant
        command = ("train", recipe, *small, *options, "--overwrite")
        known = repr((command, meant)).replace(str(self.folder), "")
        kept = self.trained / hashlib.sha256(known.encode()).hexdigest()
        if kept.exists() and not Path(folder).exists():
            shutil.copytree(kept, folder)
            return
        said = self.say(*command)
        assert said.code == 0, said.out + said.err
        assert (self.folder / folder / "report.html").is_file()
        shutil.copytree(folder, kept, dirs_exist_ok=True)

    def checkpoint(self, words: list[str], word: str) -> str:
        """Return the last checkpoint of the small run for one that the meant run would have."""
        if words[max(words.index(word) - 1, 0)] != "--checkpoint":
            return word
        run = words[words.index("--run") + 1]
        train = self.runs[run].train
        assert int(word.removeprefix("step-")) % train.checkpoint_every == 0, word
        assert int(word.removeprefix("step-")) <= train.steps, word
        return "step-000002"

    def python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "venv"]:
            assert words[2:] == [".venv"], words
        elif words[:2] == ["-m", "tunekit.toybox.pretrain"]:
            from tunekit.toybox.pretrain.__main__ import _arguments

            _arguments(words[2:])
        elif words == ["-m", "tunekit.toybox.bundle"]:
            from tunekit.toybox import bundle

            bundle.main(self.folder / "drawn")
            assert len(list((self.folder / "drawn/zorp/train").glob("*.png"))) == 8
        elif words[:2] == ["-m", "pytest"]:
            files = [word for word in words[2:] if not word.startswith("-")]
            assert files
            assert all((ROOT / file).is_file() for file in files), files
        elif words[0].startswith("benchmarks/"):
            program = (ROOT / words[0]).read_text()
            assert all(f'"{word}"' in program for word in words[1:] if word.startswith("--")), words
        else:
            raise AssertionError(f"no rule covers this command: python {shlex.join(words)}")


def commands(text: str) -> list[str]:
    """Return the commands of a block: a line each, comments and ends with a backslash apart."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check_options(words: list[str]) -> None:
    """Refuse a verb or an option that `tunekit` does not have."""
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version"), words
        return
    assert words[0] in VERBS.commands, f"there is no verb {words[0]}"
    verb = VERBS.commands[words[0]]
    if hasattr(verb, "commands"):  # a verb of verbs, such as cache; `runs` alone lists
        inner = words[1] if words[1:] and words[1] in verb.commands else "list"
        assert inner in verb.commands, f"there is no such verb: {words}"
        verb = verb.commands[inner]
    known = {name for option in verb.params for name in option.opts}
    for word in words[1:]:
        assert not word.startswith("--") or word in known | {"--help"}, f"{words[0]} has no {word}"


def make(targets: list[str]) -> None:
    told = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def pip(words: list[str]) -> None:
    """What a page installs is what the Makefile installs: with these constraints, torch first."""
    assert words[:3] == ["install", "-c", "constraints.txt"], words
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert words[3:] in (["-e", "."], *([name] for name in pinned)), words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def reader(here: Path, typed: Typed, trained: Path) -> Reader:
    return Reader(here, typed, trained)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.timeout(600)  # several small runs, one after the other, on a machine that may be busy
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_says_can_be_done(page: Path, reader: Reader) -> None:
    reader.follow(blocks(page.read_text()))
    if page.name == "report.md":
        scores = json.loads((reader.folder / "runs/character-lora/scores.json").read_text())
        assert sorted(documented(page.read_text())) == sorted(set(leaves(scores)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_opens_with_commands_that_work(recipe: Path, reader: Reader) -> None:
    text = recipe.read_text()
    opening = text[: text.index("\n\n")]
    found = re.findall(r"^#\s*(?:.*:\s+)?(tunekit .*)$", opening, re.MULTILINE)
    assert found[0] == f"tunekit train {name(recipe)}"
    for command in found:
        reader.type(command, opening)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_a_sentence_exist(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        words = code.split()
        program = words[0].removeprefix(".venv/bin/")
        if program == "tunekit" and len(words) > 1:
            check_options(words[1:])
        elif program == "make" and len(words) > 1:
            make(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]), code


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_page_of_keys_is_up_to_date() -> None:
    """Every key, with its range and default, is told by the schema itself."""
    _, _, printed = (ROOT / "docs/recipe.md").read_text().partition("<!-- generated")
    assert printed.partition("-->\n\n")[2] == markdown(), "run: make schema"


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of a JSON value's fields, lists of objects as ``[]``."""
    if isinstance(value, dict) and path not in ("run.seconds", "run.versions"):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path


def documented(text: str) -> Iterator[str]:
    """Yield the fields that the tables of a page tell of: a head such as `run.` goes before."""
    prefix = ""
    lines = text[text.index("## scores.json") :].splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith("| "):
            continue
        names = re.findall(r"`([^`]+)`", line.split("|")[1])
        if below.startswith("|---"):
            prefix = names[0] if names else ""
        else:
            yield from (prefix + field for field in names)


def test_code_out_of_a_fence_and_unknown_commands_are_noticed(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="line 3: put code into a fence"):
        blocks("Do:\n\n    tunekit validate x.yaml\n")
    with pytest.raises(AssertionError, match="say one of"):
        blocks("```\ntunekit validate x.yaml\n```\n")
    for command in ("curl x", "python -m tunekit.paint", "tunekit paint", "tunekit info --loud"):
        with pytest.raises(AssertionError, match=r"no rule|no verb|has no"):
            reader.type(command, "")
    reader.type("python -m tunekit.toybox.pretrain --only unet --steps 5", "")
    with pytest.raises(SystemExit):
        reader.type("python -m tunekit.toybox.pretrain --only everything", "")
    with pytest.raises(AssertionError, match="is downloaded"):
        reader.type("tunekit train recipes/style-lora.yaml base.model=a/b", "Train it:")
