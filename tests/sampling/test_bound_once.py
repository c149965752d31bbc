"""A run looks at its inputs once, and says the same of its videos whichever verb makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from motionmerge.cli import app
from motionmerge.io.hashing import hash_file
from motionmerge.io.safetensors_file import SafetensorsFile
from motionmerge.io.video import read_video_metadata
from motionmerge.merging.recipes import bound as bound_recipes
from motionmerge.sampling.batch.batch import CONFIGURATION_KEY

from ..tiny.folders import family_named, save_tiny
from ..tiny.pipelines import other_weights, photo

RECIPE = """\
inputs:
  base: {{path: base.safetensors, sha256: {base}}}
  tuned: {{path: tuned.safetensors, sha256: {tuned}}}
experts:
  dynamics: base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)
  consistency: tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)
schedule:
  - {{expert: dynamics, above: 0.64}}
  - {{expert: consistency}}
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A tiny Wan 2.1, two sets of weights for it, and a recipe that pins both."""
    pipeline = save_tiny("Wan 2.1", tmp_path / "wan")
    digests = {}
    for seed, name in enumerate(("base", "tuned")):
        file = tmp_path / f"{name}.safetensors"
        save_file(other_weights(pipeline, family_named("Wan 2.1"), seed=seed), file)
        digests[name] = hash_file(file).removeprefix("sha256:")
    (tmp_path / "pinned.yaml").write_text(RECIPE.format(**digests))
    photo(24).save(tmp_path / "photo.png")
    return tmp_path


def counted(function: Callable[..., Any], calls: Counter[str], key: Callable[..., str]) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        calls[key(*arguments)] += 1
        return function(*arguments, **options)

    return run


def test_generate_looks_at_each_input_of_a_pinned_recipe_once(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    checks: Counter[str] = Counter()

    def replace(home: Any, name: str, calls: Counter[str], key: Callable[..., str]) -> None:
        monkeypatch.setattr(home, name, counted(getattr(home, name), calls, key))

    replace(bound_recipes, "hash_origin", hashed, lambda path: path.name)
    replace(bound_recipes, "check_coverage", checks, lambda *_: "coverage")
    replace(bound_recipes.BoundRecipe, "_compare_pins", checks, lambda *_: "pins")
    replace(SafetensorsFile, "__init__", opened, lambda _, path: Path(path).name)

    small = ["--steps", "2", "--height", "16", "--width", "16", "--num-frames", "5"]
    command = ["generate", str(workplace / "photo.png"), "--model", str(workplace / "wan"), *small]
    files = ["--recipe", str(workplace / "pinned.yaml"), "-o", str(workplace / "v.mp4")]
    result = CliRunner().invoke(app, [*command, *files, "--prompt", "a cat"])

    assert result.exit_code == 0, result.output
    assert hashed == {"base.safetensors": 1, "tuned.safetensors": 1}
    assert checks == {"coverage": 1, "pins": 1}
    inputs = {name: opened[name] for name in ("base.safetensors", "tuned.safetensors")}
    assert all(1 <= count <= 2 for count in inputs.values()), inputs


def test_generate_and_batch_say_the_same_of_a_video(workplace: Path) -> None:
    (workplace / "m.jsonl").write_text('{"image": "photo.png", "prompt": "a cat"}\n')
    small = ["--steps", "2", "--height", "16", "--width", "16", "--num-frames", "5"]
    shared = ["--model", str(workplace / "wan"), "--recipe", str(workplace / "pinned.yaml"), *small]
    single = ["generate", str(workplace / "photo.png"), "--prompt", "a cat"]
    several = ["batch", str(workplace / "m.jsonl")]
    for command, output in ((single, workplace / "v.mp4"), (several, workplace / "videos")):
        result = CliRunner().invoke(app, [*command, *shared, "-o", str(output)])
        assert result.exit_code == 0, result.output
    (made,) = (workplace / "videos").glob("*.mp4")
    first, second = read_video_metadata(workplace / "v.mp4"), read_video_metadata(made)
    assert second.pop(CONFIGURATION_KEY)
    assert first == second
