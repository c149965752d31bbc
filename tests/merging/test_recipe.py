"""A recipe round-trips through its text; a wrong or hostile one is refused with a Fix."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionmerge.errors import CheckpointError, MotionMergeError, RecipeError
from motionmerge.merging.algebra.groups import only
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.sparsify import dare
from motionmerge.merging.inputs.sources import Source
from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.files import shipped_recipes
from motionmerge.merging.recipes.parser import MAX_DEPTH, parse_expression
from motionmerge.merging.recipes.recipe import Recipe, RecipeInput
from motionmerge.schedule import ScheduleEntry

from .conftest import RECIPE

BASE, TUNED = Checkpoint(Source("base")), Checkpoint(Source("tuned"))
NAMES = ("base", "tuned")


def expressions():
    """Checkpoint expressions of every shape."""
    numbers = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-9, 9)
    leaves = st.sampled_from([TUNED - BASE, BASE - TUNED])
    vectors = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, v: a * v, numbers, inner),
            st.builds(lambda v: -v, inner),
            st.builds(lambda v, w: v + w, inner, inner),
            st.builds(lambda v, w: v - w, inner, inner),
            st.builds(lambda v: (BASE + v) - TUNED, inner),
            st.builds(lambda v: BASE - (TUNED + v), inner),
            st.builds(
                lambda v, p, s: dare(v, drop_rate=p, seed=s),
                inner,
                st.floats(0, 0.99),
                st.integers(-9, 99),
            ),
            st.builds(only, inner, st.sampled_from(["temporal", 'a"*\\.b', r"re:\d+\.x"])),
        ),
        max_leaves=6,
    )
    return st.builds(
        lambda front, terms: sum_of(front, terms),
        st.sampled_from([BASE, TUNED]),
        st.lists(vectors, max_size=3),
    )


def sum_of(front, terms):
    for term in terms:
        front = front + term
    return front


@settings(max_examples=200, deadline=None)
@given(expression=expressions())
def test_a_printed_expression_parses_back_to_an_equal_one(expression):
    text = str(expression)
    parsed = parse_expression(text, NAMES)
    assert parsed == expression
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("base+(tuned-base)*0.5", "base + 0.5 * (tuned - base)"),
        ("((base)) - (0.25 * (tuned - base))", "base - 0.25 * (tuned - base)"),
        ("base + -1 * (tuned - base)", "base - (tuned - base)"),
        ("base + 0.5 * 0.5 * (tuned - base)", "base + 0.25 * (tuned - base)"),
        (
            "tuned + dare(tuned-base, seed=1, drop_rate=.7)",
            "tuned + dare(tuned - base, drop_rate=0.7, seed=1)",
        ),
        ("base +\n   (tuned - base)", "base + (tuned - base)"),
        ("base + only(tuned - base, 'temporal')", 'base + only(tuned - base, "temporal")'),
    ],
)
def test_expressions_are_printed_with_the_fewest_parentheses(written, canonical):
    assert str(parse_expression(written, NAMES)) == canonical


@pytest.mark.parametrize(
    ("written", "column"),
    [
        ("base + tuned", 5),
        ("2 * base", 2),
        ("base + 0.5 * (tuned - bsae)", 22),
        ("base + dare(tuned, drop_rate=0.5, seed=0)", 7),
        ("base + dare(tuned - base, drop_rate=2, seed=0)", 7),
        ("base + dare(tuned - base, drop=0.5, seed=0)", 31),
        ("base + (tuned - base", 7),
        ('base + only(tuned - base, "temporl")', 7),
        ("base + 1e999 * (tuned - base)", 7),
        ("base + é", 7),
        ("é + base + bad", 0),
        ("base ** 2", 0),
        ("base + (0.5 + 0.5) * (tuned - base)", 12),
    ],
)
def test_a_caret_stands_under_the_guilty_column(written, column):
    with pytest.raises(RecipeError) as caught:
        parse_expression(written, NAMES, where="experts.x")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("experts.x: ")
    assert lines[1] == "    " + written
    assert lines[2] == "    " + " " * column + "^"
    assert lines[3].startswith("  Fix: ")


HOSTILE = [
    "__import__('os').system('true')",
    "base.__class__",
    "(lambda: base)()",
    "[base for base in ()]",
    "base if 1 else tuned",
    "base[0]",
    "f'{base}'",
    "(base := tuned)",
    "dare(*base, **tuned)",
    "base + dare(tuned - base, drop_rate=0.5, seed=0, seed=1)",
    "base + 9**9**9 * (tuned - base)",
    "base + " + "9" * 1900 + " * (tuned - base)",
    "base + 1e300 * 1e300 * (tuned - base)",
    "(" * 500 + "base" + ")" * 500,
    "-" * 1500 + "base",
    "base" + " + (tuned - base)" * (MAX_DEPTH + 2),
    "base" + " " * 10 + "+ base" * 1000,
    "base\0",
    "base; tuned",
    "",
    "0.5",
    "'base'",
    "tuned - base",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_expression_is_a_recipe_error(text):
    with pytest.raises(RecipeError, match="Fix:"):
        parse_expression(text, NAMES)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["base", "tuned", "(", ")", "+", "-", "*", "0.5", "dare", ",", "=", " "]),
        max_size=20,
    ).map("".join)
)
def test_any_text_parses_or_is_a_recipe_error(text):
    try:
        parsed = parse_expression(text, NAMES)
    except RecipeError:
        return
    assert parse_expression(str(parsed), NAMES) == parsed


def test_a_recipe_round_trips_through_its_canonical_text():
    recipe = Recipe.parse("description: 'a: b, é'\n" + RECIPE)
    assert Recipe.parse(recipe.print()) == recipe
    assert recipe.print().endswith(RECIPE)
    assert Recipe.parse(RECIPE).print() == RECIPE
    assert recipe.seeds == {"dynamics": [0], "consistency": [1]}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_prints_and_round_trips(name):
    recipe = Recipe.load(name)
    assert recipe.description
    assert recipe.schedule is not None
    assert Recipe.parse(recipe.print()) == recipe


def test_the_shipped_official_recipe_has_the_papers_numbers():
    recipe = Recipe.load("edg-official")
    motion = TUNED - BASE
    assert recipe.experts == {
        "dynamics": BASE + 0.75 * dare(-0.25 * motion, drop_rate=0.7, seed=0),
        "consistency": TUNED + 0.25 * dare(motion, drop_rate=0.7, seed=1),
    }
    assert recipe.schedule.entries[0].above == 0.64


def test_a_single_expert_needs_no_schedule():
    recipe = Recipe.parse("inputs: {base: b}\nexperts: {same: base}")
    assert recipe.schedule.experts == ("same",)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "not a mapping"),
        ("- a", "not a mapping"),
        ("a: [", "not valid YAML"),
        (RECIPE + "shedule: []\n", "`schedule`"),
        (RECIPE.replace("inputs:", "inptus:"), "`inputs`"),
        (RECIPE.replace("expert: dynamics", "expert: dynamic"), "`dynamics`"),
        (RECIPE + "inputs: {base: x}\n", "twice"),
        (RECIPE.replace("  tuned: tuned.safetensors\n", ""), "no input `tuned`"),
        (RECIPE.replace("base: base.safetensors", "base: {pth: x}"), "`path`"),
        (RECIPE.replace("base: base.safetensors", "base: {path: x, sha256: 12}"), "sha256"),
        (RECIPE.replace("base: base.safetensors", "base: {path: x, sha256: abc}"), "64 hexa"),
        (RECIPE.replace("base: base.safetensors", "base: 3"), "not text"),
        (RECIPE.replace("base: base.safetensors", "dare: x"), "not a name"),
        (RECIPE.replace("  dynamics:", "  ../up:"), "not a name"),
        (RECIPE.replace("  dynamics:", "  lambda:"), "not a name"),
        (RECIPE.replace("dynamics: base +", "dynamics: 5 #"), "not text"),
        ("inputs: {base: b}\nexperts: {}", "experts"),
        ("inputs: {base: &a b, tuned: *a}\nexperts: {same: base}", "anchors"),
        ("inputs: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: " + "[" * 1000, "YAML"),
        ("x: " + "y" * 70_000, "KiB"),
        ("a: \x07", "YAML"),
        (RECIPE.replace("above: 0.64", "abov: 0.64"), r"schedule entry 1 has no .*\n.*`above`"),
        (
            RECIPE.replace("base: base.safetensors", "base: {sha256: x}"),
            "inputs.base has no `path`",
        ),
        (RECIPE.replace("schedule:", "schedule: {a: 1}\nnothing:"), "no setting `nothing`"),
        (RECIPE.replace("base: base.safetensors", "base: {5: x, path: y}"), "no setting `5`"),
        (RECIPE.partition("schedule")[0] + "schedule: x", "schedule is 'x', not a list"),
        (RECIPE + "description: [x]", "description is .*, not text"),
        (RECIPE + "parameters: {}", "Write `NAME: NUMBER` lines"),
        (RECIPE + f"parameters: {{much: 1{'0' * 400}}}", "parameters.much is 10*.., not a number"),
        (RECIPE + f"parameters: {{much: 0x{'f' * 9000}}}", "0xfff.*, not a number"),
        (RECIPE.replace("0.64", f"1{'0' * 400}"), "`above` of .*`dynamics`"),
        (RECIPE.replace("0.64", f"0x{'f' * 9000}"), "`above` of .*`dynamics`"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_nearest_name_or_the_reason(text, hint):
    with pytest.raises(RecipeError, match=hint):
        Recipe.parse(text)


def test_a_recipe_file_without_end_is_read_no_further_than_its_bound(tmp_path):
    path = tmp_path / "x.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RecipeError, match="KiB"):
        Recipe.load(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abei:{}[]-&*!? \n'\"#|>%@`\t0", max_size=80))
def test_any_document_parses_or_is_a_named_error(text):
    for document in (text, RECIPE + text, "inputs: " + text):
        try:
            recipe = Recipe.parse(document)
        except MotionMergeError:
            continue
        assert Recipe.parse(recipe.print()) == recipe


def test_a_missing_recipe_file_names_the_shipped_ones(tmp_path):
    with pytest.raises(RecipeError, match="edg-official"):
        Recipe.load(tmp_path / "none.yaml")


def test_relative_inputs_are_relative_to_the_recipe(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert realise(folder / "recipe.yaml").keys() == {"dynamics", "consistency"}


def test_a_pinned_hash_is_checked(folder):
    digest = hashlib.sha256((folder / "base.safetensors").read_bytes()).hexdigest()
    pinned = RECIPE.replace(
        "base: base.safetensors", f"base: {{path: base.safetensors, sha256: {digest}}}"
    )
    recipe = Recipe.parse(pinned, folder=folder)
    assert recipe.inputs["base"] == RecipeInput("base.safetensors", digest)
    realise(recipe)
    wrong = Recipe.parse(pinned.replace(digest, "f" * 64), folder=folder)
    with pytest.raises(CheckpointError, match=r"pins ffff(.|\n)*Fix"):
        realise(wrong)
    realise(wrong, inputs={"base": folder / "base.safetensors"})


def test_an_unknown_override_names_the_nearest_input(folder):
    with pytest.raises(RecipeError, match="`tuned`"):
        realise(folder / "recipe.yaml", inputs={"tune": "x"})


def test_unknown_shipped_weights_are_refused(folder):
    with pytest.raises(CheckpointError, match="bsae"):
        realise(folder / "recipe.yaml", inputs={"base": "pocket:bsae"})


@pytest.mark.parametrize(
    "make",
    [
        lambda tensors: Recipe.knob(lora=tensors),
        lambda tensors: Recipe.edg(base="a.safetensors", tuned=tensors),
        lambda tensors: Recipe.of_loras({"all": 1.0}, {"style": tensors}),
    ],
)
def test_tensors_are_no_input_of_a_recipe_but_of_experts(make):
    with pytest.raises(RecipeError, match=r"is a dict, not a path .*\n?.*memory:"):
        make({"a": 1})


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(kind):
    one = kind(1)
    knob = Recipe.knob(motion=one, base="a", tuned="b")
    assert knob == Recipe.knob(motion=1, base="a", tuned="b")
    assert Recipe.parse(knob.print()) == knob
    entry = ScheduleEntry("a", above=one)
    assert entry == ScheduleEntry("a", above=1)
    loras = Recipe.of_loras({"noisy": one, "clean": {"style": one}}, boundary=one)
    own = one.item()
    plain = Recipe.of_loras({"noisy": own, "clean": {"style": own}}, boundary=own)
    assert loras.print() == plain.print()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Recipe.knob(motion=np.float32("nan"), lora="x"), "`motion` is .*nan"),
        (lambda: Recipe.knob(motion=np.ones(2), lora="x"), "`motion` is array"),
        (lambda: Recipe.of_loras({"all": float("nan")}), "weight of `style` in `all` is nan"),
        (lambda: Recipe.of_loras({"all": "1"}), "weight of `style` in `all` is '1'"),
        (lambda: Recipe.of_loras({"all": 1.0}, {"base": "x"}), "`base` is the model"),
        (lambda: Recipe.of_loras({"all": {"base": 1.0}}), "`base` is the model"),
        (lambda: ScheduleEntry("a", abov=0.5), "no setting `abov`"),
        (lambda: ScheduleEntry(), "no `expert`"),
        (lambda: RecipeInput(3), "is 3, not text"),
        (lambda: RecipeInput("a", sha256="12"), "sha256 is '12', not 64"),
    ],
)
def test_what_is_wrong_in_python_is_named_as_in_a_file(make, reason):
    with pytest.raises(RecipeError, match=reason) as caught:
        make()
    assert caught.value.fix


GUIDE = "inputs:\n  base: b.safetensors\n  tuned: t.safetensors\n"
TWO = GUIDE + "experts: {d: base, c: tuned}\nschedule:\n"


@pytest.mark.parametrize(
    ("text", "line", "pointed"),
    [
        (GUIDE + "experts:\n  d: base + 0.5 * (tuned - bass)\n", 5, "bass)"),
        (GUIDE + "expert:\n  d: base\n", 4, "expert:"),
        ("\ufeff" + GUIDE + "expert:\n  d: base\n", 4, "expert:"),
        (TWO + "  - {expert: d, abov: 0.5}\n  - {expert: c}\n", 6, "abov: 0.5}"),
        (TWO + "  - {expert: d, above: high}\n  - {expert: c}\n", 6, "{expert: d, above: high}"),
        (TWO + "  - {expert: d, above: 0.5}\n  - {expert: x}\n", 7, "{expert: x}"),
        (TWO + "  - {expert: d}\n  - {expert: c, above: 0.5}\n", 5, "schedule:"),
        (GUIDE + "experts: {d: [base\n", 4, "[base"),
        (GUIDE + "experts:\n  d: base\n  d: tuned\n", 6, "d: tuned"),
        ("inputs: {base: {path: 5}}\nexperts: {d: base}\n", 1, "path: 5}}"),
        ("inputs:\n  if: a\nexperts: {d: base}\n", 2, "if: a"),
        ("parameters: {m: 1}\n" + GUIDE + "experts: {d: base}\n", 1, "m: 1}"),
        (GUIDE + "experts:\r\n  d: base\r\n  e: tuned - base\r\n", 6, "tuned - base"),
    ],
)
def test_a_fault_in_a_file_is_shown_with_its_line_and_a_caret(tmp_path, text, line, pointed):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    message, shown, caret = caught.value.message.splitlines()
    assert message.startswith(f"{path}:{line}")
    assert shown[caret.index("^") :] == pointed
