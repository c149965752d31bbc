"""EDG's row of VBench-I2V, as docs/how-to/vbench.md has it, on tiny models in place of the real."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from motionmerge.cli import app

from ...tiny.folders import save_dynamicrafter

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "vbench.md"
SUITE = [
    {"prompt_en": "a cat", "image_name": "a cat.png", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a cat, camera pans left",
        "image_name": "a cat.png",
        "dimension": ["camera_motion"],
    },
]
TRACKS = """
import torch
def track(frames):
    at = torch.linspace(1, frames.shape[-1] - 2, 10)
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1).repeat(len(frames), 1, 1)
"""


def block(language: str, beginning: str) -> str:
    """The block of the page that begins so."""
    pattern = rf"^ *```{language}\n( *{re.escape(beginning)}.*?)^ *```"
    found = re.search(pattern, PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return textwrap.dedent(found[1])


def words_of(line: str, **variables: str) -> list[str]:
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    assert "$" not in line
    return shlex.split(line)[1:]


def test_base_cil_and_edg_stand_in_one_table(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_dynamicrafter(tmp_path / "dc", seed=0)
    save_dynamicrafter(tmp_path / "cil", seed=1)
    (tmp_path / "crop" / "8-5").mkdir(parents=True)
    Image.radial_gradient("L").save(tmp_path / "crop" / "8-5" / "a cat.png")
    Path("track.py").write_text(TRACKS)
    Path("vbench2_i2v_full_info.json").write_text(json.dumps(SUITE))
    exec(block("python", "import json"), {})

    script = block("bash", "hf download").splitlines()
    (edg,) = (line.partition("=")[2].strip('"') for line in script if line.startswith("edg="))
    (rows,) = (shlex.split(line[11:-4]) for line in script if line.startswith("for row in "))
    batch, measure, total = (
        next(line.strip() for line in script if line.strip().startswith(f"motionmerge {verb}"))
        for verb in ("batch", "evaluate vbench", "evaluate total")
    )
    batch = batch.replace("--num-videos 5", "--num-videos 1")

    def call(words: list[str]) -> str:
        made = CliRunner().invoke(app, words)
        assert made.exit_code == 0, made.output
        return made.stdout

    for row in rows:
        name, model, *options = row.replace("$edg", edg).split()
        given = {"name": name, "model": model, "@": " ".join(options)}
        call([*words_of(batch.replace('"$@"', "$@"), **given), "--steps", "1"])
        nets = "--weights cotracker=track.py"
        call(words_of(measure, name=name, list="vbench2_i2v_full_info.json", nets=nets))
    lines = call(words_of(total)).splitlines()
    assert lines[0].split()[1:] == ["base", "cil", "edg"]
    flickering = next(line for line in lines if line.startswith("temporal_flickering")).split()
    assert len(set(flickering[1:])) == 3  # three models, three videos
    assert [line.split()[0] for line in lines[1:]] == [
        *("camera_motion", "temporal_flickering", "quality", "i2v", "total")
    ]
