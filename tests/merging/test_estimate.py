"""What a merge will take is said beforehand, by how long earlier merges took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motionmerge.merging.estimate import Work, estimate, remember
from motionmerge.merging.merge import merge, preview

WORK = Work(
    num_tensors=1500,
    bytes_read=6 * 10**9,
    bytes_written=3 * 10**9,
    num_computed=15 * 10**8,
    num_masked=0,
    largest=0,
    num_vectors=2,
    num_sources=2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "motionmerge" / "speed.json"


def test_an_estimate_follows_how_long_the_last_merges_took():
    first = estimate(WORK)
    assert first.num_merges == 0 and first.seconds == WORK.reference_seconds
    for slowdown in (2.0, 3.0, 50.0):
        remember(WORK, seconds=slowdown * WORK.reference_seconds)
    assert estimate(WORK).seconds == pytest.approx(3 * first.seconds)
    for _ in range(5):
        remember(WORK, seconds=0.5 * WORK.reference_seconds)
    assert estimate(WORK).seconds == pytest.approx(0.5 * first.seconds)
    assert estimate(WORK).num_merges == 5


def test_work_that_is_too_small_to_tell_is_not_remembered(cache):
    small = replace(WORK, num_tensors=9, bytes_read=1000, bytes_written=1000, num_computed=500)
    remember(small, seconds=1.0)
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"slowdowns": ["x"]}', '{"slowdowns": [-1, 0]}'])
def test_a_damaged_memory_counts_as_none(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert estimate(WORK).num_merges == 0
    remember(WORK, seconds=2 * WORK.reference_seconds)
    assert estimate(WORK).num_merges == 1


def test_masks_and_whole_tensors_cost_more():
    assert replace(WORK, num_masked=10**9).reference_seconds > WORK.reference_seconds
    whole = replace(WORK, largest=10**8)
    assert estimate(whole).memory_bytes - estimate(WORK).memory_bytes >= 4 * 10**8


def test_a_preview_says_what_the_merge_then_says(folder):
    expected = preview(folder / "recipe.yaml")
    report = merge(folder / "recipe.yaml", folder / "out")
    assert expected.disk_bytes == report.disk_bytes == report.bytes_written
    assert expected.seconds == pytest.approx(report.estimated_seconds)
    assert expected.memory_bytes <= report.estimated_memory
