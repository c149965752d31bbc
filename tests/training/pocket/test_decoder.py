"""The decoder's objective."""

from __future__ import annotations

import numpy as np
import torch

from motionmerge.models.pocket.autoencoder import PocketAutoencoder
from motionmerge.models.pocket.language import Actor, Program
from motionmerge.models.pocket.world import SIZE, TRAINING_PHOTOS, Canvases, Scene, render
from motionmerge.training.pocket.decoder import _Decode, _near_objects, decoder_loss


def test_a_batch_costs_the_mean_of_its_samples_however_it_is_shared_out():
    torch.manual_seed(0)
    autoencoder = PocketAutoencoder()
    canvases = Canvases(6, photos=TRAINING_PHOTOS[:1], rng=np.random.default_rng(0))

    def loss(*indices: int) -> float:
        decode = _Decode(autoencoder)
        with torch.no_grad():
            return float(
                decoder_loss(decode, indices, autoencoder=autoencoder, seed=0, canvases=canvases)
            )

    assert np.isclose(loss(4, 5, 6), (loss(4) + loss(5) + loss(6)) / 3, rtol=1e-4)
    assert loss(4) != loss(5)


def test_what_an_object_uncovers_counts_as_near_it_and_what_the_camera_brings_in_does_not():
    canvases = Canvases(1, photos=TRAINING_PHOTOS[:1], rng=np.random.default_rng(0))
    program = Program((Actor("red", "ball", ("right",)),), "pans right")
    scene = Scene(program, 12.0, ((32.0, 32.0),), 0)
    near = _near_objects(render([scene], canvases, np.array([0.0, 1.0])))[0, 0]
    assert near[32, 31]  # the ball, carried 12 to the left and moved 11 to the right
    assert near[32, 20]  # where it would be had it stayed on the picture
    assert not near[:, SIZE - 12 :].any()  # came in on the right
