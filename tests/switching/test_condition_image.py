"""The condition image is read and written where each family has it, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from motionmerge.switching.condition_image import (
    BesideLatents,
    ImagePlace,
    InArgument,
    InFirstFrame,
    InFirstFrameChannelsLast,
    InFirstTokens,
)

HEIGHT, WIDTH = 2, 5
Cut = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("place", "shape", "cut"),
    [
        (BesideLatents(mask_before=4), (2, 12, 3, HEIGHT, WIDTH), lambda x: x[:, 8:]),
        (BesideLatents(mask_after=1), (2, 9, 3, HEIGHT, WIDTH), lambda x: x[:, 4:8]),
        (BesideLatents(axis=2), (2, 3, 8, HEIGHT, WIDTH), lambda x: x[:, :, 4:]),
        (InFirstFrame(), (2, 4, 3, HEIGHT, WIDTH), lambda x: x[:, :, :1]),
        (
            InFirstFrameChannelsLast(),
            (2, 3, HEIGHT, WIDTH, 9),
            lambda x: x[:, :1, :, :, :4].permute(0, 4, 1, 2, 3),
        ),
        (
            InFirstTokens(),
            (2, 3 * HEIGHT * WIDTH, 4),
            lambda x: x[:, : HEIGHT * WIDTH].reshape(2, HEIGHT, WIDTH, 4).permute(0, 3, 1, 2),
        ),
        (InArgument("sample"), (2, 4, 1, HEIGHT, WIDTH), lambda x: x),
    ],
)
def test_an_image_is_read_and_written_in_its_place_alone(
    place: ImagePlace, shape: tuple[int, ...], cut: Cut
) -> None:
    sample = torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape)
    before, given = sample.clone(), {"sample": sample, "height": HEIGHT, "width": WIDTH}
    image = place.read(given)
    assert image.shape[-2:] == (HEIGHT, WIDTH)
    assert torch.equal(image, cut(sample))
    written = place.write(given, -image)
    assert torch.equal(place.read(written), -image)
    changed = written["sample"]
    assert isinstance(changed, torch.Tensor)
    assert torch.equal(changed.abs(), sample)
    assert (changed < 0).sum() == image.numel()
    assert torch.equal(sample, before)
