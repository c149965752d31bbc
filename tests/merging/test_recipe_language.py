"""Every recipe in docs/reference/recipe-language.md runs, and every function has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import motionmerge
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.functions import FUNCTIONS
from motionmerge.merging.recipes.recipe import Recipe

from .conftest import make_state

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "recipe-language.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE.split("## Functions of your own")[0], re.DOTALL)
LAYER = "unet.down_stages.0.attention.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for seed, name in enumerate(("base", "tuned", "style")):
        save_weights(folder / f"{name}.safetensors", make_state(seed))
    factors = {f"{LAYER}.lora_A.weight": (2, 16), f"{LAYER}.lora_B.weight": (16, 2)}
    tensors = {key: torch.randn(shape) for key, shape in factors.items()}
    save_weights(folder / "style-lora.safetensors", tensors)
    return folder


@pytest.mark.parametrize("text", BLOCKS)
def test_a_recipe_of_the_page_runs_and_changes_something(folder, text):
    recipe = Recipe.parse(text, folder=folder)
    assert Recipe.parse(recipe.print()) == recipe
    base = make_state(0)
    for expert, tensors in realise(recipe).items():
        assert tensors.keys() == base.keys()
        assert any(not torch.equal(tensors[name], base[name]) for name in base), expert


class Model(torch.nn.Module):
    """A module with the tensors of a state dict."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.register_buffer(leaf, value.clone())


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_of_the_page_runs(folder, code, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(BLOCKS[0], encoding="utf-8")
    base = make_state(0)
    variables = {"model": Model(base)}
    exec(code, variables)
    assert "# " + capsys.readouterr().out.strip() in code
    merged = Checkpoint.load("merged/dynamics.safetensors").tensors()
    applied = variables["model"].state_dict()
    assert all(torch.equal(applied[name], merged[name]) for name in base)
    expressions = {k: v for k, v in variables.items() if isinstance(v, Checkpoint) and v.vectors}
    for name, expression in expressions.items():
        assert any(not torch.equal(v, base[k]) for k, v in expression.tensors().items()), name
    for function in FUNCTIONS:
        assert any(f"{function}(" in str(expression) for expression in expressions.values())
        assert getattr(motionmerge, function) is FUNCTIONS[function].build


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_has_an_example(function):
    assert f"### `{function}(" in PAGE
    assert any(f"{function}(" in block for block in BLOCKS)
