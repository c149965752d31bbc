"""Small neighbours are read, computed and written together, and faults still have one name."""

from __future__ import annotations

import pytest
import torch

from motionmerge.errors import CheckpointError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.algebra.results import result_specs
from motionmerge.merging.algebra.sparsify import dare
from motionmerge.merging.compute.kernel import BLOCK, CHUNK
from motionmerge.merging.compute.plan import MergeJob, Planner
from motionmerge.merging.in_memory import TensorSink
from motionmerge.merging.inputs.sources import OpenInputs
from motionmerge.merging.merge import merge, realise

from .conftest import same_bits

NAMES = [f"layer{i}.{kind}" for i in range(12) for kind in ("weight", "bias")]
RECIPE = """\
inputs: {base: base.safetensors, tuned: tuned.safetensors}
experts:
  dropped: base + 0.5 * dare(tuned - base, drop_rate=0.5, seed=0)
  calmed: base - 0.3 * only(tuned - base, "*.weight")
"""


def make_state(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (5, 7), "bias": (5,)}
    return {
        name: torch.randn(shapes[name.partition(".")[2]], generator=generator).bfloat16()
        for name in NAMES
    }


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save_weights(tmp_path / f"{name}.safetensors", make_state(seed))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def plan(folder, expression):
    """Give the chunks of an expression whose result goes to memory."""
    base, tuned = (Checkpoint.load(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    checkpoint = expression(base, tuned)
    with OpenInputs(checkpoint.sources()) as opened:
        specs = result_specs(checkpoint, opened)
        tensors = {name: torch.empty(shape, dtype=d.torch) for name, (d, shape) in specs.items()}
        job = MergeJob(checkpoint=checkpoint, specs=specs, sink=TensorSink(tensors))
        return list(Planner([job], opened).chunks(lambda job, name: None))


def test_neighbours_share_a_chunk_and_are_read_in_one_piece(folder):
    (chunk,) = plan(folder, lambda base, tuned: base - 0.25 * (tuned - base))
    *sources, result = chunk.runs
    assert len(chunk.blocks) == len(NAMES) == len(result)
    assert [len(runs) for runs in sources] == [1, 1]
    assert chunk.count == sources[0][0].stop == sum(t.numel() for t in make_state(0).values())
    assert len({tensor.program for tensor, _ in chunk.blocks}) == 1


def test_tensors_that_lie_elsewhere_are_read_on_their_own(folder):
    save_weights(folder / "tuned.safetensors", dict(reversed(make_state(1).items())))
    (chunk,) = plan(folder, lambda base, tuned: base - 0.25 * (tuned - base))
    pieces = {
        source.name: len(runs)
        for (source, _), runs in zip(chunk.layout.reads, chunk.runs[:2], strict=True)
    }
    assert pieces == {"base": 1, "tuned": len(NAMES)}


def test_a_large_tensor_fills_chunks_of_whole_blocks(folder):
    large = torch.zeros(2 * CHUNK + BLOCK + 3).bfloat16()
    state = {"large": large, "small": torch.zeros(3).bfloat16()}
    for name in ("base", "tuned"):
        save_weights(folder / f"{name}.safetensors", state)
    chunks = plan(folder, lambda base, tuned: base + (tuned - base))
    assert [chunk.count for chunk in chunks] == [CHUNK, CHUNK, BLOCK + 3 + 3]


def test_a_dropped_task_vector_is_rescaled_and_added_in_two_steps(folder):
    (chunk,) = plan(
        folder,
        lambda base, tuned: base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0),
    )
    programs = dict.fromkeys(tensor.program for tensor, _ in chunk.blocks if tensor.program)
    steps = [
        [type(instruction.step).__name__ for instruction in program.shorter.instructions]
        for program in programs
        if program.shorter
    ]
    assert steps == [["Subtract", "Scale", "AddDropped"]]


@pytest.mark.parametrize("backwards", [False, True])
def test_neighbours_get_the_bits_they_have_alone(folder, backwards):
    tuned = make_state(1)
    order = reversed(tuned) if backwards else tuned
    save_weights(folder / "tuned.safetensors", {name: tuned[name] for name in order})
    merge(folder / "recipe.yaml", folder / "out")
    base = make_state(0)
    for name in NAMES:
        alone = {"base": {name: base[name]}, "tuned": {name: tuned[name]}}
        experts = ["dropped", "calmed"] if name.endswith("weight") else ["dropped"]
        computed = realise(folder / "recipe.yaml", inputs=alone, experts=experts)
        for expert, tensors in computed.items():
            with open_weights(folder / "out" / f"{expert}.safetensors") as reader:
                assert same_bits(reader.read(name), tensors[name]), (expert, name)
    with open_weights(folder / "out" / "calmed.safetensors") as reader:
        assert same_bits(reader.read("layer3.bias"), base["layer3.bias"])


@pytest.mark.parametrize("name", ["layer0.weight", "layer5.bias", "layer11.bias"])
def test_nan_is_refused_by_name_also_where_a_tensor_is_only_copied(folder, name):
    state = make_state(0)
    state[name].view(-1)[2] = float("nan")
    save_weights(folder / "base.safetensors", state)
    for experts in (RECIPE, 'inputs: {base: base.safetensors}\nexperts: {same: "base"}\n'):
        (folder / "recipe.yaml").write_text(experts)
        with pytest.raises(CheckpointError, match=rf"`{name}` of `base` holds NaN"):
            merge(folder / "recipe.yaml", folder / "out")
        assert not (folder / "out").exists()
    merge(folder / "recipe.yaml", folder / "out", allow_nonfinite=True)


def test_an_overflow_in_fp32_is_refused_by_name(folder):
    base, tuned = ({name: t.float() for name, t in make_state(i).items()} for i in (0, 1))
    base["layer7.weight"][0, 0], tuned["layer7.weight"][0, 0] = -3e38, 3e38
    inputs = {"base": base, "tuned": tuned}
    with pytest.raises(CheckpointError, match=r"`layer7\.weight` overflows fp32"):
        merge(folder / "recipe.yaml", folder / "out", inputs=inputs)


def test_equal_tensors_are_counted_one_by_one(folder):
    base, tuned = make_state(0), make_state(1)
    for name in NAMES[:5]:
        tuned[name] = base[name].clone()
    save_weights(folder / "tuned.safetensors", tuned)
    assert merge(folder / "recipe.yaml", folder / "out").unchanged == 5


def test_torch_has_its_threads_back_after_a_merge(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge(folder / "recipe.yaml", folder / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
