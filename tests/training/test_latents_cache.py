"""What is read from the cache is what would be computed, bit for bit; nothing stale is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from motionmerge.errors import DataError
from motionmerge.io.clips import survey_clip
from motionmerge.io.decoding import ClipPlace
from motionmerge.io.video import write_video
from motionmerge.rng import generator_for
from motionmerge.training.latents_cache import LatentsCache, drawn_latents, frame_moments
from motionmerge.training.views import TrainingShot, ViewSettings, view_of

MADE_WITH = {"vae": "sha256:aa", "text": "sha256:bb", "dtype": "bf16"}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    names = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    names["up_block_types"] = ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(latent_channels=4, **blocks, **names).eval()


@pytest.fixture
def views(tmp_path, make_clip):
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    place = ClipPlace(tmp_path / "a.mp4")
    write_video(place.path, frames, fps=25)
    times = survey_clip(place).times
    clip = make_clip(range(0, 800, 40), place=place, size=(32, 48), times=times)
    settings = ViewSettings(sizes=[(16, 24)], frame_stride=(1, 3), num_frames=4)
    return [view_of(TrainingShot(clip, clip.shots[0]), number, settings) for number in range(3)]


def maker(vae):
    def make(view):
        return {"moments": frame_moments(vae, view.read()), "text": torch.ones(2, 3)}

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_and_uncached_latents_are_equal_bit_for_bit(dtype, vae, views, tmp_path):
    own = vae.to(dtype)
    cache = LatentsCache(tmp_path / "cache", made_with=MADE_WITH)
    first = cache.read_or_make(views[0], maker(own))
    cached = LatentsCache(tmp_path / "cache", made_with=MADE_WITH).read(views[0])
    computed = frame_moments(own, views[0].read())
    assert cached["moments"].dtype == dtype and cached["moments"].shape == (4, 8, 8, 12)
    assert torch.equal(cached["moments"], computed) and torch.equal(first["text"], cached["text"])
    for sample in (0, 7):
        latents = drawn_latents(cached["moments"], seed=1, sample=sample)
        assert torch.equal(latents, drawn_latents(computed, seed=1, sample=sample))
    other = drawn_latents(computed, seed=1, sample=8)
    assert latents.shape == (4, 4, 8, 12) and not torch.equal(latents, other)
    vae.to(torch.float32)


def test_a_posterior_is_drawn_from_as_diffusers_does(vae, views):
    pixels = torch.from_numpy(views[0].read()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    expected = posterior.sample(generator_for(2, "posterior", "3"))
    drawn = drawn_latents(frame_moments(vae, views[0].read()), seed=2, sample=3)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(vae, views, tmp_path):
    cache = LatentsCache(tmp_path / "cache", made_with=MADE_WITH)
    made = []

    def make(view):
        made.append(view.number)
        return maker(vae)(view)

    for view in [*views, *views]:
        cache.read_or_make(view, make)
    assert made == [0, 1, 2]
    path = cache.path(views[1])
    path.write_bytes(path.read_bytes()[:-100])
    assert cache.survey(views).missing == (views[1],)
    cache.read_or_make(views[1], make)
    assert made == [0, 1, 2, 1] and cache.survey(views).missing == ()
    cache.path(views[2]).write_bytes(cache.path(views[0]).read_bytes())  # another view's content
    assert cache.read(views[2]) is None and cache.survey(views).missing == (views[2],)


def test_a_flipped_bit_is_found_before_it_is_trained_on(vae, views, tmp_path):
    cache = LatentsCache(tmp_path / "cache", made_with=MADE_WITH)
    cache.read_or_make(views[0], maker(vae))
    path = cache.path(views[0])
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert cache.survey(views[:1]).missing == ()
    with pytest.raises(DataError, match=f"{path.name} is damaged(?s:.)*Remove it"):
        cache.read(views[0])


def test_other_weights_captions_or_bytes_have_other_files_and_old_ones_are_stale(
    vae, views, tmp_path
):
    folder = tmp_path / "cache"
    cache = LatentsCache(folder, made_with=MADE_WITH)
    cache.read_or_make(views[0], maker(vae))
    view, clip = views[0], views[0].shot.clip
    for change in ({"caption": "a dog"}, {"clip": "f" * 64}):
        other = replace(view, shot=TrainingShot(replace(clip, **change), view.shot.shot))
        assert cache.read(other) is None
    assert cache.read(replace(view, size=(24, 16))) is None
    newer = LatentsCache(folder, made_with={**MADE_WITH, "vae": "sha256:cc"})
    state = newer.survey(views)
    assert (state.whole, len(state.missing)) == (0, 3)
    assert state.stale == (cache.path(view),) and state.num_bytes > 0
    with pytest.raises(DataError, match="no file of the cache"):
        newer.remove([clip.place.path])
    assert newer.remove(state.stale) == state.num_bytes
    assert newer.survey(views).num_bytes == 0


def test_a_view_that_cannot_be_made_leaves_nothing(views, tmp_path):
    cache = LatentsCache(tmp_path / "cache", made_with=MADE_WITH)
    views[0].shot.clip.place.path.unlink()
    with pytest.raises(DataError, match=r"a\.mp4: There is no such file"):
        cache.read_or_make(views[0], lambda view: {"x": torch.from_numpy(view.read())})
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
