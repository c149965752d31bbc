"""Merged files are whole, say what made them, and hold the same bits as the experts in memory."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext

import pytest
import torch

import motionmerge
from motionmerge.errors import CheckpointError, ConfigError, RecipeError, ShapeError
from motionmerge.io.weights import open_weights, save_weights
from motionmerge.merging.merge import merge, realise
from motionmerge.merging.recipes.recipe import Recipe

from .conftest import RECIPE, make_pair, same_bits


def read_all(path):
    with open_weights(path) as reader:
        return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_files_hold_the_bits_of_the_experts_in_memory(folder, dtype):
    for name, state in zip(("base", "tuned"), make_pair(dtype), strict=True):
        save_weights(folder / f"{name}.safetensors", state)
    merge(folder / "recipe.yaml", folder / "out")
    computed = realise(folder / "recipe.yaml")
    for expert, tensors in computed.items():
        written = read_all(folder / "out" / f"{expert}.safetensors")
        assert list(written) == list(tensors)
        assert all(same_bits(written[name], tensors[name]) for name in tensors)


def test_merging_twice_gives_the_same_bytes(folder):
    for out in ("a", "b"):
        merge(folder / "recipe.yaml", folder / out)
    for name in ("dynamics.safetensors", "consistency.safetensors", "recipe.yaml"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


def test_the_result_does_not_depend_on_shards(folder, states):
    base, _ = states
    shards = folder / "sharded"
    shards.mkdir()
    weight_map = {}
    for index, (name, value) in enumerate(base.items()):
        save_weights(shards / f"part-{index}.safetensors", {name: value})
        weight_map[name] = f"part-{index}.safetensors"
    index_file = shards / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    single = realise(folder / "recipe.yaml")
    sharded = realise(folder / "recipe.yaml", inputs={"base": shards})
    for expert, tensors in single.items():
        assert all(same_bits(sharded[expert][name], tensors[name]) for name in tensors)


def test_the_result_does_not_depend_on_threads(folder):
    before = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(realise(folder / "recipe.yaml")["dynamics"])
    torch.set_num_threads(before)
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])


def test_inputs_in_different_orders_merge_in_one_pass(folder, states):
    save_weights(folder / "tuned.safetensors", dict(reversed(states[1].items())))
    report = merge(folder / "recipe.yaml", folder / "out")
    computed = realise(folder / "recipe.yaml")
    for expert, tensors in computed.items():
        written = read_all(folder / "out" / f"{expert}.safetensors")
        assert all(same_bits(written[name], tensors[name]) for name in tensors)
    size = sum(t.numel() * t.element_size() for state in states for t in state.values())
    assert report.bytes_read == size


def test_the_header_says_what_made_the_file(folder):
    merge(folder / "recipe.yaml", folder / "out")
    with open_weights(folder / "out" / "dynamics.safetensors") as reader:
        metadata = reader.metadata
    assert metadata["format"] == "pt"
    assert metadata["motionmerge.expert"] == "dynamics"
    assert metadata["motionmerge.version"] == motionmerge.__version__
    assert json.loads(metadata["motionmerge.seeds"]) == {"dynamics": [0], "consistency": [1]}
    recipe = Recipe.made(folder / "out" / "dynamics.safetensors")
    assert recipe.experts == Recipe.parse(RECIPE).experts
    assert json.loads(metadata["motionmerge.inputs"])["base"] == recipe.inputs["base"].sha256


def test_the_written_recipe_gives_the_same_experts_again(folder):
    merge(folder / "recipe.yaml", folder / "out" / "deep")
    again = folder / "out" / "deep" / "recipe.yaml"
    assert all(entry.sha256 for entry in Recipe.load(again).inputs.values())
    merge(again, folder / "again")
    for name in ("dynamics", "consistency"):
        first, second = (
            read_all(folder / out / f"{name}.safetensors") for out in ("out/deep", "again")
        )
        assert all(same_bits(first[key], second[key]) for key in first)


def test_a_dry_run_writes_nothing_and_counts_what_it_would_touch(folder):
    report = merge(folder / "recipe.yaml", folder / "out", dry_run=True)
    assert not (folder / "out").exists()
    assert report.dry_run and report.bytes_read == report.bytes_written == 0
    expert = report.experts["dynamics"]
    assert (expert.num_tensors, expert.computed, expert.copied) == (9, 7, 2)
    assert expert.touched["temporal"] == 16 * 16 + 8 * 8 * 3
    assert "Dry run" in str(report)


def test_a_merge_says_which_knobs_are_no_weights_and_refuses_knobs_alone(folder):
    schedule = "schedule:\n  - {expert: a, above: 0.5, guidance: 3}\n  - {expert: b}\n"
    inputs = "inputs: {base: base.safetensors, tuned: tuned.safetensors}\nexperts: "
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{inputs}{{a: tuned - 0.5 * (tuned - base), b: tuned}}\n{schedule}")
    for dry_run in (True, False):
        report = merge(recipe, folder / "out", dry_run=dry_run)
        assert report.knobs == ("a (guidance 3)",)
        assert "Not in the weights, but in recipe.yaml: a (guidance 3).\n" in str(report)
    assert report.to_dict()["knobs"] == ("a (guidance 3)",)
    assert "guidance: 3" in (folder / "out" / "recipe.yaml").read_text()
    recipe.write_text(f"{inputs}{{a: base, b: tuned}}\n{schedule}")
    with pytest.raises(RecipeError, match="nothing to merge"):
        merge(recipe, folder / "out", overwrite=True)
    recipe.write_text(f"{inputs}{{a: base, b: tuned}}\n{schedule.replace(', guidance: 3', '')}")
    assert merge(recipe, folder / "out", overwrite=True).knobs == ()


def test_the_report_counts_matched_unchanged_copied_and_touched(folder, states):
    base, tuned = states
    tuned["unet.conv_in.weight"] = base["unet.conv_in.weight"].clone()
    save_weights(folder / "tuned.safetensors", tuned)
    (folder / "recipe.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        'experts:\n  merged: base + only(tuned - base, "re:conv")\n'
    )
    report = merge(folder / "recipe.yaml", folder / "out")
    expert = report.experts["merged"]
    assert (report.matched, report.unchanged, report.unmatched) == (9, 1, {})
    assert (expert.computed, expert.copied) == (3, 6)
    assert expert.touched.keys() == {"residual", "temporal"}
    assert expert.survived == 1.0 and expert.cosine == pytest.approx(1.0)
    assert report.seconds > 0 and report.gigabytes_per_second > 0
    assert json.loads(json.dumps(report.to_dict()))["experts"]["merged"]["copied"] == 6


def test_a_change_that_bf16_swallows_is_reported_and_warned_of(folder):
    base, _ = make_pair(torch.bfloat16)
    generator = torch.Generator().manual_seed(9)
    tuned = {
        name: value.float() + 1e-5 * torch.randn(value.shape, generator=generator)
        if value.ndim
        else value
        for name, value in base.items()
    }
    save_weights(folder / "base.safetensors", base)
    save_weights(folder / "tuned.safetensors", tuned)
    (folder / "recipe.yaml").write_text(
        "inputs: {base: base.safetensors, tuned: tuned.safetensors}\n"
        "experts: {merged: base - 0.25 * (tuned - base)}\n"
    )
    swallowed = merge(folder / "recipe.yaml", folder / "bf16")
    assert swallowed.experts["merged"].survived < 0.3
    assert "swallowed" in swallowed.warnings[0] and "Warning:" in str(swallowed)
    kept = merge(folder / "recipe.yaml", folder / "fp32", dtype="fp32")
    assert kept.experts["merged"].survived > 0.99
    assert not kept.warnings
    written = read_all(folder / "fp32" / "merged.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float32, torch.int64}


def test_tensors_on_one_side_only_need_a_policy(folder, states):
    tuned = states[1]
    extra = "unet.down_stages.0.temporal_attention.fusion.proj.weight"
    save_weights(folder / "tuned.safetensors", tuned | {extra: torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"fusion(.|\n)*not in base(.|\n)*--add-adapter"):
        merge(folder / "recipe.yaml", folder / "out")
    assert not (folder / "out").exists()
    report = merge(folder / "recipe.yaml", folder / "out", missing="keep")
    assert report.unmatched == {extra: ("base",)}
    assert extra not in read_all(folder / "out" / "dynamics.safetensors")
    assert torch.equal(
        read_all(folder / "out" / "consistency.safetensors")[extra], torch.ones(4, 4)
    )
    with pytest.raises(ConfigError, match="missing"):
        merge(folder / "recipe.yaml", folder / "other", missing="ignore")


def test_inputs_without_a_common_name_are_refused(folder):
    save_weights(folder / "tuned.safetensors", {"other": torch.ones(2, 2)})
    for missing in ("error", "keep"):
        with pytest.raises(CheckpointError, match="in common"):
            merge(folder / "recipe.yaml", folder / "out", missing=missing)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_an_input_is_refused_and_nothing_is_left(folder, states, bad):
    states[1]["image_projector.latents"][0, 0, 0] = bad
    save_weights(folder / "tuned.safetensors", states[1])
    with pytest.raises(CheckpointError, match=r"`image_projector\.latents` of `tuned`"):
        merge(folder / "recipe.yaml", folder / "out")
    assert not list((folder / "out").glob("*")) and not list((folder / "out").glob(".*"))
    merge(folder / "recipe.yaml", folder / "out", allow_nonfinite=True)


def test_a_shape_mismatch_is_noticed_before_anything_is_written(folder, states):
    states[1]["unet.conv_in.bias"] = torch.zeros(1)
    save_weights(folder / "tuned.safetensors", states[1])
    with pytest.raises(ShapeError, match=r"unet\.conv_in\.bias"):
        merge(folder / "recipe.yaml", folder / "out")
    assert not (folder / "out").exists()


def test_a_result_never_replaces_an_input(folder):
    (folder / "base.safetensors").rename(folder / "dynamics.safetensors")
    recipe = Recipe.load(folder / "recipe.yaml")
    with pytest.raises(CheckpointError, match="replace the input `base`"):
        merge(recipe, folder, inputs={"base": folder / "dynamics.safetensors"}, overwrite=True)


def test_an_existing_result_is_replaced_only_when_asked(folder):
    merge(folder / "recipe.yaml", folder / "out")
    with pytest.raises(ConfigError, match="overwrite=True"):
        merge(folder / "recipe.yaml", folder / "out")
    merge(folder / "recipe.yaml", folder / "out", overwrite=True)


def test_a_result_that_cannot_be_written_ends_with_an_error(folder):
    (folder / "out" / "consistency.safetensors").mkdir(parents=True)
    with pytest.raises((CheckpointError, OSError)):
        merge(folder / "recipe.yaml", folder / "out", overwrite=True)


def test_progress_reaches_the_total(folder):
    seen = []
    report = merge(folder / "recipe.yaml", folder / "out", progress=lambda *p: seen.append(p))
    assert seen[-1] == (report.bytes_written, report.bytes_written)
    assert seen == sorted(seen)


def test_state_dicts_in_memory_replace_files(folder, states):
    from_memory = realise(folder / "recipe.yaml", inputs={"base": states[0], "tuned": states[1]})
    from_files = realise(folder / "recipe.yaml", experts=["consistency"])
    assert from_files.keys() == {"consistency"}
    tensors = from_files["consistency"]
    assert all(same_bits(from_memory["consistency"][name], tensors[name]) for name in tensors)


def test_experts_in_memory_share_no_storage(folder):
    computed = realise(folder / "recipe.yaml")
    storages = [t.data_ptr() for tensors in computed.values() for t in tensors.values()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("fails", [False, True])
def test_tensors_are_freed_at_once_and_not_by_a_later_collection(folder, states, fails):
    if fails:
        states[1]["unet.conv_in.weight"][0] = torch.nan
    inputs = dict(zip(("base", "tuned"), states, strict=True))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CheckpointError) if fails else nullcontext():
            realise(folder / "recipe.yaml", inputs=inputs)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_an_unknown_expert_names_the_nearest(folder):
    with pytest.raises(RecipeError, match="`dynamics`"):
        realise(folder / "recipe.yaml", experts=["dynamic"])


def test_the_package_itself_can_be_called(folder):
    report = motionmerge.merge(folder / "recipe.yaml", folder / "out")
    assert set(report.experts) == {"dynamics", "consistency"}
