"""Settings refuse what they do not know, and say what was meant."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from motionmerge.config import FrozenModel, load_yaml
from motionmerge.errors import ConfigError
from motionmerge.text import parse_yaml


class Optimizer(FrozenModel):
    learning_rate: float = Field(1e-5, gt=0)


class Training(FrozenModel):
    num_steps: int
    optimizer: Optimizer = Optimizer()


def write(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_becomes_settings(tmp_path):
    path = write(tmp_path, "num_steps: 10\noptimizer: {learning_rate: 1e-4}\n")
    assert load_yaml(path, Training) == Training(
        num_steps=10, optimizer=Optimizer(learning_rate=1e-4)
    )


def test_an_unknown_name_is_refused_and_the_nearest_offered(tmp_path):
    with pytest.raises(ConfigError, match=r"no setting `num_step`.*\n.*`num_steps`"):
        load_yaml(write(tmp_path, "num_step: 10\n"), Training)
    with pytest.raises(ConfigError, match="learning_rate"):
        load_yaml(write(tmp_path, "num_steps: 1\noptimizer: {lerning_rate: 1}\n"), Training)
    with pytest.raises(ConfigError, match="num_steps"):
        Training(num_stepz=3)


@pytest.mark.parametrize(
    "text", ["{}", "num_steps: many", "num_steps: 1\noptimizer: {learning_rate: 0}"]
)
def test_missing_and_bad_values_are_named(tmp_path, text):
    with pytest.raises(
        ConfigError, match=r"Fix: Correct `(Training\.num_steps|Optimizer\.learning_rate)`"
    ):
        load_yaml(write(tmp_path, text), Training)


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


def test_a_list_is_not_settings(tmp_path):
    with pytest.raises(ConfigError, match="holds a list"):
        load_yaml(write(tmp_path, "- 1"), Training)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read"):
        load_yaml(tmp_path / "none.yaml", Training)
