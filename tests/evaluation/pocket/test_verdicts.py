"""The words on a page are those of the numbers, whatever these are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motionmerge.evaluation.camera import Move
from motionmerge.evaluation.pocket.conditions import pick_conditions
from motionmerge.evaluation.pocket.motion import ActorMeasures, ClipMeasures
from motionmerge.evaluation.pocket.report import PageClip, Shot
from motionmerge.evaluation.pocket.runs import ClipResult, ConditionResults
from motionmerge.evaluation.pocket.typical import STAGES, typical_shots
from motionmerge.evaluation.pocket.verdicts import (
    damage,
    disobedience,
    result_sentence,
    what_to_look_for,
)
from motionmerge.evaluation.report.embedding import EmbeddedVideo
from motionmerge.models.pocket.language import Actor, Program

NUM = 24
PROGRAM = Program((Actor("blue", "ball", ("up", "right")),), "tilts up", camera_is_captioned=True)
GOOD = ActorMeasures(
    displacements=((0.0, -9.0), (9.0, 0.0)),
    directions_right=(True, True),
    area_ratio=1.0,
    intact=True,
    overlap=0.85,
)
CLIP = ClipMeasures(
    camera=Move(height=64, width=64, shift=(0.0, 6.0)),
    actors=(GOOD,),
    first_frame_db=60.0,
    background_db=30.0,
    lost=0.01,
)


def results(degree, *, did, whole, camera_right=True):
    """Make results of which the first prompts did as told, and the first are whole."""
    clips = tuple(
        ClipResult(
            prompt=i,
            degree=degree + 0.1 * (i % 3),
            camera="pans left",
            camera_right=camera_right,
            obeyed=i < did,
            direction_right=1.0,
            intact=True,
            whole=i < whole,
            first_frame_db=60.0,
            background_db=30.0,
            difficulty="plain",
            camera_moves=True,
        )
        for i in range(NUM)
    )
    return ConditionResults(pick_conditions(["base"])[0], clips)


def test_what_is_right_has_no_faults():
    assert disobedience(CLIP, PROGRAM) == []
    assert damage(CLIP, PROGRAM) == []


def test_a_wrong_camera_disobeys_where_the_prompt_names_it():
    wrong = replace(CLIP, camera=Move(height=64, width=64, shift=(0.0, -6.0)))
    assert disobedience(wrong, PROGRAM) == [
        "the camera tilts down; the prompt says that it tilts up"
    ]
    assert disobedience(wrong, replace(PROGRAM, camera_is_captioned=False)) == []


@pytest.mark.parametrize(
    ("moved", "right", "said"),
    [
        (((0.0, 5.0), (9.0, 0.0)), (False, True), "goes down instead of up in the first half"),
        (((0.0, -9.0), (0.2, 0.1)), (True, False), "stands still instead of right in the second"),
        (((0.0, -2.0), (9.0, 0.0)), (False, True), "hardly moves instead of up in the first half"),
        (((0.0, -9.0), (float("nan"),) * 2), (True, False), "is gone instead of right in the sec"),
    ],
)
def test_a_wrong_move_is_told_with_its_half(moved, right, said):
    wrong = replace(CLIP, actors=(replace(GOOD, displacements=moved, directions_right=right),))
    (fault,) = disobedience(wrong, PROGRAM)
    assert fault.startswith(f"the blue ball {said}")


def test_a_straight_move_that_is_wrong_throughout_is_told_once():
    program = Program((Actor("red", "box", ("left",)),), "rests")
    own = replace(GOOD, displacements=((5.0, 0.0), (5.0, 0.0)), directions_right=(False, False))
    assert disobedience(replace(CLIP, actors=(own,)), program) == [
        "the red box goes right instead of left throughout"
    ]


def test_damage_names_what_breaks():
    split, gone = replace(GOOD, overlap=0.45), replace(GOOD, intact=False, area_ratio=0.0)
    assert damage(replace(CLIP, actors=(split,)), PROGRAM) == ["the blue ball splits or smears"]
    assert damage(replace(CLIP, actors=(gone,)), PROGRAM) == ["the blue ball vanishes"]
    assert damage(replace(CLIP, lost=1.3), PROGRAM) == ["the photo tears or is lost"]


def test_what_to_look_for_is_what_the_prompt_says():
    assert what_to_look_for(PROGRAM) == (
        "the blue ball going up and then right and the photo sliding down, as the camera tilts up."
    )
    silent = what_to_look_for(replace(PROGRAM, camera_is_captioned=False))
    assert "says nothing" in silent


def test_the_result_is_told_as_it_came_out():
    tuned = results(2.0, did=12, whole=20)
    better = result_sentence(results(8.0, did=22, whole=20), tuned)
    assert "camera farther than the fine-tuned weights (8.1 against 2.1 px, 3.9 times" in better
    assert "says more often (92 against 50 %" in better
    assert "whole neither measurably more often nor less often (83 against 83 %" in better
    worse = result_sentence(results(1.0, did=2, whole=5), tuned)
    assert "less far than" in worse
    assert "says less often (8 against 50 %" in worse
    assert "whole less often" in worse
    assert "times as far" not in worse


def test_a_clip_with_the_wrong_camera_did_not_do_all():
    assert not any(
        clip.did_all for clip in results(8.0, did=NUM, whole=NUM, camera_right=False).clips
    )


def test_typical_prompts_have_the_badges_that_most_clips_have():
    measured = {title: results(5.0, did=20, whole=4) for title in STAGES}

    def shot(name, *, faults, harm, tells_all=True):
        clips = tuple(
            PageClip(
                title=title,
                video=EmbeddedVideo(uri=None),
                degree=5.0,
                camera="pans left",
                disobedience=("x",) * faults,
                damage=("y",) * harm,
            )
            for title in (*STAGES, "Reversed")
        )
        return Shot(prompt=name, look_for="", tells_all=tells_all, photo="", clips=clips)

    shots = [
        shot("odd", faults=1, harm=0),
        shot("half", faults=0, harm=1, tells_all=False),
        shot("near", faults=0, harm=0),
        shot("typical", faults=0, harm=1),
        shot("typical, later", faults=0, harm=1),
    ]
    assert typical_shots(shots, measured) == [3, 4]
