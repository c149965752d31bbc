"""Programs, captions and the vocabulary of the pocket world."""

from __future__ import annotations

import numpy as np
import pytest

from motionmerge.errors import DataError
from motionmerge.models.pocket.language import (
    CAMERA_MOVES,
    DIRECTIONS,
    OPPOSITE,
    WORDS,
    Actor,
    Program,
    corrupt_program,
    sample_program,
)
from motionmerge.models.pocket.text import MAX_TOKENS, PocketTokenizer


def test_a_caption_tells_moves_in_order_and_the_camera_only_when_captioned():
    actors = (Actor("red", "ball", ("up", "left")), Actor("blue", "box", ("down",)))
    silent = Program(actors, "pans left")
    told = Program(actors, "pans left", camera_is_captioned=True)
    assert silent.caption() == "the red ball moves up then left and the blue box moves down"
    assert told.caption() == silent.caption() + " and the camera pans left"


def test_every_program_fits_the_vocabulary_and_the_token_limit():
    rng = np.random.default_rng(0)
    captions = [sample_program(rng).caption() for _ in range(500)]
    tokens = PocketTokenizer()(captions)
    assert tokens.shape == (500, MAX_TOKENS)
    assert tokens.max() < len(WORDS)


def test_a_move_that_turns_never_turns_back_or_goes_on():
    rng = np.random.default_rng(1)
    for _ in range(300):
        for actor in sample_program(rng).actors:
            first, second = actor.phases
            assert len(actor.moves) == 1 or second not in (first, OPPOSITE[first])


def test_a_wrong_caption_speaks_of_the_same_objects_and_the_same_camera():
    rng = np.random.default_rng(2)
    program = sample_program(rng, actor_shares=(0, 0, 1), camera_caption_share=1)
    wrong = [corrupt_program(rng, program) for _ in range(20)]
    looks = [(a.color, a.shape) for a in program.actors]
    assert all([(a.color, a.shape) for a in w.actors] == looks for w in wrong)
    assert any(w.caption() != program.caption() for w in wrong)
    assert all(w.caption().endswith(f"the camera {program.camera}") for w in wrong)


def test_case_punctuation_and_synonyms_do_not_matter():
    tokenizer = PocketTokenizer()
    plain = tokenizer(["the red box moves up then left and the camera pans right"])
    free = tokenizer(["The red square moves up, then left, while the camera is panning right!"])
    assert plain.equal(free)


def test_an_unknown_word_is_an_error_that_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'elephant'.*(?s:.)*Fix: Use only these words: the moves"):
        PocketTokenizer()(["the red elephant moves left"])


def test_a_misspelt_word_gets_a_suggestion():
    with pytest.raises(DataError, match="Did you mean 'purple'"):
        PocketTokenizer()(["the purpel ball moves left"])


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(DataError, match="the pocket model reads 22"):
        PocketTokenizer()([" and ".join(["the red ball moves left"] * 5)])


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("the camera zooms", "'the camera zooms'"),
        ("the camera pans up", "'the camera pans up'"),
        ("the ball moves left", "'the ball moves left'"),
        ("the red ball", "'the red ball'"),
        ("the red ball moves up and", "'the red ball moves up and'"),
        ("the red ball rests and the camera pans left", "'the red ball rests'"),
        (
            "the red ball moves up then left then down",
            "'the red ball moves up then left then down'",
        ),
        ("left", "'left'"),
        ("the camera pans left and the camera tilts up", "2 moves of the camera"),
        (
            "red ball moves up and blue box moves up and green box moves up",
            "moves 3 things",
        ),
    ],
)
def test_what_is_not_whole_is_refused_with_all_that_is_understood(prompt, named):
    with pytest.raises(DataError) as caught:
        PocketTokenizer()([prompt])
    assert named in caught.value.message
    assert all(move in caught.value.fix for move in (*CAMERA_MOVES, *DIRECTIONS))


def test_articles_and_the_second_verb_may_be_left_out():
    plain = "the red ball moves up then left and the camera pans right"
    free = "red ball moves up, then moves to the left and camera pans to the right"
    tokens = PocketTokenizer()([plain, free, ""])
    assert tokens[0].equal(tokens[1])
    assert tokens[2].count_nonzero() == 2, "an empty prompt says nothing"
