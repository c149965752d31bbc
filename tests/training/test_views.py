"""Views depend on (seed, shot, number) alone, stay inside a shot, and have the asked rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motionmerge.errors import ConfigError, DataError
from motionmerge.training.clips_manifest import ClipShot
from motionmerge.training.motion_balance import epoch_order, flattening_weights
from motionmerge.training.views import (
    TrainingShot,
    ViewSettings,
    nearest_size,
    sizes_around,
    usable_shots,
    view_of,
)

SIZES = [(320, 512), (512, 320), (384, 384)]


def test_views_stay_in_their_shot_and_are_the_same_again(make_clip):
    clip = make_clip(range(0, 4000, 40), ClipShot(0, 30, 1.0), ClipShot(30, 100, None))
    settings = ViewSettings(sizes=SIZES, frame_stride=(1, 6), num_frames=16)
    shots, left_out = usable_shots([clip], settings)
    assert len(shots) == 2 and not left_out
    seen = set()
    for shot in shots:
        for number in range(40):
            view = view_of(shot, number, settings)
            assert view == view_of(shot, number, settings)
            assert shot.shot.first <= view.indices[0] and view.indices[-1] < shot.shot.end
            assert set(np.diff(view.indices)) == {view.frame_stride}
            assert view.frame_rate == pytest.approx(25 / view.frame_stride)
            assert view.size == (320, 512)
            seen.add((shot.shot.first, view.frame_stride))
    assert seen == {(0, 1), *((30, stride) for stride in (1, 2, 3, 4))}
    again = settings.model_copy(update={"seed": 1})
    assert [view_of(shots[1], n, again).indices for n in range(9)] != [
        view_of(shots[1], n, settings).indices for n in range(9)
    ]


def test_a_view_does_not_depend_on_the_folder(make_clip):
    settings = ViewSettings(sizes=SIZES, frame_stride=(1, 3))
    one, two = (make_clip(range(0, 4000, 40)) for _ in range(2))
    two = make_clip(range(0, 4000, 40), name="b.mp4", clip=one.clip)
    views = [view_of(TrainingShot(clip, clip.shots[0]), 3, settings) for clip in (one, two)]
    assert views[0].indices == views[1].indices


def test_a_rate_is_met_by_times_also_where_they_vary(make_clip):
    rng = np.random.default_rng(0)
    even = make_clip(range(0, 8000, 40))
    uneven = make_clip(np.cumsum(rng.integers(15, 60, 200)), name="u.mp4")
    settings = ViewSettings(sizes=SIZES, frame_rate=8, num_frames=8)
    shots, _ = usable_shots([even, uneven], settings)
    for shot in shots:
        for number in range(20):
            view = view_of(shot, number, settings)
            times = shot.clip.times.seconds[list(view.indices)]
            assert times - times[0] == pytest.approx(np.arange(8) / 8, abs=0.031)
            assert view.frame_rate == pytest.approx(8, rel=0.06)
            assert view.frame_stride is None


def test_shots_of_which_no_view_can_be_taken_have_a_reason(make_clip):
    short = make_clip(range(0, 400, 40), name="short.mp4")
    slow = make_clip(range(0, 40_000, 400), name="slow.mp4")
    gap = make_clip([0, 40, 80, 120, 2000, 2040, 2080, 2120], name="gap.mp4")
    good = make_clip(range(0, 4000, 40), name="good.mp4")
    shots, left_out = usable_shots(
        [short, slow, gap, good], ViewSettings(sizes=SIZES, frame_rate=10, num_frames=8)
    )
    assert [shot.clip.name for shot in shots] == ["good.mp4"]
    reasons = {one.name.split(",")[0]: one.reason for one in left_out}
    assert "shorter than 8 frames" in reasons["short.mp4"]
    assert "2.5 frames a second" in reasons["slow.mp4"]
    assert "fewer than were asked" in reasons["gap.mp4"]
    strides = ViewSettings(sizes=SIZES, frame_stride=(2, 3), num_frames=16)
    with pytest.raises(DataError, match="too few for 16"):
        usable_shots([short], strides)
    with pytest.raises(DataError, match=r"short\.mp4"):
        view_of(TrainingShot(short, short.shots[0]), 0, strides)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"frame_stride": (1, 2), "frame_rate": 8},
        {"frame_stride": (0, 2)},
        {"frame_stride": (3, 2)},
        {"frame_rate": 0},
        {"frame_rate": 8, "sizes": [(0, 5)]},
        {"frame_rate": 8, "num_frame": 5},
    ],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        ViewSettings(**({"sizes": SIZES} | wrong))


def test_a_clip_gets_the_size_of_the_nearest_shape():
    sizes = sizes_around((320, 512), multiple=64, ratios=(1, 9 / 16, 16 / 9))
    assert sizes == ((320, 512), (384, 384), (512, 320))
    assert nearest_size((1080, 1920), sizes) == (320, 512)
    assert nearest_size((1920, 1080), sizes) == (512, 320)
    assert nearest_size((500, 500), sizes) == (384, 384)
    assert nearest_size((400, 400), [(256, 256), (384, 384), (512, 512)]) == (384, 384)
    assert nearest_size((100, 100), [(256, 256), (384, 384)]) == (256, 256)


@given(st.lists(st.none() | st.floats(0, 1e4), min_size=1, max_size=60), st.floats(1, 50))
def test_weights_are_bounded_and_add_up(motions, most):
    weights = flattening_weights(motions, most=most)
    assert weights.sum() == pytest.approx(1)
    assert weights.max() <= most * weights.min() * (1 + 1e-9)


def test_flattening_shows_fast_shots_more_often():
    motions = [1.0] * 90 + [60.0] * 10
    weights = flattening_weights(motions, most=20)
    order = epoch_order(100, seed=0, epoch=0, weights=weights)
    assert np.isin(order, range(90, 100)).sum() == 50
    bounded = flattening_weights(motions, most=2)
    shown = epoch_order(100, seed=0, epoch=0, weights=bounded)
    assert (np.bincount(shown, minlength=100) <= 2).all()
    with pytest.raises(ConfigError):
        flattening_weights([], most=2)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_without_weights_an_epoch_shows_each_shot_once(num, seed, epoch):
    order = epoch_order(num, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(num))
    assert (order == epoch_order(num, seed=seed, epoch=epoch)).all()
    equal = epoch_order(num, seed=seed, epoch=epoch, weights=np.full(num, 1 / num))
    assert np.bincount(equal, minlength=num).max() <= 2


@pytest.mark.parametrize("size", [(0, 64), (64, 1_000_000)])
def test_sizes_that_no_clip_has_are_refused(size):
    with pytest.raises(ConfigError, match="from 1 to 8192"):
        ViewSettings(sizes=(size,), frame_stride=(1, 6))
