"""What is in a file is found by decoding it, and any of its frames are found again."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from motionmerge.errors import DataError
from motionmerge.io.clips import FrameTimes, _by_seeking, frames_at, survey_clip
from motionmerge.io.cuts import THUMBNAIL, find_cuts
from motionmerge.io.decoding import ClipPlace, open_clip

NUM, HEIGHT, WIDTH = 60, 48, 64


def numbered(num=NUM):
    """Make frames whose left half is their number in gray, so that each is known by its mean."""
    frames = np.full((num, HEIGHT, WIDTH, 3), 30, np.uint8)
    frames[:, :, : WIDTH // 2] = (40 + 3 * np.arange(num, dtype=np.uint8))[:, None, None, None]
    frames[:, :8, WIDTH // 2 :, 0] = 220  # a corner that shows how it is turned
    return frames


def numbers_in(frames):
    return [round((float(frame[20:30, 8:24].mean()) - 40) / 3) for frame in frames]


def write(path, times, *, codec="libx264", rotation=0, ratio=None, step=10):
    """Write numbered frames to be shown at these milliseconds."""
    options = {"g": str(step), "crf": "4", "bf": "2"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuv420p" if codec == "libx264" else "yuvj420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this version of PyAV writes no rotation")
            stream.set_display_rotation(rotation)
        packets = []
        for array, time in zip(numbered(len(times)), sorted(times), strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet, time in zip(packets, times, strict=True):
            if codec != "libx264":  # every frame is a packet of its own, in their order
                packet.pts = time + 200  # never before the time at which it is decoded
            container.mux(packet)
    return ClipPlace(path)


EVEN = list(range(0, 40 * NUM, 40))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clips") / "even.mp4", EVEN)


def test_an_even_file_is_what_it_says(even):
    survey = survey_clip(even)
    assert survey.size == (HEIGHT, WIDTH)
    assert (survey.times.num_frames, survey.times.rate) == (NUM, 25)
    assert survey.times.duration == pytest.approx(2.4)
    assert survey.notes == () and survey.shots == [(0, NUM)]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_any_frames_are_found_again_by_their_times(name, tmp_path):
    place = write(tmp_path / name, EVEN, codec="mjpeg" if name.endswith("avi") else "libx264")
    times = survey_clip(place).times
    assert _by_seeking(place, [45, 50], times, None) is not None
    rng = np.random.default_rng(0)
    for start, step in zip(rng.integers(0, 40, 12), rng.integers(1, 3, 12), strict=True):
        indices = [int(start) + int(step) * number for number in range(8)]
        assert numbers_in(frames_at(place, indices, times=times)) == indices
    assert numbers_in(frames_at(place, [50, 3, 50], times=times)) == [50, 3, 50]


def test_a_rate_that_varies_is_kept_as_times(tmp_path):
    steps = [40, 20, 300, 35] * 15
    milliseconds = np.cumsum([0, *steps[:-1]]).tolist()
    place = write(tmp_path / "x.mkv", milliseconds)
    survey = survey_clip(place)
    assert survey.times.seconds == pytest.approx(np.array(milliseconds) / 1000)
    assert "varies" in survey.notes[0]
    assert FrameTimes.from_json(survey.times.to_json()) == survey.times
    assert numbers_in(frames_at(place, [55, 30], times=survey.times)) == [55, 30]


def test_times_that_do_not_rise_are_named_and_frames_read_in_order(tmp_path):
    milliseconds = EVEN.copy()
    milliseconds[31], milliseconds[32] = milliseconds[32], milliseconds[31]
    place = write(tmp_path / "x.mkv", milliseconds, codec="mjpeg")
    survey = survey_clip(place)
    assert survey.times.ticks is None and "do not rise" in survey.notes[0]
    assert survey.times.rate == pytest.approx(25, rel=0.05)
    indices = [29, 30, 31, 32, 33]
    assert numbers_in(frames_at(place, indices, times=survey.times)) == indices


def test_a_turned_file_is_upright(tmp_path):
    place = write(tmp_path / "x.mp4", EVEN[:20], rotation=90)
    survey = survey_clip(place)
    assert survey.size == (WIDTH, HEIGHT)
    frame = frames_at(place, [5], times=survey.times)[0]
    whole = frames_at(place, [5], times=survey.times, size=(32, 24))[0]
    assert frame.shape == (WIDTH, HEIGHT, 3) and whole.shape == (32, 24, 3)
    # The red strip was above on the right; a quarter turn against the clock takes it to the left.
    assert frame[4:28, 2:5, 0].mean() > 180 and whole[2:14, :3, 0].mean() > 150


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    place = write(tmp_path / "x.mp4", EVEN[:5], ratio=Fraction(3, 2))
    survey = survey_clip(place)
    assert survey.size == (HEIGHT, 96) and "not square" in survey.notes[0]
    assert frames_at(place, [1], times=survey.times).shape == (1, HEIGHT, 96, 3)


def test_frames_are_scaled_until_they_cover_the_size(even):
    times = survey_clip(even).times
    assert frames_at(even, [1], times=times, size=(24, 24)).shape == (1, 24, 24, 3)
    assert frames_at(even, [1, 2], times=times, size=(30, 96)).shape == (2, 30, 96, 3)


def test_a_part_of_a_file_is_read_as_a_file(even, tmp_path):
    content = even.path.read_bytes()
    (tmp_path / "x.tar").write_bytes(b"before" + content + b"after" * 999)
    part = ClipPlace(tmp_path / "x.tar", 6, len(content))
    survey = survey_clip(part)
    assert survey == survey_clip(even)
    assert numbers_in(frames_at(part, [40, 44], times=survey.times)) == [40, 44]


def test_animated_pictures_are_read_too(tmp_path):
    images = [Image.fromarray(one) for one in numbered()[::7]]
    for suffix in ("gif", "webp"):
        path = tmp_path / f"x.{suffix}"
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
        times = survey_clip(ClipPlace(path)).times
        assert (times.num_frames, times.rate) == (9, 10)
        found = frames_at(ClipPlace(path), [7], times=times, size=(HEIGHT, WIDTH))
        assert numbers_in(found) == [49]


def test_a_file_that_is_not_the_surveyed_one_is_refused(even, tmp_path):
    times = survey_clip(even).times
    other = write(tmp_path / "other.mp4", [33 * number for number in range(NUM)])
    with pytest.raises(DataError, match=r"other\.mp4: It is not the video"):
        frames_at(other, [30], times=times)
    with pytest.raises(DataError, match="has 60"):
        frames_at(even, [60], times=times)


def flipped(content):
    """Flip bits in the second half of the pictures."""
    damaged = np.frombuffer(content, np.uint8).copy()
    start = content.index(b"mdat") + 4
    end = content.index(b"moov")
    middle = (start + end) // 2
    damaged[middle:end] ^= 0x5A
    return damaged.tobytes()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: b"", "no bytes"),
        (lambda whole: b"not a video at all" * 99, "cannot be decoded"),
        (lambda whole: whole[: len(whole) // 2], "cannot be decoded"),
        (flipped, "after [0-9]+ frames|header says 60 frames"),
        (lambda whole: b"#EXTM3U\n#EXTINF:9,\neven.mp4\n#EXT-X-ENDLIST\n", "cannot be decoded"),
    ],
    ids=["empty", "text", "truncated", "flipped bits", "playlist"],
)
def test_what_is_wrong_with_a_file_is_named(damage, reason, even, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(damage(even.path.read_bytes()))
    try:
        found = "; ".join(survey_clip(ClipPlace(path)).notes)
    except DataError as error:
        found = error.message
    assert re.search(reason, found), found


def test_no_file_one_frame_and_several_sizes_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        survey_clip(ClipPlace(tmp_path / "none.mp4"))
    with pytest.raises(DataError, match="one frame"):
        survey_clip(write(tmp_path / "one.mp4", [0]))
    tiny = io.BytesIO()
    Image.new("RGB", (12, 12)).save(tiny, "GIF")
    (tmp_path / "tiny.gif").write_bytes(tiny.getvalue())
    with pytest.raises(DataError, match="the least"):
        survey_clip(ClipPlace(tmp_path / "tiny.gif"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 10**9},
        {"base": [0, 1]},
        {"runs": [[0, 40, 5]]},
        {"runs": [[0, -40, NUM - 1]]},
        {"runs": [[0, 40, 10**9]]},
    ],
)
def test_times_from_a_stranger_are_checked(wrong, even):
    content = survey_clip(even).times.to_json() | wrong
    with pytest.raises((ValueError, TypeError)):
        FrameTimes.from_json(content)


def shot(seed, num, *, step=1):
    """Make thumbnails of a smooth picture that goes to the right."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 12, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((32 * 4, 18), Image.Resampling.BICUBIC))
    return np.stack([np.roll(wide, step * number, axis=1)[:, :32] for number in range(num)])


def test_cuts_are_found_and_moves_flashes_and_doubled_frames_are_not():
    assert THUMBNAIL == (18, 32)
    two = np.concatenate([shot(1, 12), shot(2, 3), shot(3, 9)])
    assert find_cuts(two) == [12, 15]
    assert find_cuts(shot(4, 20, step=8)) == []
    flash = shot(5, 20)
    flash[9] = 255
    assert find_cuts(flash) == []
    assert find_cuts(np.repeat(shot(6, 12, step=8), 2, axis=0)) == []
    assert find_cuts(np.repeat(two, 2, axis=0)) == [24, 30]
    assert find_cuts(two[:1]) == []


def test_cuts_of_a_file_bound_its_shots(tmp_path):
    path = tmp_path / "x.gif"
    images = [Image.fromarray(one).resize((64, 36)) for one in [*shot(1, 9), *shot(2, 8)]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    survey = survey_clip(ClipPlace(path))
    assert survey.shots == [(0, 9), (9, 17)]
    assert replace(survey, cuts=()).shots == [(0, 17)]
    with open_clip(ClipPlace(path)) as opened:
        assert next(opened.frames).size == (36, 64)
