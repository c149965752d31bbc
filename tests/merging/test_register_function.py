"""Functions that users register: parsed, printed, computed and cited like ours."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from motionmerge import apply, dare, only, register_function
from motionmerge.cli import app
from motionmerge.errors import CheckpointError, ConfigError, RecipeError
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.functions import FUNCTIONS
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.rng import MASK_BLOCK

from .conftest import make_pair, same_bits

PAGE = (Path(__file__).parents[2] / "docs/reference/recipe-language.md").read_text(encoding="utf-8")
CITATION = "@article{clip2026,\n  title = {Clipping}\n}"
INPUTS = "inputs: {base: memory:base, tuned: memory:tuned}\n"


def clip(vector, *, block, limit):
    return np.clip(vector, -limit, limit)


def ramp(first, second, *, block, rate):
    """Depends on the place of each entry: a block that lies elsewhere would change it."""
    place = np.arange(block.start, block.start + block.count, dtype=np.float32)
    return first * (np.float32(rate) * place) + second


def centred(*vectors, name, weight):
    """Needs the whole tensor, and its name."""
    mean = sum(vectors) / len(vectors)
    return mean if name.endswith("bias") else mean - weight * mean.mean()


@pytest.fixture
def functions():
    """Register three functions, and forget everything that a test registers."""
    before = dict(FUNCTIONS)
    register_function("clip", settings={"limit": float}, blocks=clip, citation=CITATION)
    register_function("ramp", arguments=("first", "second"), settings={"rate": float}, blocks=ramp)
    register_function(
        "centred", arguments=("vector", "..."), settings={"weight": int}, tensors=centred
    )
    yield
    FUNCTIONS.clear()
    FUNCTIONS.update(before)


def big_pair(dtype):
    """Tensors of more than a block, of less, and of less than a row of blocks together."""
    shapes = {"big.weight": (MASK_BLOCK + 777, 3), "small.weight": (5, 7), "small.bias": (9,)}
    pair = {}
    for seed, name in enumerate(("base", "tuned")):
        generator = torch.Generator().manual_seed(seed)
        pair[name] = {
            key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()
        }
    return pair


def expected_of(name, base, tuned):
    """The plain arithmetic of EXPRESSION, in the dtype of the operands."""
    motion = tuned - base
    place = torch.arange(motion.numel(), dtype=torch.float32).view(motion.shape).to(motion.dtype)
    rate = float(np.float32(0.001))
    ramped = motion * (place.float() * rate).to(motion.dtype) + 0.5 * motion
    mean = (motion + motion.clamp(-0.25, 0.25)) / 2
    whole = mean if name.endswith("bias") else mean - 2 * mean.mean()
    return base + 0.5 * motion.clamp(-0.25, 0.25) + ramped - whole


EXPRESSION = (
    "base + 0.5 * clip(tuned - base, limit=0.25) + "
    "ramp(tuned - base, 0.5 * (tuned - base), rate=0.001) - "
    "centred(tuned - base, clip(tuned - base, limit=0.25), weight=2)"
)


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_registered_functions_have_the_bits_of_plain_arithmetic(dtype):
    pair = big_pair(dtype)
    recipe = Recipe.parse(f"{INPUTS}experts:\n  merged: {EXPRESSION}\n")
    computed = realise(recipe, inputs=pair, threads=2)["merged"]
    base, tuned = (Checkpoint.from_tensors(pair[name], name=name) for name in pair)
    direct = Recipe.parse(recipe.print()).experts["merged"]
    assert direct == recipe.experts["merged"]
    for name, value in computed.items():
        held = [pair[side][name].float() for side in ("base", "tuned")]
        assert same_bits(value, expected_of(name, *held).to(dtype)), name
    motion = tuned - base
    in_python = base + 0.5 * FUNCTIONS["clip"].build(motion, limit=0.25)
    assert str(in_python) == "base + 0.5 * clip(tuned - base, limit=0.25)"
    wanted = pair["base"]["small.weight"].float() + 0.5 * (
        pair["tuned"]["small.weight"].float() - pair["base"]["small.weight"].float()
    ).clamp(-0.25, 0.25)
    assert same_bits(in_python.evaluate("small.weight"), wanted.to(dtype))


@pytest.mark.usefixtures("functions")
def test_inputs_in_fp64_are_computed_in_fp64():
    pair = big_pair(torch.float64)
    recipe = Recipe.parse(f"{INPUTS}experts:\n  merged: base + clip(tuned - base, limit=0.25)\n")
    computed = realise(recipe, inputs=pair)["merged"]
    for name, value in computed.items():
        base, tuned = pair["base"][name], pair["tuned"][name]
        assert same_bits(value, base + (tuned - base).clamp(-0.25, 0.25)), name


@pytest.fixture
def files(tmp_path, functions):
    for name, state in big_pair(torch.bfloat16).items():
        save_weights(tmp_path / f"{name}.safetensors", state)
    inputs = INPUTS.replace("memory:base", "base.safetensors")
    inputs = inputs.replace("memory:tuned", "tuned.safetensors")
    (tmp_path / "recipe.yaml").write_text(f"{inputs}experts:\n  merged: {EXPRESSION}\n")
    return tmp_path


def test_files_do_not_depend_on_threads_or_shards(files):
    for threads in (1, 2, 5):
        merge(files / "recipe.yaml", files / str(threads), threads=threads)
    assert len({(files / t / "merged.safetensors").read_bytes() for t in "125"}) == 1
    merge(files / "recipe.yaml", files / "shards", max_shard_size="200KB")
    assert len(list((files / "shards" / "merged").glob("*.safetensors"))) > 1
    whole = Checkpoint.load(files / "1" / "merged.safetensors").tensors()
    cut = Checkpoint.load(files / "shards" / "merged").tensors()
    assert all(same_bits(cut[name], value) for name, value in whole.items())

    model = torch.nn.Module()
    for layer in ("big", "small"):
        model.add_module(layer, torch.nn.Module())
    for name, value in whole.items():
        layer, leaf = name.split(".")
        getattr(model, layer).register_buffer(leaf, torch.zeros_like(value))
    apply(files / "recipe.yaml", model, threads=1)
    assert all(same_bits(model.state_dict()[name], value) for name, value in whole.items())
    made = Recipe.made(files / "1" / "merged.safetensors")
    assert str(made.experts["merged"]) == EXPRESSION


def test_show_cites_a_registered_function_once(files):
    result = CliRunner().invoke(app, ["show", str(files / "recipe.yaml"), "--cite"])
    assert result.exit_code == 0, result.output
    assert result.output.count(CITATION) == 1


@pytest.mark.usefixtures("functions")
def test_a_vector_that_does_not_reach_a_tensor_counts_as_zeros(states):
    base, tuned = (Checkpoint.from_tensors(s, name=n) for s, n in zip(states, "ab", strict=True))
    some = only(tuned - base, "temporal")
    reached = "unet.down_stages.0.temporal_attention.proj_in.weight"
    ramped = base + FUNCTIONS["ramp"].build(tuned - base, some, rate=0.5)
    centred = base + FUNCTIONS["centred"].build(tuned - base, some, weight=0)
    clipped = base + FUNCTIONS["clip"].build(some, limit=1.0)
    for name in (reached, "unet.conv_in.weight"):
        motion = states[1][name] - states[0][name]
        second = motion if name == reached else torch.zeros_like(motion)
        place = torch.arange(motion.numel(), dtype=torch.float32).view(motion.shape)
        plain = states[0][name] + (motion * (0.5 * place) + second)
        assert same_bits(ramped.evaluate(name), plain)
        assert same_bits(centred.evaluate(name), states[0][name] + (motion + second) / 2)
        assert same_bits(clipped.evaluate(name), states[0][name] + second)


@pytest.mark.usefixtures("functions")
def test_settings_may_be_parameters_of_the_recipe():
    expert = "base + clip(tuned - base, limit=most)"
    recipe = Recipe.parse(f"parameters: {{most: 0.5}}\n{INPUTS}experts:\n  merged: {expert}\n")
    assert "clip(tuned - base, limit=most)" in recipe.print()
    other = recipe.with_parameters(most=0.001)
    pair = dict(zip(("base", "tuned"), make_pair(), strict=True))
    base, tuned = (state["unet.conv_in.weight"] for state in pair.values())
    computed = realise(other, inputs=pair)["merged"]["unet.conv_in.weight"]
    assert same_bits(computed, base + (tuned - base).clamp(-0.001, 0.001))


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("call", "message"),
    {
        "clop(tuned - base, limit=1)": r"no function `clop`(.|\n)*clip",
        "clip(tuned - base)": r"needs `limit`(.|\n)*Write `clip\(vector, limit=...\)`",
        "clip(tuned - base, tuned - base, limit=1)": "takes 1 positional",
        "clip(tuned, limit=1)": "got the checkpoint `tuned`, not a task vector",
        "centred(tuned - base, weight=1.5)": "weight=1.5 is not an integer",
        "clip(tuned - base, limit=tuned)": "is not a finite number",
    }.items(),
)
def test_a_wrong_call_is_refused_with_a_caret(call, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.parse(f"{INPUTS}experts:\n  merged: base + {call}\n")
    assert "^" in str(caught.value)


@pytest.mark.usefixtures("functions")
def test_a_wrong_call_in_python_says_what_to_write(pair):
    build = FUNCTIONS["clip"].build
    for wrong in (
        lambda: build(limit=1.0),
        lambda: build(pair[1] - pair[0]),
        lambda: build(pair[1] - pair[0], limit=1.0, other=2),
    ):
        with pytest.raises(RecipeError, match=r"Write `clip\(vector, limit=\.\.\.\)`"):
            wrong()
    with pytest.raises(RecipeError, match="not a task vector"):
        build(pair[0], limit=1.0)
    with pytest.raises(RecipeError, match="is not a finite number"):
        build(pair[1] - pair[0], limit=float("inf"))


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("section", ["inputs", "parameters"])
def test_no_input_or_parameter_has_the_name_of_a_function(section):
    sections = {"inputs": "base: a.safetensors", "parameters": "p: 1"}
    sections[section] += ", clip: 1" if section == "parameters" else ", clip: b.safetensors"
    text = "".join(f"{name}: {{{entry}}}\n" for name, entry in sections.items())
    with pytest.raises(RecipeError, match="`clip` is not a name for one of the " + section):
        Recipe.parse(f"{text}experts: {{merged: base}}\n")


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"blocks": clip}, "a function `clip` already"),
        ("dare", {"blocks": clip}, "a function `dare` already"),
        ("not a name", {"blocks": clip}, "cannot be the name"),
        ("lambda", {"blocks": clip}, "cannot be the name"),
        ("new", {}, "in 0 ways"),
        ("new", {"blocks": clip, "tensors": centred}, "in 2 ways"),
        ("new", {"blocks": clip, "settings": {"name": float}}, "cannot have the setting 'name'"),
        ("new", {"blocks": clip, "settings": {"text": str}}, "cannot have the setting 'text'"),
        ("new", {"blocks": clip, "arguments": ()}, "has the arguments"),
        ("new", {"blocks": clip, "arguments": "vector"}, "has the arguments"),
    ],
)
def test_what_cannot_be_registered_is_refused(name, options, message):
    known = dict(FUNCTIONS)
    with pytest.raises(ConfigError, match=message):
        register_function(name, **options)
    assert known == FUNCTIONS


def spoil(vector, *, block):
    vector += 1
    return vector


BROKEN = {
    "writes into its argument": ({"blocks": spoil}, "read-only"),
    "raises": ({"blocks": lambda vector, *, block: 1 / 0}, "ZeroDivisionError"),
    "returns too little": ({"blocks": lambda vector, *, block: vector[:1]}, r"shape \[1\]"),
    "returns integers": ({"blocks": lambda vector, *, block: vector.astype(int)}, "float array"),
    "returns a number": ({"tensors": lambda vector, *, name: 1.0}, "returned a float, not"),
    "returns a scalar": ({"tensors": lambda vector, *, name: vector.sum()}, r"shape \[\]"),
}


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("options", BROKEN, ids=str)
def test_a_function_that_is_broken_is_named(pair, options):
    ways, message = BROKEN[options]
    broken = register_function("broken", **ways)
    base, tuned = pair
    with pytest.raises(RecipeError, match=rf"broken\(\)(.|\n)*{message}(.|\n)*Fix:.*`broken`"):
        (base + broken(tuned - base)).tensors()


@pytest.mark.usefixtures("functions")
def test_a_function_that_gives_nan_is_refused():
    register_function("root", blocks=lambda vector, *, block: np.sqrt(-1 - vector**2))
    pair = dict(zip(("base", "tuned"), make_pair(), strict=True))
    recipe = Recipe.parse(f"{INPUTS}experts:\n  merged: base + root(tuned - base)\n")
    with pytest.raises(CheckpointError, match=r"infinite or NaN(.|\n)*function"):
        realise(recipe, inputs=pair)


@pytest.mark.usefixtures("functions")
def test_our_functions_take_registered_ones_and_the_other_way_round(states):
    pair = dict(zip(("base", "tuned"), states, strict=True))
    inner = "dare(clip(tuned - base, limit=0.004), drop_rate=0.5, seed=3)"
    text = f"{INPUTS}experts:\n  merged: base + clip({inner}, limit=0.002)\n"
    computed = realise(Recipe.parse(text), inputs=pair)["merged"]
    name = "unet.conv_in.weight"
    clipped = Checkpoint.from_tensors(
        {name: (pair["tuned"][name] - pair["base"][name]).clamp(-0.004, 0.004)}, name="clipped"
    )
    zero = Checkpoint.from_tensors({name: torch.zeros_like(pair["base"][name])}, name="zero")
    dropped = (zero + dare(clipped - zero, drop_rate=0.5, seed=3)).evaluate(name)
    wanted = pair["base"][name] + dropped.clamp(-0.002, 0.002)
    assert same_bits(computed[name], wanted)


def test_the_example_of_the_page_runs(functions):
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if "register_function" in block
    )  # fmt: skip
    for name in ("clip", "centred"):
        FUNCTIONS.pop(name)
    variables: dict[str, object] = {}
    exec(code, variables)
    pair = dict(zip(("base", "tuned"), make_pair(), strict=True))
    recipe = variables["recipe"]
    computed = realise(recipe, inputs=pair)
    assert all(not torch.equal(e["unet.conv_in.weight"], pair["base"]["unet.conv_in.weight"])
               for e in computed.values())  # fmt: skip
