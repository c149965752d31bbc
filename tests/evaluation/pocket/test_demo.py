"""The demo's page is whole, and text in it cannot become markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image

from motionmerge.errors import ConfigError
from motionmerge.evaluation.pocket.claims import Claim
from motionmerge.evaluation.pocket.demo import PROMPTS, demo_image, demo_stages, run_demo
from motionmerge.evaluation.pocket.report import (
    Method,
    PageClip,
    PageRow,
    PocketPage,
    Shot,
    write_pocket_page,
)
from motionmerge.evaluation.report.embedding import EmbeddedVideo
from motionmerge.evaluation.report.sets import Figure
from motionmerge.models.pocket.text import PocketTokenizer

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def page():
    video = EmbeddedVideo(uri="data:video/mp4;base64,AA==")
    clip = PageClip(title="Base", video=video, degree=3.2, camera="pans left")
    wrong = replace(clip, disobedience=(HOSTILE,), damage=(HOSTILE,))
    return PocketPage(
        title=HOSTILE,
        methods=(
            Method(title=HOSTILE, note=HOSTILE, condition="base", recipe=HOSTILE, schedule=HOSTILE),
        ),
        shots=(
            Shot(
                prompt=HOSTILE,
                look_for=HOSTILE,
                tells_all=True,
                photo="data:,",
                clips=(clip, wrong),
            ),
        ),
        result=HOSTILE,
        rows=(PageRow(HOSTILE, {HOSTILE: HOSTILE, "px": "3.0 [2.0, 4.0]", "dB": "–"}),),
        about=HOSTILE,
        figures=(Figure(HOSTILE, "<svg></svg>", HOSTILE),),
        claims=(Claim(HOSTILE, HOSTILE, "holds", (HOSTILE,)),),
        seed=0,
    )


def test_the_page_escapes_html_and_needs_no_other_file(page, tmp_path):
    text = write_pocket_page(page, tmp_path / "index.html").read_text()
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") >= 15
    assert "<svg></svg>" in text
    assert set(re.findall(r'(?:src|href)="(?!data:)([^"]*)"', text)) <= {"#videos"}


def test_a_clip_obeys_and_is_whole_only_where_nothing_is_wrong(page, tmp_path):
    text = write_pocket_page(page, tmp_path / "index.html").read_text()
    for word in ("✓ obeys", "✓ whole", "✗ disobeys", "✗ breaks"):
        assert text.count(word) == 1


def test_numbers_are_sorted_by_what_is_read_first(page):
    assert [page.rows[0].sort_value(name) for name in page.rows[0].cells] == ["", "3.0", ""]


def test_demo_prompts_are_known_words_on_square_pictures():
    PocketTokenizer()([prompt.program.caption() for prompt in PROMPTS])
    for prompt in PROMPTS:
        assert demo_image(prompt).shape == (3, 256, 256)


def test_the_demo_shows_six_different_stages():
    assert len({condition.name for _, condition in demo_stages()}) == 6


def test_too_many_prompts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 to"):
        run_demo(None, folder=tmp_path, num_prompts=99)


def test_the_demo_makes_a_page_and_its_videos(random_pocket, tmp_path):
    pipeline, inputs = random_pocket
    path = run_demo(
        pipeline,
        folder=tmp_path,
        num_prompts=1,
        num_table_prompts=3,
        num_inference_steps=1,
        inputs=inputs,
    )
    text = path.read_text()
    chart = text[text.index("<svg") : text.index("</svg>")]
    assert "#000000" not in chart  # on a dark page that would be unreadable
    assert text.count('<video src="data:video/mp4;base64,') == 6
    assert len([one for one in (tmp_path / "videos").iterdir() if one.stat().st_size > 0]) == 6
    assert "On 3 held-out prompts the full method" in text
    with Image.open(tmp_path / "sheet.jpg") as sheet:  # three stages, six frames of 128 pixels
        assert sheet.size == (6 * 130 + 2, 3 * 144 + 2)
    with Image.open(tmp_path / "typical.webp") as animation:  # three stages beside one another
        assert (animation.n_frames, animation.width) == (16, 3 * 256 + 2 * 8)
