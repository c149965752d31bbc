"""Conditions run through the shipped code path, and no work is done twice."""

from __future__ import annotations

import json

import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.evaluation.pocket.conditions import (
    Condition,
    handover,
    knob,
    method,
    paper_conditions,
    pick_conditions,
)
from motionmerge.evaluation.pocket.decided import decided
from motionmerge.evaluation.pocket.runs import RESULTS_FILE, Protocol, evaluate, read_results
from motionmerge.merging.recipes.recipe import Recipe

PROTOCOL = Protocol(split="validation", num=3, num_inference_steps=1)


def run(random_pocket, folder, *conditions, protocol=PROTOCOL):
    pipeline, inputs = random_pocket
    done: list[tuple[str, int]] = []
    results = evaluate(
        pipeline,
        conditions,
        protocol=protocol,
        folder=folder,
        inputs=inputs,
        progress=lambda name, num: done.append((name, num)),
    )
    return results, done


def test_an_evaluation_goes_on_where_it_was_torn_off(random_pocket, tmp_path):
    results, _ = run(random_pocket, tmp_path, method())
    path = tmp_path / RESULTS_FILE
    whole = path.read_text()
    lines = whole.splitlines()
    assert len(lines) == 3
    path.write_text("\n".join(lines[:2]) + '\n{"key": "torn')
    again, done = run(random_pocket, tmp_path, method())
    assert done == [("paper-0.64", 2), ("paper-0.64", 1)]
    clips, old = again["paper-0.64"].clips, results["paper-0.64"].clips
    assert clips[:2] == old[:2]
    assert clips[2].first_frame_db == pytest.approx(old[2].first_frame_db, abs=1e-3)
    assert sum(len(clips) for clips in read_results(path).values()) == 3


def test_a_clip_does_not_depend_on_its_batch(random_pocket, tmp_path):
    together, _ = run(random_pocket, tmp_path / "a", knob(0.5))
    fewer = Protocol(split="validation", num=1, num_inference_steps=1)
    alone, _ = run(random_pocket, tmp_path / "b", knob(0.5), protocol=fewer)
    one, other = together["knob+0.5"].clips[0], alone["knob+0.5"].clips[0]
    assert one.degree == pytest.approx(other.degree, abs=1e-2)


def test_results_of_other_settings_are_not_used(random_pocket, tmp_path):
    run(random_pocket, tmp_path, handover(0.5))
    _, done = run(random_pocket, tmp_path, handover(0.64))
    assert done == [("handover-0.64", 3)]
    keys = {json.loads(line)["key"] for line in (tmp_path / RESULTS_FILE).open()}
    assert len(keys) == 2


def test_the_model_is_left_as_it_was(random_pocket, tmp_path):
    pipeline, _ = random_pocket
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    run(random_pocket, tmp_path, method())
    assert all(torch.equal(before[name], w) for name, w in pipeline.unet.state_dict().items())


def test_every_condition_is_a_valid_recipe_with_a_name_of_its_own():
    conditions = paper_conditions()
    assert len({one.name for one in conditions}) == len(conditions)
    for one in conditions:
        recipe = one.recipe()
        assert Recipe.parse(recipe.print()) == recipe


def test_the_paper_condition_is_the_shipped_recipe_of_the_paper():
    shipped = Recipe.load("edg-official").written_out()
    ours = method().recipe()
    assert [str(e) for e in ours.experts.values()] == [str(e) for e in shipped.experts.values()]
    assert ours.schedule.entries[0].above == shipped.schedule.entries[0].above


def test_reversing_swaps_the_experts():
    paper = method()
    swapped = paper.reversed()
    assert (swapped.early, swapped.late) == (paper.late, paper.early)
    assert swapped.name == "paper-reversed-0.64"


def test_a_family_can_be_picked_by_name_and_a_wrong_name_is_refused():
    assert {one.family for one in pick_conditions(["handover"])} == {"handover"}
    assert [one.name for one in pick_conditions(["base"])] == ["base"]
    with pytest.raises(ConfigError, match="tuned"):
        pick_conditions(["tunde"])


def test_the_fingerprint_sees_experts_boundary_and_context():
    one = Condition(name="a", early="base", late="tuned", boundary=0.5)
    assert one.fingerprint(seed=0) == Condition(
        name="b", early="base", late="tuned", boundary=0.5
    ).fingerprint(seed=0)
    assert one.fingerprint(seed=0) != one.fingerprint(seed=1)
    assert (
        one.fingerprint()
        != Condition(name="a", early="base", late="tuned", boundary=0.6).fingerprint()
    )


def test_what_moves_the_whole_picture_is_decided_at_higher_noise(random_pocket):
    degree, camera, direction = decided(random_pocket[0].vae, num=9)
    assert camera.level(1) > degree.level(1) > 0
    assert camera.level(1) > direction.level(1)
    assert degree.level(1) > degree.level(3)
