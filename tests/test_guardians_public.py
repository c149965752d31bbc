"""What users call: public names are there and documented, `--help` is quick, flags are frozen.

After a wanted change of the flags: `python tests/test_guardians_public.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from packaging.version import Version
from typer.testing import CliRunner

import motionmerge
from motionmerge.cli import VERBS, app

PACKAGE = Path(motionmerge.__file__).parent
FLAGS = Path(__file__).parent / "data" / "cli_flags.txt"


@pytest.mark.parametrize("name", motionmerge.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(motionmerge, name)
    assert name in dir(motionmerge)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        motionmerge.mergee  # noqa: B018 (the access is the test)


def imported_for_types() -> dict[str, str]:
    """The names in the `if TYPE_CHECKING` block of the package, with the modules they are from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: f"{node.module}" for node in block.body for alias in node.names}


def test_type_checkers_see_the_public_names_that_python_sees():
    homes = {
        name: f"motionmerge.{module}"
        for module, names in motionmerge._NAMES.items()
        for name in names
    }
    assert imported_for_types() == homes


ROOT = PACKAGE.parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_use_public_names_alone(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("motionmerge"):
            assert node.module == "motionmerge", f"{path.name}:{node.lineno}"


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {motionmerge.__version__}\n" in citation
    assert re.search(r'^dynamic = \["version"\]', (ROOT / "pyproject.toml").read_text(), re.M)


def pins(file: str, pattern: str) -> dict[str, str]:
    found = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return dict(found)


def test_the_floors_are_the_versions_that_the_oldest_tests_run_with():
    oldest = pins("constraints-oldest.txt", r"^([\w-]+)==([\d.]+)$")
    floors = pins("pyproject.toml", r'^    "([\w-]+)>=([\d.]+)",')
    del oldest["torch"]  # the one whose oldest version is not tested
    assert {name: Version(version) for name, version in oldest.items()} == {
        name: Version(floors[name]) for name in oldest
    }


def test_merge_is_a_plain_function_with_its_options_spelled_out():
    assert list(inspect.signature(motionmerge.merge).parameters)[:2] == ["recipe", "output"]
    assert "dry_run" in inspect.signature(motionmerge.merge).parameters


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_definition and not node.name.startswith("_"):
            yield node.name, node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_public_function_and_class_has_a_docstring(path):
    bare = [name for name, node in public_definitions(path) if not ast.get_docstring(node)]
    assert not bare, f"{path}: {bare}"


ERRORS = {name for name in motionmerge.__all__ if name.endswith("Error")}


def texts_of_errors(path: Path) -> Iterator[tuple[int, str]]:
    """The messages and fixes of errors as far as they are literal; `{}` stands for a value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        is_error = isinstance(node.func, ast.Name) and node.func.id in ERRORS
        values = [*node.args[:1]] if is_error else []
        values += [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value
            elif isinstance(value, ast.JoinedStr):
                parts = (
                    one.value if isinstance(one, ast.Constant) else "{}" for one in value.values
                )
                yield value.lineno, "".join(map(str, parts))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_errors_and_fixes_are_sentences(path):
    for line, text in texts_of_errors(path):
        assert not text[:1].islower(), f"{path.name}:{line}: begins small: {text}"
        assert text.rstrip().endswith((".", "!", "?", ":", "{}")), (
            f"{path.name}:{line}: no end: {text}"
        )


HEAVY = ("torch", "diffusers", "transformers", "numpy", "av", "matplotlib", "scipy", "cv2")


def test_help_imports_no_torch():
    """Every verb's help, one after another in a process of its own."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from motionmerge.cli import app\n"
        f"for verb in {[[], *([verb] for verb in VERBS)]!r}:\n"
        "    result = CliRunner().invoke(app, [*verb, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not heavy, (verb, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_torch():
    code = "import sys, motionmerge; dir(motionmerge); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_is_a_message_with_a_fix_on_stderr_and_exit_code_2(tmp_path):
    result = CliRunner().invoke(app, ["show", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 2
    assert "Fix:" in result.stderr
    assert result.stdout == ""


def test_an_unknown_flag_is_refused():
    result = CliRunner().invoke(app, ["generate", "photo.jpg", "--promt", "x"])
    assert result.exit_code == 2
    assert "--promt" in result.stderr


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("motionmerge")
    out = subprocess.run([script, "version", "--json"], check=True, capture_output=True, text=True)
    assert f'"motionmerge": "{motionmerge.__version__}"' in out.stdout


def flag_list() -> str:
    """One line per argument and flag of every verb."""
    lines = []

    def walk(command, path):
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*path, name])
        for parameter in command.params:
            if parameter.name != "help":
                spelled = parameter.opts + parameter.secondary_opts
                kind = "" if parameter.opts[0].startswith("-") else "argument "
                lines.append(" ".join([*path, kind + "/".join(spelled)]))

    walk(typer.main.get_command(app), [])
    return "\n".join(sorted(lines)) + "\n"


def test_the_flags_of_the_command_line_are_frozen():
    assert flag_list() == FLAGS.read_text(encoding="utf-8"), (
        f"Flags changed. If that is wanted, note it in CHANGELOG.md and run: python {__file__}"
    )


if __name__ == "__main__":
    FLAGS.write_text(flag_list(), encoding="utf-8")
