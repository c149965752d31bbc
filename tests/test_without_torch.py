"""With the base dependencies alone: which verbs work, with which bits, and what the others say."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from motionmerge.merging.compute.compiled import compiled_kernels

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "av", "PIL", "ftfy")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def base_dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [Requirement(line).name for line in project["dependencies"]]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from that holds the base dependencies and what these need."""
    folder = tmp_path_factory.mktemp("light")
    waiting, seen = base_dependencies(), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for other systems
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return folder


@pytest.fixture(params=["compiled", "numpy"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The package, with its compiled kernels and without them."""
    if request.param == "compiled":
        if compiled_kernels() is None:
            pytest.skip("there are no compiled kernels")
        return SOURCE
    package = tmp_path / "uncompiled" / "motionmerge"
    for path in (SOURCE / "motionmerge").rglob("*.py"):
        target = package / path.relative_to(SOURCE / "motionmerge")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    (package / "recipes").symlink_to(SOURCE / "motionmerge" / "recipes")
    return package.parent


def run_light(light: Path, code: list[str], source: Path = SOURCE) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{light}"}
    # -S leaves out the environment's own packages
    command = [sys.executable, "-S", *code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def verbs(light: Path, *lines: Sequence[object], source: Path = SOURCE) -> list[str]:
    """Run several command lines in one process; return what each printed."""
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from motionmerge.cli import app\n"
        "printed = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    printed.append(result.stdout)\n"
        "print(json.dumps(printed))\n"
    )
    words = [[str(word) for word in line] for line in lines]
    done = run_light(light, ["-c", code, json.dumps(words)], source)
    assert done.returncode == 0, done.stderr
    printed: list[str] = json.loads(done.stdout)
    return printed


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A folder for each dtype, with two tiny checkpoints whose entries have every size."""
    return {name: write_pair(tmp_path / name, dtype) for name, dtype in DTYPES.items()}


def write_pair(folder: Path, dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{f"blocks.{i}.attn1.to_q.weight": (24, 24) for i in range(2)},
        "blocks.0.attn1.to_q.bias": (24,),
        "patch_embedding.weight": (24, 4, 1, 2, 2),
        "scale_shift_table": (1, 2, 24),
        "condition_embedder.time_embedder.linear_1.weight": (24, 16),
    }
    base, tuned = {}, {}
    for name, shape in shapes.items():
        size = torch.randint(-24, 3, shape, generator=generator).float().exp2()
        value = torch.randn(shape, generator=generator) * size
        base[name] = value.to(dtype)
        change = 0.05 * torch.randn(shape, generator=generator) * size
        tuned[name] = (value + change).to(dtype)
    folder.mkdir()
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder


def write_recipe(folder: Path, **experts: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "inputs": {"base": "base.safetensors", "tuned": "tuned.safetensors"},
                "experts": experts,
                "schedule": [{"expert": name} for name in experts][-1:],
            }
        )
    )
    return path


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(
            a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)
        )
        for name in a
    )


def test_a_merge_has_the_bits_of_one_with_torch(folders, light, source, monkeypatch):
    from motionmerge import merge
    from motionmerge.merging.compute import kernel, streaming

    lines, settings = [], []
    for folder in folders.values():
        recipe = write_recipe(
            folder,
            dared="base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)",
            plain="base - 0.3 * only(tuned - base, 'joint')",
            both="base + 0.4 * (tuned - base) + 0.1 * dare(tuned - base, drop_rate=0.5, seed=2)",
            more="tuned + 1.7 * (tuned - base)",
        )
        for dtype in DTYPES:
            output = folder / f"light {dtype}"
            lines.append(["merge", recipe, "-o", output, "--dtype", dtype])
            settings.append((recipe, output, dtype))
    verbs(light, *lines, source=source)
    for module in (kernel, streaming):
        monkeypatch.setattr(module, "compiled_kernels", lambda: None)
    for recipe, output, dtype in settings:
        written = merge(recipe, recipe.parent / f"torch {dtype}", dtype=dtype)
        assert len(written.experts) == 4
        for expert in written.experts.values():
            path = Path(expert.path)
            assert same(output / path.name, path), (recipe, dtype, path.name)


def test_extrapolate_show_compare_and_files_for_comfyui_need_no_torch(folders, light, source):
    from motionmerge import compare, export_comfyui

    lines, num_verbs = [], 6
    for folder in folders.values():
        base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
        made = folder / "out" / "extrapolated.safetensors"
        recipe = write_recipe(folder, more="base + 0.4 * (tuned - base)")
        lines += [
            ["extrapolate", base, tuned, "-o", made.parent],
            ["show", made, "--groups"],
            ["show", base, "--json"],
            ["compare", base, tuned, "--json"],
            ["compare", base, made, "--base", tuned, "--json"],
            ["export", "comfyui", recipe, "-o", folder / "light"],
        ]
    printed = verbs(light, *lines, source=source)
    for number, folder in enumerate(folders.values()):
        _, shown, of_base, difference, from_tuned, _ = printed[number * num_verbs :][:num_verbs]
        assert "tuned - base" in shown
        assert json.loads(of_base)["tensors"] == 6
        found = compare(folder / "base.safetensors", folder / "tuned.safetensors")
        assert json.loads(difference) == json.loads(json.dumps(found.to_dict()))
        assert json.loads(from_tuned)["total"]["cosine"] > 0.99
        export_comfyui(folder / "recipe.yaml", folder / "torch")
        assert same(folder / "light" / "more.safetensors", folder / "torch" / "more.safetensors")


def test_what_is_infinite_is_named_without_torch(light, source, tmp_path):
    weight = torch.full((4, 4), 60000.0, dtype=torch.float16)
    save_file({"blocks.0.to_q.weight": weight}, tmp_path / "base.safetensors")
    save_file({"blocks.0.to_q.weight": -weight}, tmp_path / "tuned.safetensors")
    code = ["-m", "motionmerge.cli", "extrapolate", "base.safetensors", "tuned.safetensors"]
    words = [*code[:3], *(str(tmp_path / word) for word in code[3:]), "-o", str(tmp_path / "o")]
    done = run_light(light, [*words, "--motion", "1"], source)
    assert done.returncode == 2
    assert "reaches 1.8e+05, which does not fit into fp16" in done.stderr
    weight[0, 0] = torch.nan
    save_file({"blocks.0.to_q.weight": weight}, tmp_path / "tuned.safetensors")
    done = run_light(light, words, source)
    assert done.returncode == 2
    assert "holds NaN or infinity in 1 of 16 entries" in done.stderr


NEEDS_VIDEOS = {
    "generate": ["generate", "photo.jpg", "--prompt", "a cat", "--model", "pocket"],
    "demo": ["demo"],
    "loras": ["export", "loras", "recipe.yaml", "-o", "out"],
    "pickles": ["show", "weights.ckpt"],
    "fp64": ["extrapolate", "fp64.safetensors", "fp64.safetensors", "-o", "out"],
}


@pytest.mark.parametrize("words", NEEDS_VIDEOS.values(), ids=list(NEEDS_VIDEOS))
def test_other_verbs_name_the_extra(words, light, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"blocks.0.to_q.weight": torch.ones(4, 4)}
    save_file(state, "base.safetensors")
    save_file(state, "tuned.safetensors")
    save_file({name: value.double() for name, value in state.items()}, "fp64.safetensors")
    torch.save(state, "weights.ckpt")
    write_recipe(tmp_path, more="base + 0.5 * (tuned - base)")
    from motionmerge import load_photo

    load_photo("coffee").save("photo.jpg")
    done = run_light(light, ["-m", "motionmerge.cli", *words])
    assert done.returncode == 2
    assert re.search(r"This needs \w+, which is not installed", done.stderr)
    assert "Fix: Run `pip install 'motionmerge[videos]'`." in done.stderr


def test_measuring_names_its_own_extra(light):
    done = run_light(light, ["-m", "motionmerge.cli", "measure", "video.mp4"])
    assert done.returncode == 2
    assert "Fix: Run `pip install 'motionmerge[eval]'`." in done.stderr


def test_measuring_imports_no_torch():
    pytest.importorskip("cv2", reason="the extra `eval` is not installed")
    code = (
        "import sys\n"
        "import motionmerge.evaluation.runs, motionmerge.evaluation.summary\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_word_that_the_pocket_model_does_not_know_is_refused_before_torch_is_imported(tmp_path):
    pytest.importorskip("PIL", reason="the extra `videos` is not installed")
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    words = ["generate", str(tmp_path / "photo.png"), "--prompt", "a dragon", "-o", "x.mp4"]
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from motionmerge.cli import app\n"
        f"result = CliRunner().invoke(app, {words!r})\n"
        "assert \"the word 'dragon'\" in result.output and result.exit_code == 2, result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_public_names_name_the_extra(light):
    code = (
        "import motionmerge\n"
        "light, heavy = [], []\n"
        "for name in motionmerge.__all__:\n"
        "    try:\n"
        "        getattr(motionmerge, name)\n"
        "        light.append(name)\n"
        "    except motionmerge.ConfigError as error:\n"
        "        assert 'motionmerge[videos]' in error.fix\n"
        "        heavy.append(name)\n"
        "import json, sys\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([light, heavy]))\n"
    )
    done = run_light(light, ["-c", code])
    assert done.returncode == 0, done.stderr
    without, needing = json.loads(done.stdout)
    assert {"merge", "apply", "compare", "Recipe", "export_comfyui", "open_weights"} <= {*without}
    assert {"make_video", "load_image", "experts", "load_pipeline"} <= {*needing}
