"""The block engine gives the bits of the expression tree, whatever the blocks, threads, layout."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import CheckpointError, ShapeError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.algebra.nodes import Checkpoint, realised
from motionmerge.merging.algebra.sparsify import MaskV1
from motionmerge.merging.compute import streaming, survey
from motionmerge.merging.compute.compiled import compiled_kernels
from motionmerge.merging.compute.kernel import BLOCK, STRETCH
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.merging.merge import apply, merge, realise
from motionmerge.merging.recipes.bound import BoundRecipe
from motionmerge.merging.recipes.recipe import Recipe, RecipeInput

from .conftest import RECIPE, same_bits

PIECE = 32_768

EXPRESSIONS = (
    "base - 0.25 * (tuned - base)",
    "base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)",
    "tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)",
    'base + 0.3 * only(tuned - base, "re:big") - 0.1 * (other - base)',
    "base + 1.5 * dare(0.5 * (tuned - base) + 0.2 * dare(other - tuned, drop_rate=0.5, seed=3), "
    "drop_rate=0.25, seed=4) - (other - base)",
    "base + trim(tuned - base, keep=0.2) + 0.1 * dare(other - base, drop_rate=0.9, seed=0)",
    "base + low_rank(tuned - base, rank=2)",
    "base",
)


@pytest.fixture(autouse=True, params=["numpy", "compiled"])
def kernels(request, monkeypatch):
    """Every test here runs with both kinds of kernels; gives which, and uses of compiled ones."""
    used = []
    if request.param == "compiled":
        if compiled_kernels() is None:
            pytest.skip("there was no C compiler when the package was installed")
        follow = streaming.follow_compiled

        def noted(*arguments):
            used.append(follow(*arguments))
            return used[-1]

        monkeypatch.setattr(streaming, "follow_compiled", noted)
    else:
        monkeypatch.setattr(streaming, "compiled_kernels", lambda: None)
    return request.param, used


def make_states(dtype):
    """Three states; one tensor is more than a block, one a little less, some are small."""
    shapes = {
        "big.weight": (BLOCK + PIECE + 77, 1), "middle.weight": (2, PIECE + 3), "bias": (19,),
        "small.weight": (5, 7), "empty": (0, 4),
    }  # fmt: skip
    states = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
        state["big.weight"][:4] = torch.tensor([0.0, -0.0, 1e-40, -3e-39]).to(dtype)[:, None]
        states.append(state | {"steps": torch.tensor(seed), "scale": torch.tensor(1.5)})
    return dict(zip(("base", "tuned", "other"), states, strict=True))


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_blocks_give_the_bits_of_the_expression_tree(expression, dtype):
    states = make_states(dtype)
    inputs = "".join(f"  {name}: memory:{name}\n" for name in states)
    recipe = Recipe.parse(f"inputs:\n{inputs}experts:\n  merged: '{expression}'\n")
    computed = realise(recipe, inputs=states, threads=2)["merged"]
    checkpoint = BoundRecipe.of(recipe, states).experts["merged"]
    with OpenInputs(checkpoint.sources()) as opened:
        for name in opened.names(checkpoint.anchor):
            assert same_bits(computed[name], realised(checkpoint, name, opened)), name


@pytest.mark.parametrize(
    "expression",
    [
        "base - 0.3 * (tuned - base)",
        "base + 0.7 * (0.3 * (tuned - other))",
        "base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)",
        "tuned + 0.3 * dare(0.3 * (other - base), drop_rate=0.0, seed=1)",
        "tuned - dare(tuned - base, drop_rate=0.99, seed=2)",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_paper_s_forms_are_computed_by_compiled_kernels(kernels, expression, dtype):
    states = make_states(dtype)
    inputs = "".join(f"  {name}: memory:{name}\n" for name in states)
    recipe = Recipe.parse(f"inputs:\n{inputs}experts:\n  merged: '{expression}'\n")
    computed = realise(recipe, inputs=states)["merged"]
    kind, used = kernels
    assert any(used) == (kind == "compiled")
    checkpoint = BoundRecipe.of(recipe, states).experts["merged"]
    with OpenInputs(checkpoint.sources()) as opened:
        for name in opened.names(checkpoint.anchor):
            assert same_bits(computed[name], realised(checkpoint, name, opened)), name


def test_several_experts_at_once_are_the_experts_one_by_one():
    states = make_states(torch.bfloat16)
    names = [f"expert{i}" for i in range(len(EXPRESSIONS))]
    together = "".join(f"  {n}: '{e}'\n" for n, e in zip(names, EXPRESSIONS, strict=True))
    inputs = "".join(f"  {name}: memory:{name}\n" for name in states)
    recipe = Recipe.parse(f"inputs:\n{inputs}experts:\n{together}")
    computed = realise(recipe, inputs=states, threads=2)
    for name in names:
        alone = realise(recipe, inputs=states, experts=[name], threads=1)[name]
        assert all(same_bits(computed[name][key], alone[key]) for key in alone)


def every_number(dtype, count, *, seed, below):
    """Give every pattern of bits that is a number of moderate size, in random order."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-32768, 32767, (count,), generator=generator, dtype=torch.int32)
    values = bits.to(torch.int16).view(dtype)
    values[~(values.float().abs() < below)] = -0.0
    return values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", ["- 0.25", "+ 0.125", "- 0.0000152587890625", "- 0.3", "+ 0.5"])
def test_a_step_along_a_line_has_the_bits_of_the_expression_tree(dtype, factor):
    below = 1e38 if dtype == torch.bfloat16 else 3e4
    states = {
        name: {"weight": every_number(dtype, 4 * BLOCK, seed=seed, below=below)}
        for seed, name in enumerate(("base", "tuned"))
    }
    states["tuned"]["weight"][::3] = states["base"]["weight"][::3]
    recipe = Recipe.parse(
        "inputs: {base: memory:base, tuned: memory:tuned}\n"
        f"experts:\n  merged: base {factor} * (tuned - base)\n"
    )
    computed = realise(recipe, inputs=states, threads=1)["merged"]["weight"]
    base, tuned = (states[name]["weight"].float() for name in ("base", "tuned"))
    expected = base + (tuned - base) * float(factor.replace(" ", ""))
    assert same_bits(computed, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "expression",
    [
        "base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)",
        "tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)",
        "base + dare(0.0000152587890625 * (tuned - base), drop_rate=0.5, seed=2)",
        "base - dare(0.3 * (tuned - base), drop_rate=0.7, seed=0)",
        "base + 0.1 * dare(tuned - base, drop_rate=0.7, seed=0) + 0.5 * dare(base - tuned, "
        "drop_rate=0.1, seed=3)",
    ],
)
def test_a_shorter_program_has_the_bits_of_the_expression_tree(dtype, expression):
    below = 1e37 if dtype == torch.bfloat16 else 5e3
    shape = (BLOCK + PIECE, 1)
    states = {
        name: {"weight": every_number(dtype, shape[0], seed=seed, below=below).view(shape)}
        for seed, name in enumerate(("base", "tuned"))
    }
    states["tuned"]["weight"][::3] = states["base"]["weight"][::3]
    recipe = Recipe.parse(
        f"inputs: {{base: memory:base, tuned: memory:tuned}}\nexperts:\n  merged: '{expression}'\n"
    )
    computed = realise(recipe, inputs=states)["merged"]["weight"]
    checkpoint = BoundRecipe.of(recipe, states).experts["merged"]
    with OpenInputs(checkpoint.sources()) as opened:
        assert same_bits(computed, realised(checkpoint, "weight", opened))


def test_what_overflows_only_where_the_mask_drops_it_is_no_fault():
    keep = MaskV1(seed=0, drop_rate=0.7).keep("weight", (64, 2))
    base = torch.zeros(64, 2)
    tuned = torch.where(keep, 1.0, 3e38)
    recipe = Recipe.parse(
        "inputs: {base: memory:base, tuned: memory:tuned}\n"
        "experts: {merged: 'base + dare(tuned - base, drop_rate=0.7, seed=0)'}\n"
    )
    inputs = {"base": {"weight": base}, "tuned": {"weight": tuned}}
    merged = realise(recipe, inputs=inputs)["merged"]["weight"]
    assert torch.equal(merged != 0, keep) and merged.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_nan_is_found_late_in_a_large_tensor_whose_blocks_are_not_sampled(threads):
    base = {"weight": torch.zeros(7 * BLOCK).bfloat16()}
    tuned = {"weight": torch.ones(7 * BLOCK).bfloat16()}
    recipe = Recipe.parse(
        "inputs: {base: memory:base, tuned: memory:tuned}\n"
        "experts: {merged: base - 0.25 * (tuned - base)}\n"
    )
    tuned["weight"][6 * BLOCK + 9] = float("nan")
    with pytest.raises(CheckpointError, match="`weight` of `tuned` holds NaN"):
        realise(recipe, inputs={"base": base, "tuned": tuned}, threads=threads)


@pytest.fixture
def big(tmp_path):
    for name, state in make_states(torch.bfloat16).items():
        save_weights(tmp_path / f"{name}.safetensors", state)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_files_do_not_depend_on_threads(big):
    for threads in (1, 2, 5):
        merge(big / "recipe.yaml", big / str(threads), threads=threads)
    for name in ("dynamics.safetensors", "consistency.safetensors"):
        assert len({(big / folder / name).read_bytes() for folder in "125"}) == 1


def test_an_expert_applied_to_a_module_has_the_bits_of_its_file(big):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in make_states(torch.bfloat16)["base"].items():
                self.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
            self.small_weight = torch.zeros(7, 5, dtype=torch.bfloat16).T

    renamed = {
        name: {key.replace(".", "_"): value for key, value in state.items()}
        for name, state in make_states(torch.bfloat16).items()
        if name != "other"
    }
    model = Model()
    apply(big / "recipe.yaml", model, expert="dynamics", inputs=renamed)
    expected = realise(big / "recipe.yaml", inputs=renamed)["dynamics"]
    assert all(same_bits(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="prefix"):
        apply(big / "recipe.yaml", model, expert="dynamics")
    model.bias = torch.zeros(3)
    with pytest.raises(ShapeError, match="bias"):
        apply(big / "recipe.yaml", model, expert="dynamics", inputs=renamed)


def test_a_prefix_picks_the_tensors_of_one_module_out_of_a_whole_checkpoint():
    base = {"unet.weight": torch.ones(3, 3), "unet.bias": torch.ones(3), "vae.bias": torch.ones(2)}
    tuned = {name: 2 * value for name, value in base.items()}
    recipe = Recipe.parse(
        "inputs: {base: memory:base, tuned: memory:tuned}\n"
        "experts: {merged: base + 0.5 * (tuned - base)}\n"
    )
    model = torch.nn.Linear(3, 3)
    apply(recipe, model, prefix="unet.", inputs={"base": base, "tuned": tuned})
    assert all(torch.equal(p, torch.full_like(p, 1.5)) for p in model.parameters())


@pytest.mark.parametrize("place", [0, PIECE, BLOCK + 5])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_is_found_in_any_block_also_where_the_mask_drops_it(big, place, bad):
    state = make_states(torch.bfloat16)["tuned"]
    state["big.weight"][place, 0] = bad
    save_weights(big / "tuned.safetensors", state)
    with pytest.raises(CheckpointError, match=r"`big\.weight` of `tuned` holds NaN"):
        merge(big / "recipe.yaml", big / "out", threads=2)
    assert not (big / "out").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_value_that_does_not_fit_into_the_result_is_refused(tmp_path, dtype):
    huge = 3.4e38 if dtype == "bf16" else 7e4
    state = {"weight": torch.full((2, 2), huge)}
    recipe = Recipe(
        inputs={"base": RecipeInput("memory:base")},
        experts={"merged": Checkpoint.from_tensors(state, name="base")},
    )
    with pytest.raises(CheckpointError, match="does not fit into " + dtype):
        merge(recipe, tmp_path / "out", inputs={"base": state}, dtype=dtype)


def test_tensors_that_no_task_vector_reaches_keep_their_bytes(big):
    (big / "recipe.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        'experts:\n  merged: base + only(tuned - base, "re:small")\n  same: base\n'
    )
    report = merge(big / "recipe.yaml", big / "out", threads=2)
    base = make_states(torch.bfloat16)["base"]
    for expert in ("merged", "same"):
        with open_weights(big / "out" / f"{expert}.safetensors") as reader:
            kept = [name for name in base if expert == "same" or name != "small.weight"]
            assert all(same_bits(reader.read(name), base[name]) for name in kept)
    size = sum(t.numel() * t.element_size() for t in base.values())
    assert report.bytes_read == size + 2 * base["small.weight"].numel()  # all of base, one of tuned
    assert report.experts["same"].computed == 0


def test_masks_of_neighbouring_blocks_are_those_of_the_blocks(kernels):
    sizes = [300, 300, 300, 300, 300, 5 * BLOCK + 11, 7, 7, 7, 7]
    generator = torch.Generator().manual_seed(0)
    states = {
        name: {
            f"{n:02}.weight": torch.randn(size, 1, generator=generator).bfloat16()
            for n, size in enumerate(sizes)
        }
        for name in ("base", "tuned")
    }
    expression = "base + dare(tuned - base, drop_rate=0.6, seed=5)"
    recipe = Recipe.parse(
        f"inputs: {{base: memory:base, tuned: memory:tuned}}\nexperts: {{merged: '{expression}'}}"
    )
    computed = realise(recipe, inputs=states)["merged"]
    checkpoint = BoundRecipe.of(recipe, states).experts["merged"]
    with OpenInputs(checkpoint.sources()) as opened:
        for name in states["base"]:
            assert same_bits(computed[name], realised(checkpoint, name, opened)), name


def test_what_is_counted_does_not_depend_on_how_many_samples_are_counted_at_once(
    monkeypatch, tmp_path
):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{n:03}.weight": (2000, 1) for n in range(300)} | {"big": (BLOCK + 5, 2)}
    for name in ("base", "tuned"):
        state = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
        save_weights(tmp_path / f"{name}.safetensors", state)
    recipe = Recipe.parse(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\nexperts:\n"
        "  a: 'base + 0.001 * (tuned - base)'\n"
        "  b: 'base + 0.01 * dare(0.5 * (tuned - base), drop_rate=0.5, seed=0)'\n",
        folder=tmp_path,
    )
    reports = []
    for number, pooled in enumerate((1, 65_536, STRETCH)):
        monkeypatch.setattr(survey, "_POOLED", pooled)
        reports.append(merge(recipe, tmp_path / str(number)).experts)
    for name in ("a", "b"):
        first, *others = (report[name] for report in reports)
        assert 0 < first.survived < 1
        for other in others:
            assert other.touched == first.touched
            assert other.survived == pytest.approx(first.survived, rel=1e-12)
            assert other.cosine == pytest.approx(first.cosine, rel=1e-9)
