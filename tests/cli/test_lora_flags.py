"""`--lora FILE=WEIGHT` means a strength; what could mean two things is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from motionmerge.cli.lora_flags import describe_loras, parse_lora
from motionmerge.cli.video_flags import VideoFlags
from motionmerge.errors import ConfigError
from motionmerge.sampling.request.experts import WeightedLora, from_loras


def weighted_loras(texts, *, motion):
    return VideoFlags(model="wan", lora=texts, motion=motion).request.weighted_loras()


@pytest.mark.parametrize(
    ("text", "file", "weights"),
    [
        ("a.safetensors", "a.safetensors", ()),
        ("a.safetensors=0.8", "a.safetensors", (0.8,)),
        ("a.safetensors=-0.25,1", "a.safetensors", (-0.25, 1.0)),
        ("a.safetensors=-0.25;1", "a.safetensors", (-0.25, 1.0)),
        ("a.safetensors= 1e-1 , +.5 ", "a.safetensors", (0.1, 0.5)),
        ("a=b,c.safetensors", "a=b,c.safetensors", ()),
        ("a=1,c=b.safetensors=2", "a=1,c=b.safetensors", (2.0,)),
        ("a=1.safetensors", "a=1.safetensors", ()),
        ("hub:o/n/a.safetensors=0.5", "hub:o/n/a.safetensors", (0.5,)),
        ("hub:o/n/a.safetensors", "hub:o/n/a.safetensors", ()),
        ("a=", "a=", ()),
        ("=1", "=1", ()),
    ],
)
def test_only_weights_behind_the_last_equals_sign_count(tmp_path, monkeypatch, text, file, weights):
    monkeypatch.chdir(tmp_path)
    assert parse_lora(text) == (file, weights)


@pytest.mark.parametrize("text", ["a=1,2,3", "a=1e999", "a=0.5;1e999", "a=much", "a=nan", "a=1,"])
def test_weights_that_are_none_are_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("a").touch()
    with pytest.raises(ConfigError, match="--lora a="):
        parse_lora(text)


def test_a_file_whose_own_name_ends_like_a_weight_is_meant_unless_both_are_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a=0.5").touch()
    assert parse_lora("a=0.5") == ("a=0.5", ())
    Path("a").touch()
    with pytest.raises(ConfigError, match="both are there"):
        parse_lora("a=0.5")
    assert parse_lora("a=0.5=0.5") == ("a=0.5", (0.5,))


def test_the_knob_turns_the_loras_without_a_weight_alone():
    turned = weighted_loras(["slow", "style=0.8", "two=0,1"], motion=0.25)
    assert turned == [
        WeightedLora("slow", -0.25, 1.0),
        WeightedLora("style", 0.8, 0.8),
        WeightedLora("two", 0.0, 1.0),
    ]
    assert describe_loras(turned, boundary=None) == [
        "LoRA slow: weight -0.25 above noise level 0.64, then 1",
        "LoRA style: weight 0.8",
        "LoRA two: weight 0 above noise level 0.64, then 1",
    ]
    assert weighted_loras(["slow"], motion=None) == [WeightedLora("slow", 1.0, 1.0)]


@pytest.mark.parametrize(
    ("texts", "motion", "message"),
    [
        (["style=0.8"], 0.25, "`motion=` turns LoRAs without a weight"),
        (["style=0.8", "two=0,1"], 0.25, "`motion=` turns LoRAs without a weight"),
        (["style=0.8", "./style=0.5"], None, "twice"),
    ],
)
def test_what_can_be_meant_in_two_ways_is_refused(texts, motion, message):
    with pytest.raises(ConfigError, match=message):
        weighted_loras(texts, motion=motion)


def test_weights_are_those_of_the_formulas():
    one = from_loras([WeightedLora("a", 0.8, 0.8)]).recipe
    assert str(one.experts["styled"]) == "base + lora(lora_1, 0.8)"
    two = from_loras(
        [WeightedLora("a", -0.25, 1), WeightedLora("b", 0.5, 0.5)], boundary=0.9
    ).recipe
    assert {name: str(expert) for name, expert in two.experts.items()} == {
        "dynamics": "base + lora(lora_1, -0.25) + lora(lora_2, 0.5)",
        "consistency": "base + lora(lora_1, 1) + lora(lora_2, 0.5)",
    }
    with pytest.raises(ConfigError, match=r"boundary 0\.9 changes nothing"):
        from_loras([WeightedLora("a", 0.8, 0.8)], boundary=0.9)


def test_a_lora_on_the_hub_stays_a_name_until_it_is_looked_for():
    recipe = from_loras([WeightedLora("hub:o/n/a.safetensors", 0.8, 0.8)]).recipe
    assert recipe.inputs["lora_1"].path == "hub:o/n/a.safetensors"
