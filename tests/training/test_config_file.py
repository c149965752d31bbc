"""Configurations of runs: shipped ones are whole, mistakes are named with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from motionmerge.errors import ConfigError
from motionmerge.training.config_file import ConfigFile, shipped_configs
from motionmerge.training.pocket.runs import PocketRun
from motionmerge.training.run_config import RunConfig

OWN = """model: x
data: {folder: a, manifest: b, sizes: [[16, 16]], frame_stride: [1, 2]}
settings: {steps: 3}
output: runs/x
"""
MISSING = {"model": "m", "data.folder": "clips", "data.manifest": "clips.jsonl"}


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_is_whole_but_for_model_and_clips(name: str):
    is_pocket = name.startswith("pocket-")
    file = ConfigFile.load(name, changes={} if is_pocket else MISSING)
    config = file.read(PocketRun if is_pocket else RunConfig)
    assert config.summary and config.output == Path("runs") / name


def test_stage_one_has_the_settings_of_the_official_code():
    config = ConfigFile.load("dynamicrafter-512-cil", changes=MISSING).read(RunConfig)
    settings, noise = config.settings, config.objective.time_noise
    assert (settings.learning_rate, settings.max_grad_norm, settings.batch_size) == (1e-5, 0.5, 4)
    assert (settings.accumulate, settings.weight_decay, settings.ema_decay) == (2, 0.01, None)
    assert noise is not None and (noise.strength, noise.power, noise.token_share) == (100, 5, 0.95)
    assert config.data.frame_stride == (1, 6) and config.objective.drop == 0.05


@pytest.fixture
def read(tmp_path: Path):
    def run(text: str, **changes: object) -> RunConfig:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return ConfigFile.load(path, changes=dotted).read(RunConfig)

    return run


def test_single_values_can_be_replaced_and_sections_begun(read):
    config = read(OWN, settings__steps=7, lora__rank=4, objective__noise_range__above=0.5)
    assert (config.settings.steps, config.lora.rank) == (7, 4)
    assert config.objective.noise_range.above == 0.5 and config.data.folder == Path("a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings.learning_rate", float("inf")),
        ("settings.learning_rate", 1e39),
        ("settings.weight_decay", float("inf")),
        ("settings.max_grad_norm", float("inf")),
        ("settings.save_minutes", float("inf")),
        ("settings.seed", 2**63),
        ("settings.steps", 10**18),
        ("objective.noise_range.above", float("nan")),
        ("objective.noise_range.below", 1.5),
        ("objective.time_noise.strength", float("inf")),
        ("lora.alpha", float("inf")),
        ("lora.rank", 0),
        ("data.views", 10**12),
        ("data.flatten_motion", float("inf")),
    ],
)
def test_numbers_with_which_nothing_can_be_trained_are_refused_with_their_key(read, key, value):
    with pytest.raises(ConfigError, match=f"{key}: Input should be .*(?s:.)*`{key}`"):
        read(OWN, **{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("steps", "stepz"), r"yaml:3: settings has no .*`stepz`(?s:.)*Write `steps`"),
        (OWN.replace("model", "modle"), r"yaml:1: .* no setting `modle`(?s:.)*Write `model`"),
        (OWN + "objective:\n  time_noise: {strenght: 3}\n", r"yaml:6: (?s:.)*Write `strength`"),
        (OWN + "objective: {noise_range: {abov: 1}}\n", r"yaml:5: (?s:.)*Write `above`"),
        (OWN + "lora: {rank: 0}\n", r"yaml:5: .*rank.* \(got 0\)"),
        (OWN.replace("steps: 3", "steps: 0"), r"yaml:3: settings.steps.*greater"),
        (OWN.replace("folder: a, ", ""), r"yaml:2: data has no `folder`(?s:.)*'data.folder'"),
        (OWN.replace("steps: 3", "steps: 3, precision: fp8"), r"yaml:3: settings.precision"),
        ("- model", "no mapping"),
        ("model: [", "is not valid YAML"),
        ("#" * 70_000, "longer than"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_is_right(read, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_what_a_pocket_run_cannot_have_is_named():
    with pytest.raises(ConfigError, match="`data` is needed for base"):
        ConfigFile.load("pocket-base", changes={"data": None}).read(PocketRun)
    with pytest.raises(ConfigError, match="`trains` is not for towers"):
        ConfigFile.load("pocket-towers", changes={"trains": "U-Net"}).read(PocketRun)
