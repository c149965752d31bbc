"""Flow pictures follow the published color wheel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motionmerge.evaluation.flow import (
    dense_flow,
    flow_legend,
    flow_picture,
    lengths,
    shared_scale,
    to_gray,
)

WHEEL = {  # flow (x, y) at a scale of 10 pixels; Baker et al. 2011
    (0, 0): (255, 255, 255),
    (10, 0.001): (255, 0, 0),
    (-10, 0.001): (0, 209, 255),
    (0.001, 10): (255, 229, 0),
    (0.001, -10): (88, 0, 255),
    (5, 5): (255, 155, 74),
    (-5, 5): (97, 255, 74),
    (5, -5): (230, 74, 255),
    (-5, -5): (74, 111, 255),
    (2, 1): (255, 213, 197),
}


@pytest.mark.parametrize(("flow", "color"), WHEEL.items())
def test_colors_agree_with_the_published_wheel(flow, color):
    picture = flow_picture(np.array([[flow]], dtype=np.float32), scale=10.0)
    assert np.abs(picture[0, 0].astype(int) - color).max() <= 1


def test_lengths_are_the_same_bits_wherever_in_memory_they_come_to_lie():
    random = np.random.default_rng(0)
    for shape in ((101, 203), (288, 512), (192, 288), (20, 30), (33, 57), (384, 512)):
        flow = random.normal(size=(*shape, 2)).astype(np.float32)
        kept = [lengths(flow) for _ in range(64)]  # beside each other, not all on round addresses
        assert len({one.tobytes() for one in kept}) == 1
        np.testing.assert_allclose(kept[0], np.hypot(*np.moveaxis(flow, -1, 0)), rtol=1e-6)


def test_a_shift_is_seen_as_flow_and_sets_the_scale():
    noise = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(96, 96), mode="bicubic").clamp(0, 1)[0]
    video = torch.stack([smooth, smooth.roll(3, dims=2)])
    flow = dense_flow(*to_gray(video.permute(0, 2, 3, 1).numpy()))
    inside = flow[16:-16, 16:-16]
    assert np.median(inside[..., 0]) == pytest.approx(3, abs=0.1)
    assert np.median(inside[..., 1]) == pytest.approx(0, abs=0.1)
    assert shared_scale([flow]) >= 2.9


def test_the_legend_is_white_in_the_middle_and_outside():
    legend = flow_legend(65)
    assert (legend[32, 32] > 245).all()
    assert (legend[0, 0] == 255).all()
