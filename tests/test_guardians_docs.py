"""What is written is true: README blocks run, recipes round-trip, links lead somewhere.

After files were added or renamed: `python tests/test_guardians_docs.py` redraws the tree.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motionmerge.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "motionmerge"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
RECIPES = sorted((PACKAGE / "recipes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)


# README.md. A block that takes minutes is marked `<!-- not run: why -->`; its flags are checked.


def readme_blocks(language: str) -> list[tuple[bool, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [(not skipped, body) for skipped, kind, body in BLOCK.findall(text) if kind == language]


@pytest.fixture
def workshop(tmp_path):
    """An empty folder with `photo.jpg`, where the README's reader stands."""
    photos = sorted(p for p in (PACKAGE / "models/pocket/photos").iterdir() if p.suffix == ".jpg")
    shutil.copy(photos[0], tmp_path / "photo.jpg")
    return tmp_path


# All in this process, as importing torch and diffusers takes longer than most blocks.


@pytest.mark.slow
def test_the_python_blocks_of_the_readme_run(workshop, monkeypatch):
    blocks = [body for is_run, body in readme_blocks("python") if is_run]
    assert blocks, "README.md opens with working code"
    monkeypatch.chdir(workshop)
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_bash_blocks_of_the_readme_run(workshop, monkeypatch):
    blocks = [body for is_run, body in readme_blocks("bash") if is_run]
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks).splitlines()]
    monkeypatch.chdir(workshop)
    for program, *words in filter(None, lines):
        assert program == "motionmerge", "other programs need a shell, or `<!-- not run: why -->`"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


def commands_in_documents() -> list[tuple[str, str]]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        (path.name, line.split("#")[0].strip())
        for path in documents
        if path.exists()
        for _, kind, body in BLOCK.findall(path.read_text(encoding="utf-8"))
        if kind == "bash"
        for line in body.replace("\\\n", " ").splitlines()
    ]


def test_documented_commands_use_verbs_flags_and_targets_that_exist():
    flags = (ROOT / "tests/data/cli_flags.txt").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for document, line in commands_in_documents():
        words = shlex.split(line)
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{document}: {line}"
        if words[:1] == ["motionmerge"]:
            for word in words[2:]:
                flag = word.split("=")[0]
                if re.fullmatch(r"--?[a-z][a-z-]*", flag):
                    known = rf"^{words[1]} .*(?<![\w-]){flag}(?![\w-])"
                    assert re.search(known, flags, re.MULTILINE), f"{document}: {line}"


def test_links_between_documents_lead_to_files():
    """The site checks its own links; README.md and the others are not on it."""
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_and_the_changelog_stay_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert max(map(len, changelog)) <= 120


def test_the_front_page_shows_the_code_of_the_readme():
    front_page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert readme_blocks("python")[0][1] in front_page


def test_pictures_are_small():
    for picture in (ROOT / "docs/images").iterdir():
        assert picture.stat().st_size < 2_000_000, picture.name


def test_every_symbol_of_the_paper_map_exists():
    page = (ROOT / "docs/explanation/method.md").read_text(encoding="utf-8")
    symbols = re.findall(r"\| `(motionmerge\.[\w.]+)` \|$", page, re.MULTILINE)
    assert len(symbols) > 12
    for symbol in symbols:
        assert pkgutil.resolve_name(symbol) is not None


# Recipes and examples


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_prints_and_round_trips(path):
    from motionmerge.merging.recipes.recipe import Recipe

    recipe = Recipe.load(path)
    printed = recipe.print()
    again = Recipe.parse(printed)
    assert again.print() == printed
    assert again.schedule == recipe.schedule
    assert list(again.experts) == list(recipe.experts)


def test_recipes_are_shipped():
    assert RECIPES


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(path, workshop, monkeypatch):
    # In this process, as importing torch and diffusers takes longer than most examples.
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.delitem(sys.modules, "tiny_models", raising=False)
    runpy.run_path(str(path), run_name="__main__")


# ARCHITECTURE.md: its tree is drawn from the first sentence of every file.


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", paragraph)[0].rstrip(" .")


def draw_tree() -> str:
    """One line per file, the ground floor's single files first, a blank line between folders."""
    names = {path: path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    files = sorted(names, key=lambda path: (path.parent != PACKAGE, names[path]))
    width = max(map(len, names.values())) + 2
    lines, folder = [], PACKAGE
    for path in files:
        if path.parent != folder:
            lines.append("")
            folder = path.parent
        lines.append(f"{names[path]:{width}}{first_sentence(path)}")
    return "\n".join(lines)


TREE = re.compile(r"(<!-- tree -->\n```text\n)(.*?)(\n```)", re.DOTALL)


def test_the_tree_of_architecture_md_is_complete():
    drawn = TREE.search(ARCHITECTURE.read_text(encoding="utf-8"))
    assert drawn and drawn[2] == draw_tree(), f"Run: python {__file__}"


def test_the_public_surface_of_the_house_is_there():
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        assert (ROOT / name).is_file(), f"{name} is missing"


if __name__ == "__main__":
    text = ARCHITECTURE.read_text(encoding="utf-8")
    redrawn = TREE.sub(lambda match: match[1] + draw_tree() + match[3], text)
    ARCHITECTURE.write_text(redrawn, encoding="utf-8")
