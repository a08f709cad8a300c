"""What the house promises of its own code, read from the files themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tunekit
from tunekit import adapters, families

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tunekit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MOST_LINES = 400
MOST_LINES_A_FUNCTION = 60


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < MOST_LINES, "a file this long is usually two ideas"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        # a function's options, one a line, are a list and not an idea
        and node.end_lineno - node.body[0].lineno >= MOST_LINES_A_FUNCTION
    ]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_swallowed_in_silence(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            silent = all(isinstance(child, ast.Pass | ast.Continue) for child in node.body)
            broad = caught in ("", "Exception", "BaseException")
            assert not (silent and broad), f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_pickle_is_ever_loaded(path: Path) -> None:
    """torch.load and the like run code that a file carries; safetensors and JSON do not."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for called, node in calls(tree):
        assert called not in ("eval", "exec", "torch.load", "torch.jit.load"), node.lineno
        if called in ("np.load", "numpy.load"):
            allowed = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert all(ast.unparse(k.value) == "False" for k in allowed), node.lineno


@pytest.mark.parametrize(
    ("package", "known"),
    [("families", families.names()), ("adapters", adapters.names())],
    ids=["families", "adapters"],
)
def test_a_family_or_kind_is_named_in_its_own_file_only(
    package: str, known: tuple[str, ...]
) -> None:
    """Adding one is adding one file, so no other file may know its name."""
    assert known
    words = set(known) - {"full"}  # that is a preset of targets too
    elsewhere = [p for p in SOURCES if p.parent != PACKAGE / package or p.stem not in known]
    for path in elsewhere:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in words:
                raise AssertionError(f"{name(path)}:{node.lineno} names {node.value!r}")
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert not re.search(rf"\b{package}\.({'|'.join(known)})\b", module), name(path)


@pytest.mark.parametrize("package", [families, adapters], ids=["families", "adapters"])
def test_the_name_of_the_file_is_the_registered_name(package: object) -> None:
    for known in package.names():  # type: ignore[attr-defined]
        assert package.get(known).__module__.rpartition(".")[2] == known  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="did you mean"):
        package.get(known + "x")  # type: ignore[attr-defined]


def test_every_file_has_a_line_in_its_map() -> None:
    """docs/architecture.md knows every module, the page of tunekit.data every file of it."""
    told = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"\b[a-z_]+\b", told))
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in SOURCES}
    unknown = modules - named - {"__init__", "__main__", "tunekit", "pretrain"}
    assert not unknown, f"docs/architecture.md says nothing of {sorted(unknown)}"
    files = {p.name for p in (PACKAGE / "data").glob("*.py")} - {"__init__.py"}
    listed = re.findall(
        r"^    (\w+\.py) ",
        ast.get_docstring(ast.parse((PACKAGE / "data" / "__init__.py").read_text()), clean=False)
        or "",
        re.MULTILINE,
    )
    assert sorted(listed) == sorted(files)
    gone = set(re.findall(r"\b(\w+)\.py\b", told)) - {p.stem for p in SOURCES}
    assert not gone, f"docs/architecture.md knows {sorted(gone)}, which are no more"


def test_dependencies_are_declared_pinned_and_used() -> None:
    project = PYPROJECT["project"]
    declared = [Requirement(line) for line in project["dependencies"]]
    pins = {
        canonicalize_name(pin.name): pin
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for pin in [Requirement(line)]
    }
    text = "\n".join(path.read_text() for path in SOURCES)
    modules = {"pillow": "PIL", "ruamel-yaml": "ruamel"}
    modules["scipy"] = "diffusers"  # which needs it for schedulers that we offer by name
    for requirement in declared:
        known = canonicalize_name(requirement.name)
        pin = pins[known]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} does not fit {requirement}"
        assert metadata.version(known).split("+")[0] == version, f"{pin} is not what is tested"
        module = modules.get(known, known).replace("-", "_")
        assert re.search(rf"\b{module}\b", text), f"{known} is not used"
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            assert canonicalize_name(Requirement(line).name) in pins, f"{extra}: {line}"
    first = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert first.startswith("torch=="), "torch comes first"


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    declared = {
        canonicalize_name(Requirement(r).name) for r in PYPROJECT["project"]["dependencies"]
    }
    providers = metadata.packages_distributions()
    undeclared = set()
    extra = PYPROJECT["project"]["optional-dependencies"]["quantize"]
    optional = {canonicalize_name(Requirement(r).name) for r in extra}
    for path in SOURCES:
        # Only what was quantised comes here, and `quantize.check` before it.
        known = declared | optional if path.stem in ("packed", "quantize") else declared
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module or "")
            for top in {module.split(".")[0] for module in modules} - {"tunekit"}:
                found = {canonicalize_name(d) for d in providers.get(top, [top])}
                if top not in sys.stdlib_module_names and not found & known:
                    undeclared.add(f"{name(path)}: {top}")
    assert not undeclared


def test_the_version_is_said_once() -> None:
    assert metadata.version("tunekit") == tunekit.__version__
    assert f"## [{tunekit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_brings_its_data() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["tunekit"]
    shipped = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert path in shipped, f"{name(path)} is no package data"


def test_public_names_are_there_and_documented() -> None:
    for public in tunekit.__all__:
        value = getattr(tunekit, public)
        assert public == "__version__" or value.__doc__
    with pytest.raises(AttributeError):
        _ = tunekit.nothing  # type: ignore[attr-defined]


def test_train_is_the_function_whatever_was_imported_before() -> None:
    script = (
        "import tunekit.train, tunekit.run, sys; import tunekit;"
        "assert callable(tunekit.train), tunekit.train;"
        "assert tunekit.train is sys.modules['tunekit.run'].train"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not text or ast.get_docstring(ast.parse(text)), name(path)


def test_no_two_test_files_have_one_name() -> None:
    """pytest refuses the second of them, and only where both are run at once."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
