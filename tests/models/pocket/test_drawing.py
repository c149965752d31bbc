"""Objects that a prompt names are painted as the pocket world renders them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from motionmerge.errors import DataError
from motionmerge.models.pocket.drawing import absent_things, draw_things, named_things, places_for
from motionmerge.models.pocket.language import Actor, Program
from motionmerge.models.pocket.world import SIZE, Canvases, Scene, render

PROMPT = "A red circle moving up, and the blue box goes left while the camera pans left"
THINGS = [("red", "ball"), ("blue", "box")]


def test_the_objects_of_a_prompt_are_read_with_their_synonyms():
    assert named_things(PROMPT) == THINGS
    assert named_things("the camera pans left") == []


def test_a_drawn_object_is_where_the_world_renders_it():
    canvases = Canvases(1, photos=[], rng=np.random.default_rng(0), texture_share=1.0)
    canvases.pictures[:] = 128
    places = places_for(PROMPT, seed=3)
    actors = tuple(Actor(color, shape, ("up",)) for color, shape in places)
    scene = Scene(Program(actors, "rests"), 0.0, tuple(places.values()), 0)
    true = render([scene], canvases, np.zeros(1)).video[0, 0]
    drawn = draw_things(Image.new("RGB", (SIZE, SIZE), (128, 128, 128)), places)
    mine = torch.from_numpy(np.array(drawn)).permute(2, 0, 1) / 255
    assert (mine - true).abs().mean() < 0.01
    for color, shape in THINGS:
        x, y = (int(value) for value in places[color, shape])
        assert mine[:, y, x].numpy() == pytest.approx(true[:, y, x].numpy(), abs=0.01)


def test_the_seed_decides_where_an_object_starts():
    assert places_for(PROMPT, seed=1) == places_for(PROMPT, seed=1)
    assert places_for(PROMPT, seed=1) != places_for(PROMPT, seed=2)


@pytest.mark.parametrize(
    "prompt",
    ["the camera pans left", "the red ball moves up and the red box moves up"],
)
def test_what_the_model_does_not_know_is_not_drawn(prompt):
    with pytest.raises(DataError, match="Fix"):
        places_for(prompt, seed=0)


def test_only_what_a_photo_cannot_show_is_called_absent():
    photo = Image.new("RGB", (100, 80), (220, 40, 40))
    assert absent_things(photo, THINGS) == [("blue", "box")]
