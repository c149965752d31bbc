"""Settings refuse what they do not know, and say what was meant."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from motionmerge.config import FrozenModel
from motionmerge.errors import ConfigError
from motionmerge.text import parse_yaml


class Optimizer(FrozenModel):
    learning_rate: float = Field(1e-5, gt=0)


class Training(FrozenModel):
    num_steps: int
    optimizer: Optimizer = Optimizer()


def read(text):
    return Training.model_validate(parse_yaml(text, source="test"))


def test_a_file_becomes_settings():
    text = "num_steps: 10\noptimizer: {learning_rate: 1e-4}\n"
    assert read(text) == Training(num_steps=10, optimizer=Optimizer(learning_rate=1e-4))


def test_an_unknown_name_is_refused_and_the_nearest_offered():
    with pytest.raises(ConfigError, match=r"no setting `num_step`.*\n.*`num_steps`"):
        read("num_step: 10\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        read("num_steps: 1\noptimizer: {lerning_rate: 1}\n")
    with pytest.raises(ConfigError, match="num_steps"):
        Training(num_stepz=3)


@pytest.mark.parametrize(
    "text", ["{}", "num_steps: many", "num_steps: 1\noptimizer: {learning_rate: 0}"]
)
def test_missing_and_bad_values_are_named(text):
    with pytest.raises(
        ConfigError, match=r"Fix: Correct `(Training\.num_steps|Optimizer\.learning_rate)`"
    ):
        read(text)


def test_settings_are_frozen():
    settings = Training(num_steps=1)
    with pytest.raises((ConfigError, ValidationError)):
        settings.num_steps = 2


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "a: [1", "a: !!python/object:os.system {}", "? [1]\n: 2", "a: \x00", "[" * 5000],
)
def test_duplicate_keys_code_and_broken_yaml_are_refused(text):
    with pytest.raises(ConfigError, match="Fix"):
        parse_yaml(text, source="test")


def test_a_list_is_not_settings():
    with pytest.raises(ConfigError, match="Fix"):
        read("- 1")


def test_a_message_repeats_little_of_what_a_stranger_wrote():
    with pytest.raises(ConfigError) as caught:
        read("num_steps: " + "x" * 100_000)
    assert len(str(caught.value)) < 500
