"""The studio takes what people give it, and shows no place and no markup of strangers."""

from __future__ import annotations

import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from diffusers import WanTransformer3DModel
from fastapi.testclient import TestClient

from motionmerge.errors import CheckpointError, ConfigError, DataError
from motionmerge.models.pocket.world import load_photo
from motionmerge.studio import fragments
from motionmerge.studio.following import (
    about_model,
    draw_axis,
    open_file,
    read_recipe,
    recipe_for_model,
    write_boundary,
    write_group,
    write_parameters,
    write_while_noisy,
)
from motionmerge.studio.fragments import fault
from motionmerge.studio.making import Maker
from motionmerge.studio.recipe_text import SEVERAL, RecipeText, shipped_text
from motionmerge.studio.server import studio_app
from motionmerge.studio.turns import Stopped
from motionmerge.studio.values import PageValues, sweep_points
from motionmerge.studio.wishes import ModelNote
from motionmerge.studio.works import History, Works

from ..tiny.folders import save_lora, save_tiny

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "p.png"
    load_photo("coffee").save(path)
    return str(path)


def given(photo, **changed):
    values = {
        "photo": photo, "prompt": "the camera pans left", "model": "pocket", "base": "",
        "lora": "", "recipe": shipped_text("pocket"), "motion": 1.0, "boundary": 0.72,
        "drop_rate": 0.4, "steps": 2, "guidance": None, "seed": 0, "num_seeds": 1, "width": 0,
        "height": 0, "frames": 0, "paints": True,
    }  # fmt: skip
    return PageValues(**{**values, **changed})


@pytest.fixture(scope="module")
def made(photo, tmp_path_factory):
    """A sweep of two values with two seeds, made and kept."""
    maker = Maker(Works(tmp_path_factory.mktemp("works")))
    told = []
    work = maker.make(
        given(photo, num_seeds=2).of_kind("sweep", [-1, 1, 2]),
        tell=lambda *said: told.append(said),
        stop=threading.Event(),
    )
    return maker, work, told


def test_a_work_has_videos_numbers_recipe_and_report_and_survives_a_restart(made):
    maker, work, told = made
    assert [(one.name, one.seed) for one in work.videos] == [
        *(("motion -1", 0), ("motion -1", 1), ("motion 1", 0), ("motion 1", 1)),
    ]
    assert all(one.numbers["motion_degree"] >= 0 and not one.failure for one in work.videos)
    shares = [share for text, share in told if "step" in text]
    assert shares == sorted(shares) and len(shares) == 8, "a step is told of as it is made"
    assert Works(maker.works.folder).history() == History([work])
    for name in ("1.mp4", "recipe.yaml", "report.html", "thumbnail.jpg"):
        assert maker.works.file(work.id, name).stat().st_size > 0
    page = fragments.shown_work(work, maker.works)
    assert (
        page.count("<video") == 4
        and "Seed 1" in page
        and "<svg" in page
        and str(maker.works.folder) not in page
    )
    assert "motion: 1" in maker.works.file(work.id, "recipe.yaml").read_text()


def test_stop_ends_after_a_step_and_keeps_nothing(photo, made):
    maker, _, _ = made
    before, stop = list(maker.works.folder.iterdir()), threading.Event()
    steps = []

    def tell(text, share):
        steps.append(text)
        if "step 1" in text:
            stop.set()

    with pytest.raises(Stopped):
        maker.make(given(photo, steps=50).of_kind("motion", []), tell=tell, stop=stop)
    assert sum("step" in text for text in steps) == 1
    assert list(maker.works.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "kind", "more", "word"),
    [
        ({"photo": None}, "motion", [], "no photo"),
        ({"recipe": "experts: {a: 1 +}"}, "motion", [], "recipe"),
        ({"seed": -1}, "motion", [], "seed"),
        ({"num_seeds": 5}, "motion", [], "--num-videos"),
        ({"seed": 2**63 - 1, "num_seeds": 2}, "motion", [], "seed"),
        ({"steps": 1001}, "motion", [], "num_inference_steps"),
        ({}, "compare", [[]], "0 recipes"),
        ({}, "compare", [["pocket"] * 5], "5 recipes"),
        ({}, "compare", [["../../x"]], "no recipe"),
        ({}, "sweep", [0, 0, 3], "none"),
        ({}, "sweep", [None, 1, 3], "two numbers"),
        ({}, "sweep", [0, 1, 100], "none"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_loaded(photo, changed, kind, more, word):
    with pytest.raises((ConfigError, DataError), match=word):
        given(**{"photo": photo, **changed}).of_kind(kind, more)


def odd(mode, size=(64, 48)):
    shades = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1]).astype(np.uint8)
    return Image.fromarray(shades).convert(mode)


def test_odd_photos_are_right_or_refused(made, tmp_path):
    maker, _, _ = made

    def make(path):
        wish = given(str(path), steps=1, recipe=shipped_text("calm")).of_kind("motion", [])
        return maker.make(wish, tell=lambda *_: None, stop=threading.Event())

    turned = odd("CMYK").getexif()
    turned[274] = 6  # a quarter to the right
    odd("CMYK").save(tmp_path / "e.jpg", exif=turned)
    with Image.open(maker.works.file(make(tmp_path / "e.jpg").id, "photo.png")) as kept:
        assert (kept.mode, kept.size) == ("RGB", (48, 64))
    odd("RGB", (1, 1)).save(tmp_path / "one.png")
    (tmp_path / "no.png").write_bytes(b"<svg onload=alert(1)>")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    for name in ("one", "no", "huge"):
        with pytest.raises(DataError) as error:
            make(tmp_path / f"{name}.png")
        said = fault(error.value)
        assert "Fix:" in said and str(tmp_path) not in said and f"{name}.png" in said


def test_nothing_of_a_stranger_reaches_the_page_as_markup(made):
    maker, work, _ = made
    videos = tuple(replace(one, name=HOSTILE, steps=HOSTILE) for one in work.videos)
    hostile = replace(work, prompt=HOSTILE, model=HOSTILE, videos=videos)
    pages = [
        *(fragments.history(History([hostile])), fragments.shown_work(hostile, maker.works)),
        *(fragments.message(HOSTILE), fragments.progress(HOSTILE, 0.5)),
        fault(RuntimeError(f"{HOSTILE} in /home/somebody/secret/file.py")),
    ]
    assert not any("<img src=x" in page for page in pages)
    assert "/home/somebody" not in pages[-1]


def test_knobs_and_recipe_follow_each_other():
    text = shipped_text("pocket")
    turned = RecipeText.read(text).with_parameters(motion=-0.5, drop_rate=0.1)
    own = turned.recipe.parameters
    assert own["motion"] == -0.5 and own["drop_rate"] == 0.1
    assert read_recipe(turned.text) == (-0.5, 0.1, 0.72, 0, "", "", *[""] * 5)
    assert RecipeText.read(text).with_parameters(motion=1.0).text == text, "nothing was turned"
    without = RecipeText.read(shipped_text("edg-official"))
    assert without.with_parameters(motion=0.5) == without
    assert write_parameters("", 0.5, 0.1)[1] == "", "a LoRA has its motion from the page"
    wrong = RecipeText.read(text.replace("tuned + gamma", "tuned +* gamma"))
    assert wrong.recipe is None and "^" in wrong.fault
    assert "^" in read_recipe(wrong.text)[-4]
    assert sweep_points(-1, 1, 5) == [-1, -0.5, 0, 0.5, 1]


def test_the_boundary_and_the_recipe_follow_each_other(photo):
    """What the slider shows is what a video, a comparison, a sweep and a saved recipe have."""
    plain, values = shipped_text("pocket"), given(photo)
    moved, said = write_boundary(plain, 0.5)
    assert said == "" and "above: 0.5}" in moved and read_recipe(moved)[2] == 0.5
    assert RecipeText.read(write_boundary(moved, 0.72)[0]).recipe == RecipeText.read(plain).recipe
    by_timestep = plain.replace("above: 0.72", "timestep: 500")
    for kind, more in (("compare", [["the recipe on this page"]]), ("sweep", [0, 1, 2])):
        for text in (moved, by_timestep):
            wish = replace(values, recipe=text).of_kind(kind, more)
            last = list(wish.experts(wish.open_model()).values())[-1]
            assert last.whole_recipe.schedule == RecipeText.read(text).recipe.schedule
    assert "above: 0.5}" in write_boundary(by_timestep, 0.5)[0]
    three = plain.replace("schedule:", "schedule:\n  - {expert: consistency, above: 0.9}")
    assert "this one has 3" in write_boundary(three, 0.5)[1]
    assert "this one has 1" in write_boundary(shipped_text("calm"), 0.5)[1]
    early = replace(values, motion=-0.5).of_kind("motion", [])
    assert list(early.recipes) == ["motion 1"], "a video is called what its recipe says"
    one = plain.partition("schedule:")[0]
    wish = replace(values, recipe=one, boundary=0.3).of_kind("motion", [])
    last = list(wish.experts(wish.open_model()).values())[-1]
    assert last.whole_recipe.schedule.entries[0].above == 0.3, "it has none of its own"
    assert replace(values, recipe=" ", boundary=0.3).default_recipe().boundary == 0.3


def test_knobs_of_the_noisy_steps_and_the_recipe_follow_each_other():
    plain = shipped_text("pocket")
    blurred, said = write_while_noisy(plain, 2, "low_pass(0.4)", "")
    assert said == "" and "guidance: 2, image: low_pass(0.4)" in blurred
    assert read_recipe(blurred)[3:6] == (2, "low_pass(0.4)", "")
    back, _ = write_while_noisy(blurred, 0, "", "")
    assert RecipeText.read(back).recipe == RecipeText.read(plain).recipe
    named = shipped_text("knob-alg")
    assert "image: low_pass(keep)" in write_while_noisy(named, 2, "low_pass(keep)", "")[0]
    assert "^" in write_while_noisy(plain, 0, "low_pass(2)", "")[1]
    assert "needs a recipe" in write_while_noisy("", 2, "", "")[1]
    one = "inputs: {base: 'pocket:base'}\nexperts: {a: base, b: base}\n"
    assert "no schedule" in write_while_noisy(one, 2, "", "")[1]
    biased, _ = write_while_noisy(plain, 0, "", "first_frame(-0.6)")
    assert "attention" in draw_axis("pocket", "", "", biased, 0.72, 12)
    assert "Fix:" in draw_axis("pocket", "", "", biased, 0.72, 12), "the pocket model has no bias"
    assert "low_pass" in draw_axis("pocket", "", "", blurred.replace("guidance: 2, ", ""), 0.72, 12)


def test_the_group_and_the_recipe_follow_each_other():
    plain = shipped_text("pocket")
    only, said = write_group(plain, "temporal")
    assert said == "" and only.count('only(tuned - base, "temporal")') == 2
    assert read_recipe(only)[6] == "temporal" and read_recipe(plain)[6] == ""
    other, _ = write_group(only, "*.attn1.*")
    assert RecipeText.read(other).group == "*.attn1.*" and "temporal" not in other
    assert RecipeText.read(write_group(other, "")[0]).recipe == RecipeText.read(plain).recipe
    uneven = only.replace('only(tuned - base, "temporal")', "(tuned - base)", 1)
    assert RecipeText.read(uneven).group == SEVERAL
    assert RecipeText.read(uneven).with_group(SEVERAL).text == uneven, "it stays as it is"
    nested = plain.replace("(tuned - base)", '(only(only(tuned - base, "*a*"), "*b*"))')
    assert RecipeText.read(nested).group == SEVERAL
    assert "temporal" in write_group(plain, "tempral")[1], "the nearest name is told"
    assert "needs a recipe" in write_group("", "temporal")[1]


def test_the_axis_shows_each_experts_steps():
    drawn = draw_axis("pocket", "", "", shipped_text("pocket"), 0.72, 12)
    assert "steps 1-5 of 12: dynamics, 6-12: consistency" in drawn
    assert drawn.count("mm-tick") == 12
    never, _ = write_boundary(shipped_text("pocket"), 1.0)
    warned = draw_axis("pocket", "", "", never, 1.0, 2)
    assert "steps 1-2 of 2: consistency" in warned and "mm-bad" in warned
    assert "steps 1-8 of 12: dynamics" in draw_axis("pocket", "", "", "", 0.5, 12), "none is there"
    assert "Fix:" in draw_axis("pocket", "", "", shipped_text("pocket"), 0.72, 1001)


def test_only_works_are_served_and_only_to_this_machine(made):
    maker, work, _ = made
    (maker.works.folder / "secret.png").write_text("do not tell")
    (maker.works.folder / work.id / "link.png").symlink_to(maker.works.folder / "secret.png")
    client = TestClient(studio_app(maker.works.folder), base_url="http://127.0.0.1")
    answer = client.get(f"/works/{work.id}/1.mp4", headers={"Range": "bytes=0-9"})
    assert answer.status_code == 206 and answer.headers["content-type"] == "video/mp4"
    assert "sandbox" in answer.headers["content-security-policy"]
    for path in (
        *(f"/works/{work.id}/work.json", f"/works/{work.id}/link.png", "/works/../secret.png"),
        *(f"/works/{work.id}/..%2fsecret.png", f"/works/{'0' * 16}/1.mp4"),
        f"/gradio_api/file={maker.works.folder}/secret.png",
        "/gradio_api/file=/etc/passwd",
    ):
        answer = client.get(path)
        assert answer.status_code in (403, 404) and "do not" not in answer.text, path
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_a_lora_or_a_base_is_never_left_aside(photo, stored_wan):
    """What is typed beside a recipe is used or refused."""
    with pytest.raises(ConfigError, match="a LoRA and a recipe"):
        given(photo, lora="some.safetensors").of_kind("motion", [])
    folder = str(stored_wan)
    for base, word in ((folder, "no inputs `base`"), ("", "pocket model")):
        recipe = shipped_text("pocket")
        if base:
            recipe = recipe.replace("tuned:", "other:").replace("tuned", "other")
        wish = given(photo, model=folder, base=base, recipe=recipe).of_kind("motion", [])
        with pytest.raises(ConfigError, match=word):
            wish.experts(wish.open_model())
    alone = given(photo, model=folder, recipe="").of_kind("motion", [])
    assert list(alone.experts(alone.open_model())) == ["the model as it is"]
    assert recipe_for_model(folder, shipped_text("pocket")) == ("", "")
    assert recipe_for_model("pocket", "")[0] == shipped_text("pocket")


@pytest.mark.parametrize("changed", [{"prompt": "a" * 2001}, {"seed": 1e400}, {"frames": 2.5}])
def test_numbers_and_prompts_are_refused_not_cut(photo, changed):
    with pytest.raises(ConfigError):
        given(photo, **changed).of_kind("motion", [])


def test_a_models_lora_makes_videos_and_files_for_comfyui(photo, stored_wan, tmp_path):
    """A folder and a LoRA on the page, with nothing else: two videos, an archive, and its axis."""
    lora, folder = tmp_path / "l.safetensors", str(stored_wan)
    denoiser = WanTransformer3DModel.from_pretrained(stored_wan / "transformer")
    save_lora(lora, denoiser, "blocks.0.attn1.to_q")
    maker, stop = Maker(Works(tmp_path / "works")), threading.Event()
    values = given(
        photo, prompt="a cat", model=folder, lora=str(lora), recipe="",
        width=16, height=16, frames=5,
    )  # fmt: skip

    def quiet(text, share):
        pass

    work = maker.make(values.of_kind("motion", []), tell=quiet, stop=stop)
    assert [one.name for one in work.videos] == ["the model as it is", "motion 1"]
    assert "dynamics" in work.videos[1].steps
    same = replace(values, motion=-1.0).of_kind("motion", [])
    assert maker.make(same, tell=quiet, stop=stop).videos[1].steps is None, "one weight throughout"
    written = maker.export(values.of_kind("export", []), tell=quiet, stop=stop)
    with zipfile.ZipFile(maker.works.file(written.id, "comfyui.zip")) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    assert {"dynamics.safetensors", "consistency.safetensors", "how-to-load.txt"} <= names
    assert "on the model, strength" in fragments.exported(written), "it has one denoiser"
    assert "models/loras" in fragments.exported(written) and str(tmp_path) not in written.usage
    with pytest.raises(ConfigError, match="no pocket model"):
        maker.export(given(photo).of_kind("export", []), tell=quiet, stop=stop)
    with pytest.raises(ConfigError, match="nothing to be merged"):
        given(photo, model=folder, recipe="").of_kind("export", [])
    assert "dynamics" in draw_axis(folder, "", str(lora), "", 0.72, 4)
    assert draw_axis(folder, "", "", "", 0.72, 4) == ""


@pytest.mark.parametrize(
    ("name", "own", "changed", "rule"),
    [
        ("SVD", {"prompt": ""}, {"width": 64, "height": 64, "frames": 2}, "has no prompts"),
        ("LTX", {"prompt": "a cat"}, {"width": 64, "height": 64, "frames": 9}, "divide by 32"),
    ],
)
def test_other_families_are_explained_and_make_videos(photo, tmp_path, name, own, changed, rule):
    save_tiny(name, tmp_path / "model")
    values = given(photo, model=str(tmp_path / "model"), recipe="", **own)
    note = ModelNote.about(values.model)
    assert rule in note.text and ("leave it empty" in note.prompt) == (name == "SVD")
    maker = Maker(Works(tmp_path / "works"))

    def make(**more):
        wish = replace(values, **more).of_kind("motion", [])
        return maker.make(wish, tell=lambda *_: None, stop=threading.Event())

    work = make(**changed)
    assert len(work.videos) == 1
    assert "--recipe" not in fragments.shown_work(work, maker.works), "there is none"
    for wrong, word in (
        ({"prompt": "a cat" if name == "SVD" else ""}, "prompt"),
        ({"width": 30}, "divide"),
    ):
        with pytest.raises(ConfigError, match=word):
            make(**{**changed, **wrong})


def test_a_model_that_is_not_here_is_told_of_and_not_fetched(tmp_path):
    assert "downloaded" in ModelNote.about("owner/name").text
    assert "in five colors" in ModelNote.about("pocket").prompt
    with pytest.raises(CheckpointError, match="model_index"):
        ModelNote.about(str(tmp_path))
    assert (
        "Fix:" in about_model(str(tmp_path))[0]
        and str(tmp_path) not in about_model(str(tmp_path))[0]
    )


@pytest.mark.parametrize(
    ("content", "word"), [(b"\xff", "UTF-8"), (b"x" * 100_000, "at most"), (b"", "not a mapping")]
)
def test_a_file_that_is_no_recipe_leaves_the_one_on_the_page(content, word):
    told = open_file(content)
    assert word in told[-4] and not isinstance(told[0], str)
    opened = open_file(shipped_text("calm").encode())
    assert opened[:2] == (shipped_text("calm"), -0.25)


def test_a_page_of_another_site_and_a_file_that_nobody_uploaded_are_refused(tmp_path):
    (tmp_path / "private.png").write_bytes(b"a secret")
    server = studio_app(tmp_path / "studio")
    with TestClient(server, base_url="http://127.0.0.1") as client:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            sent = client.post(
                "/gradio_api/upload", files={"files": ("a.png", b"x")}, headers={"Origin": origin}
            )
            assert sent.status_code == 403, origin
        own = {"Origin": "http://127.0.0.1"}
        assert client.post(
            "/gradio_api/upload", files={"files": ("a.png", b"x")}, headers=own
        ).is_success
        # Gradio hands over whatever file a value names, unless it is told to look.
        number = next(
            one["id"] for one in client.get("/config").json()["dependencies"] if one["inputs"]
        )
        file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
        asked = {
            "fn_index": number,
            "session_hash": "s",
            "data": [file, *list(vars(given("")).values())[1:]],
        }
        assert client.post("/gradio_api/queue/join", json=asked).is_success
        told = client.get("/gradio_api/queue/data", params={"session_hash": "s"}).text
    assert '"success":false' in told.replace(" ", "") and "private.png" not in told
