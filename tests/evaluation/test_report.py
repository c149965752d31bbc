"""A report pairs videos, shows the worst first, needs no other file, and runs nobody's script."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.evaluation.report.page import write_report
from motionmerge.evaluation.report.scenes import order_scenes
from motionmerge.evaluation.report.sets import Figure, ReportSet, split_name
from motionmerge.evaluation.report.table import compare_sets, to_csv, to_latex
from motionmerge.evaluation.runs import Measured
from motionmerge.evaluation.sources import VideoSource
from motionmerge.io.video import read_frames, write_video

from ..tiny.browser import PROGRAM, Browser

HOSTILE = '<img src=x onerror="alert(1)">&\'</script>'


@pytest.fixture(scope="module")
def video(tmp_path_factory, moving):
    path = tmp_path_factory.mktemp("report") / "moving.mp4"
    write_video(path, moving(64, 96, num=8, shift=(12.0, 0.0)), fps=8)
    return path


def measured(video, prompt, degree=10.0, *, seed=0, failure=None, frozen=0.0):
    values = {"motion_degree": degree, "camera_label": "static", "frozen_share": frozen}
    source = VideoSource(video, prompt, None, seed)
    return Measured(source=source, clip="0", values={} if failure else values, failure=failure)


def set_of(video, name, degrees, **more):
    those = [measured(video, f"prompt {place}", one) for place, one in enumerate(degrees)]
    return ReportSet(name=name, measured=those, **more)


def test_differences_are_those_of_pairs_and_corrected_over_the_metrics(video):
    first = set_of(video, "base", np.arange(12.0))
    second = set_of(video, "full", np.arange(11.0) + 3)  # the last prompt has no partner
    line = compare_sets([first, second], baseline="base").lines[1]
    change = line.cells["motion_degree"].difference
    assert (change.mean.value, change.num) == (3.0, 11)
    # 2 of the 2^11 choices of signs are as extreme; frozen_share is the second metric.
    assert change.p_value == pytest.approx(2 * 2 / 2**11, rel=0.5) and change.is_clear
    assert line.cells["frozen_share"].difference.p_value == 1.0
    assert not line.has_too_few


def test_videos_of_one_prompt_are_one_cluster_and_few_prompts_are_never_clear(video):
    sets = [
        ReportSet(
            name=name,
            measured=[measured(video, "one", 10.0 + seed + more, seed=seed) for seed in range(9)],
        )
        for name, more in (("a", 0), ("b", 5))
    ]
    line = compare_sets(sets, baseline="a").lines[1]
    assert (line.cells["motion_degree"].difference.mean.num, line.has_too_few) == (1, True)
    assert not line.cells["motion_degree"].difference.is_clear


def test_failures_come_first_then_frozen_videos_then_disagreement(video):
    ours = [
        measured(video, "near", 10.0),
        measured(video, "far", 1.0),
        measured(video, "still", 0.0, frozen=1.0),
        measured(video, "broken", failure="It is empty."),
        measured(video, "alone"),
    ]
    theirs = [measured(video, name, 11.0) for name in ("near", "far", "still", "broken")]
    sets = [ReportSet(name="a", measured=ours), ReportSet(name="b", measured=theirs)]
    scenes = order_scenes(sets)
    assert [one.key[0] for one in scenes] == ["broken", "still", "far", "near"]
    assert scenes[2].difference == "differ most in motion_degree: 1.0 to 11.0 px/s"


def test_of_one_set_those_with_warnings_come_before_those_without(video):
    fine = [measured(video, f"fine {place}") for place in range(2)]
    odd = replace(measured(video, "odd"), notes=("its frames have no times",))
    scenes = order_scenes([ReportSet(name="a", measured=[fine[0], odd, fine[1]])])
    assert [one.key[0] for one in scenes] == ["odd", "fine 0", "fine 1"]


def test_a_page_says_how_large_the_files_are_and_has_a_first_frame_of_each(video, tmp_path):
    one = measured(video, "a")
    size = {"width": 96, "height": 64, "num_frames": 8, "frame_rate": 8.0}
    one = replace(one, values={**one.values, **size})
    page = write_report(
        [ReportSet(name="a", measured=[one])], to=tmp_path / "r.html", title="t"
    ).page
    text = page.read_text()
    assert "96 x 64, 8 frames at 8 a second" in text
    poster = base64.b64decode(
        text.partition('poster="data:image/jpeg;base64,')[2].partition('"')[0]
    )
    frames, _ = read_frames(video)
    shown = np.asarray(Image.open(io.BytesIO(poster)).resize((96, 64)), dtype=float)
    assert np.abs(shown - frames[0]).mean() < 4


def test_strangers_text_is_escaped_everywhere(video, tmp_path):
    sets = [
        ReportSet(name=name, measured=[measured(video, HOSTILE)], about={HOSTILE: HOSTILE})
        for name in (HOSTILE, "b_%")
    ]
    written = write_report(sets, to=tmp_path / "r.html", title=HOSTILE)
    text = written.page.read_text()
    assert "<img src=x" not in text and text.count("</script>") == 1
    tex = (tmp_path / "r.tex").read_text()
    assert r"b\_\%" in tex and r"\textless" not in tex
    assert to_latex(compare_sets(sets, baseline="b_%")).count("\\\\\n") == 3
    assert json.loads((tmp_path / "r.json").read_text())["sets"][0]["name"] == HOSTILE


def test_no_spreadsheet_computes_the_name_of_a_set(video):
    table = compare_sets([set_of(video, "=1+1", [1.0, 2.0])], baseline="=1+1")
    assert next(csv.DictReader(io.StringIO(to_csv(table))))["set"] == "'=1+1"


def test_what_has_no_room_is_named_and_not_shown(video, tmp_path):
    sets = [set_of(video, name, [1.0, 2.0]) for name in "ab"]
    written = write_report(sets, to=tmp_path / "r.html", title="t", max_megabytes=0)
    assert (written.num_shown, written.num_left_out) == (0, 2)
    text = written.page.read_text()
    assert "2 scenes without videos" in text and "moving.mp4" in text and "<video" not in text


def test_two_sets_of_one_name_and_an_unknown_baseline_are_refused(video, tmp_path):
    one = set_of(video, "a", [1.0])
    for sets, baseline in (([one, one], None), ([one], "b"), ([], None)):
        with pytest.raises(ConfigError):
            write_report(sets, to=tmp_path / "r.html", title="t", baseline=baseline)
    with pytest.raises(ConfigError, match="no page"):
        write_report([one], to=tmp_path / "r.json", title="t")


def test_a_folder_with_an_equals_sign_is_no_name(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert split_name(str(tmp_path / "a=b"))[0] == "a=b"
    assert split_name("x=some/where")[0] == "x"


# In a browser


ORDER = "[...document.querySelectorAll('#numbers tbody th')].map(one => one.dataset.value).join()"


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_the_page_works_in_a_browser_and_asks_for_nothing(video, tmp_path):
    sets = [
        set_of(video, name, [degree, 2.0])
        for name, degree in zip("abc", (4.0, 9.0, 1.0), strict=True)
    ]
    figure = Figure("A chart", '<svg viewBox="0 0 9 9"><path d="M0 0h9"/></svg>', "What it shows.")
    page = write_report(sets, to=tmp_path / "r.html", title="Test", figures=[figure]).page
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(page.as_uri(), width=360, height=800)
        assert browser.run("document.title") == "Test"
        assert browser.run("document.documentElement.scrollWidth") == 360, "it scrolls sideways"
        # Sorting, by the keyboard.
        browser.run("document.querySelectorAll('#numbers thead button')[1].focus()")
        orders = []
        for _ in range(2):
            browser.press("Enter", 13, "\r")
            orders.append(browser.run(ORDER))
        assert orders == ["b,a,c", "c,a,b"]
        # Players in step, and where the slider says.
        browser.run("document.querySelector('.scene').scrollIntoView()")
        videos = "[...document.querySelector('.scene').querySelectorAll('video')]"
        browser.wait_for(f"{videos}.every(one => !one.paused && one.currentTime > 0.2)")
        times = browser.run(f"{videos}.map(one => one.currentTime)")
        assert max(times) - min(times) < 0.15
        browser.run("time.value = 500; time.dispatchEvent(new Event('input'))")
        browser.wait_for(f"{videos}.every(one => one.paused && !one.seeking)")
        assert browser.run(f"{videos}.map(one => one.currentTime)") == pytest.approx([0.5] * 3)
        browser.run("time.focus()")
        browser.press("ArrowRight", 39)  # an eighth of a second, which is a frame here
        browser.wait_for(f"{videos}.every(one => one.paused && !one.seeking)")
        assert browser.run(f"{videos}.map(one => one.currentTime)") == pytest.approx([0.625] * 3)
    finally:
        browser.close()
    assert not browser.faults()
    asked = browser.asked()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [page.as_uri()]
