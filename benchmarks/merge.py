"""Time and memory of merges against a plain copy of the same bytes, mergekit and sd-mecha.

    python benchmarks/merge.py --small --rounds 3
    python benchmarks/merge.py --mergekit VENV/bin/mergekit-pytorch --official --json

Makes a bf16 pair of the shapes of DynamiCrafter-512's U-Net (1.44 G parameters, 2 x 2.9 GB; with
`--small` a tenth) and runs every row in a process of its own, rounds interleaved, cache warm.
Inside: the seconds that `merge` itself reports, over those of `cat` of the same bytes, which runs
just before; the median of the ratios, the least and the greatest. The same weights as scaled fp8
are copied, and written, as bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SMALL = 0.32
EXTRAPOLATE = "base - 0.25 * (tuned - base)"
DYNAMICS = "base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)"
CONSISTENCY = "tuned + 0.25 * dare(tuned - base, drop_rate=0.7, seed=1)"
RECIPES = {
    "extrapolate": {"merged": EXTRAPOLATE},
    "dare": {"merged": DYNAMICS},
    "both experts": {"dynamics": DYNAMICS, "consistency": CONSISTENCY},
    "temporal only": {"merged": 'base - 0.25 * only(tuned - base, "temporal")'},
}

HASHING = "extrapolate, hashing"
SCALED = "scaled fp8"
OURS = (*RECIPES, HASHING, SCALED)
COPIES = ("cat", "cat both")
COPY_OF = {"both experts": "cat both"}
"""The copy that a row of ours is compared with, if not `cat`."""

# The arithmetic of the official scripts: whole dicts, one per operator (docs/explanation).
RUN_OFFICIAL = """
import copy, json, sys, time, torch
from safetensors.torch import load_file
started = time.perf_counter()
base, tuned = ({k: v.clone() for k, v in load_file(p).items()} for p in sys.argv[1:3])
if sys.argv[4] == "extrapolate":
    kept = copy.deepcopy(tuned)
    moved = {k: base[k] - tuned[k] for k in base}
    scaled = {k: 0.25 * v for k, v in moved.items()}
    result = {k: base[k] + scaled[k] for k in base}
else:
    moved = {k: -0.25 * (tuned[k] - base[k]) for k in base}
    for k, v in moved.items():
        if v.ndim > 1 and not torch.all(v == 0):
            mask = torch.bernoulli(torch.full_like(v, 0.3, dtype=torch.float32))
            moved[k] = (v * mask.to(v.dtype)).div_(0.3)
    scaled = {k: 0.75 * v for k, v in moved.items()}
    result = {k: base[k] + scaled[k] for k in base}
torch.save(result, sys.argv[3] + "/merged.pt")
print(json.dumps(time.perf_counter() - started))
"""

RUN_SD_MECHA = """
import json, sys, time, pathlib, torch
import sd_mecha
base, tuned = (sd_mecha.model(pathlib.Path(p)) for p in sys.argv[1:3])
started = time.perf_counter()
sd_mecha.merge(sd_mecha.weighted_sum(base, tuned, alpha=-0.25), output=pathlib.Path(sys.argv[3])
               / "merged.safetensors", output_dtype=torch.bfloat16, merge_device="cpu")
print(json.dumps(time.perf_counter() - started))
"""

TOUCH_MEMORY = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
getattr(memory, "madvise", print)(getattr(mmap, "MADV_HUGEPAGE", 0))
block = bytes(1 << 20)
while memory.write(block[: len(memory) - memory.tell()]):
    pass
"""

MERGEKIT = """\
merge_method: {method}
base_model: {base}
models:
  - model: {tuned}
    parameters: {{weight: {weight}{density}}}
dtype: bfloat16
"""


def unet_shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """Give the tensors of DynamiCrafter-512's U-Net; `scale` shrinks every width."""
    import torch

    from motionmerge.models.dynamicrafter.unet import DynamiCrafterUNet

    with torch.device("meta"):
        state = DynamiCrafterUNet().state_dict()
    return {
        name: tuple(round(size * scale) if size >= 64 else size for size in value.shape)
        for name, value in state.items()
    }


def make_pair(folder: Path, *, scale: float) -> None:
    """Write base.safetensors ~ N(0, 0.02) and tuned.safetensors = base + N(0, 0.001), bf16."""
    import torch

    from motionmerge.io.weights import open_weights, write_weights
    from motionmerge.rng import generator_for

    shapes = unet_shapes(scale)
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}

    def noise(name: str, what: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator_for(0, what, name))

    base = ((name, (0.02 * noise(name, "base")).bfloat16()) for name in shapes)
    write_weights(folder / "base.safetensors", base, specs=specs)
    with open_weights(folder / "base.safetensors") as reader:
        tuned = (
            (name, (reader.read(name).float() + 1e-3 * noise(name, "tuned")).bfloat16())
            for name in shapes
        )
        write_weights(folder / "tuned.safetensors", tuned, specs=specs)


def make_scaled(folder: Path) -> None:
    """Write both again as ComfyUI's scaled fp8: codes and a scale for all but 1-d tensors."""
    import torch

    from motionmerge.io.weights import open_weights, write_weights

    for name in ("base", "tuned"):
        with open_weights(folder / f"{name}.safetensors") as reader:
            specs = {}
            for key in reader.keys():  # noqa: SIM118  (not a mapping)
                shape = reader.shape(key)
                specs[key] = (torch.float8_e4m3fn if len(shape) > 1 else torch.bfloat16, shape)
                if len(shape) > 1:
                    specs[key.removesuffix(".weight") + ".weight_scale"] = (torch.float32, ())

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                for key in reader.keys():  # noqa: SIM118
                    weight = reader.read(key)
                    if weight.ndim > 1:
                        scale = weight.float().abs().max() / 448
                        yield key.removesuffix(".weight") + ".weight_scale", scale
                        weight = (weight.float() / scale).to(torch.float8_e4m3fn)
                    yield key, weight

            write_weights(folder / f"{name}-fp8.safetensors", tensors(), specs=specs)


def run(command: list[str], *, environment: dict[str, str]) -> dict[str, float]:
    """Run a process; give wall and cpu seconds, peak MB, and the seconds that it says itself."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{text[-2000:]}")
    inside = seconds_said(text)
    inside = wall if inside is None else inside
    cpu = usage.ru_utime + usage.ru_stime
    return {"inside_s": inside, "wall_s": wall, "cpu_s": cpu, "peak_mb": usage.ru_maxrss / 1024}


def seconds_said(text: str) -> float | None:
    """Read the seconds from a report of ours, or the number that a script printed last."""
    last = text.strip().rsplit("\n", 1)[-1]
    with suppress(ValueError, KeyError):
        return json.loads(text[text.index("{") :])["seconds"]
    with suppress(ValueError):
        return float(last)
    return None


def commands(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Give the command of each row."""
    base, tuned, out = (str(folder / n) for n in ("base.safetensors", "tuned.safetensors", "out"))
    rows = {
        "cat": ["sh", "-c", f"cat {base} > {out}/a; cat {tuned} > /dev/null"],
        "cat both": ["sh", "-c", f"cat {base} > {out}/a; cat {tuned} > {out}/b"],
    }
    for name, experts in RECIPES.items():
        recipe = folder / f"{name.replace(' ', '-')}.yaml"
        lines = "".join(f"  {expert}: '{formula}'\n" for expert, formula in experts.items())
        recipe.write_text(
            f"inputs: {{base: base.safetensors, tuned: tuned.safetensors}}\nexperts:\n{lines}"
        )
        command = ["merge", str(recipe), "-o", out, "--overwrite", "--json"]
        rows[name] = [sys.executable, "-m", "motionmerge.cli", *command]
    rows[HASHING] = rows["extrapolate"]
    rows[SCALED] = [
        *rows["extrapolate"],
        *(f"--input={name}={folder}/{name}-fp8.safetensors" for name in ("base", "tuned")),
    ]
    for kind in ("extrapolate", "dare") if options.official else ():
        rows[f"official {kind}"] = [sys.executable, "-c", RUN_OFFICIAL, base, tuned, out, kind]
    for method, weight, density in (
        ("task_arithmetic", -0.25, ""),
        ("dare_linear", -0.1875, ", density: 0.3"),
    ):
        config = folder / f"{method}.yaml"
        config.write_text(
            MERGEKIT.format(method=method, base=base, tuned=tuned, weight=weight, density=density)
        )
        if options.mergekit:
            rows[f"mergekit {method}"] = [options.mergekit, str(config), f"{out}/mergekit"]
    if options.sd_mecha:
        rows["sd-mecha extrapolate"] = [options.sd_mecha, "-c", RUN_SD_MECHA, base, tuned, out]
    wanted = {*COPIES, *(options.only.split(",") if options.only else rows)}
    return {name: command for name, command in rows.items() if name in wanted}


def prepare(folder: Path) -> None:
    """Delete results, read the inputs into the cache, and make the memory for new results quick.

    A virtual machine gives memory that was free for a while back to its host, and getting it again
    costs more than copying; as much as a row writes is touched here, in a process that ends.
    """
    clear = f"rm -rf {folder}/out/*; cat {folder}/*.safetensors"
    subprocess.run(["sh", "-c", clear + " > /dev/null; sync"], check=True)
    written = sum((folder / f"{name}.safetensors").stat().st_size for name in ("base", "tuned"))
    subprocess.run([sys.executable, "-c", TOUCH_MEMORY, str(written)], check=True)


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all rows in turn, `--rounds` times; give medians."""
    (folder / "out").mkdir(exist_ok=True)
    rows = commands(folder, options)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    known, unknown = folder / "known", folder / "unknown"
    shutil.rmtree(unknown, ignore_errors=True)  # a pair that is used again has been hashed
    time.sleep(2.5)  # digests of younger files are not remembered
    if RECIPES.keys() & rows.keys():
        first = next(command for name, command in rows.items() if name in RECIPES)
        run(first, environment={"XDG_CACHE_HOME": str(known)})
    copies: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for number in range(options.rounds):
        for name, command in rows.items():
            if name in COPIES:
                continue
            if name in OURS:  # beside a copy of its own, as the host's speed changes by the minute
                copy = COPY_OF.get(name, "cat")
                prepare(folder)
                copies[name].append(run(rows[copy], environment={}))
                taken[copy].append(copies[name][-1])
            cache = unknown / str(number) if name == HASHING else known
            prepare(folder)
            taken[name].append(run(command, environment={"XDG_CACHE_HOME": str(cache)}))
            print(f"{number} {name}: {taken[name][-1]}", file=sys.stderr, flush=True)
            if copies[name]:
                print(f"  copy {copies[name][-1]['wall_s']:.2f} s", file=sys.stderr, flush=True)
    result = []
    for name, runs in taken.items():
        if not runs:
            continue
        row: dict[str, Any] = {"name": name}
        if name in OURS:
            ratios = sorted(
                mine["inside_s"] / copy["wall_s"]
                for mine, copy in zip(runs, copies[name], strict=True)
            )
            row["inside_ratio"] = statistics.median(ratios)
            row["inside_ratios"] = ratios
        result.append(row | {key: statistics.median(r[key] for r in runs) for key in runs[0]})
    return result


def main() -> None:
    """Parse the options, make the pair, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tenth of the parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names of rows, with commas between them")
    parser.add_argument("--folder", help="where to write; the temporary folder by default")
    parser.add_argument("--mergekit", help="mergekit-pytorch of an environment that has it")
    parser.add_argument("--sd-mecha", help="python of an environment that has sd-mecha")
    parser.add_argument("--official", action="store_true", help="restate the official arithmetic")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make-in", help="only write the pair into this folder")
    parser.add_argument("--pair", help="use the pair that --make-in wrote into this folder")
    options = parser.parse_args()
    scale = SMALL if options.small else 1.0
    if options.make_in:
        make_pair(Path(options.make_in), scale=scale)
        make_scaled(Path(options.make_in))
        return
    if options.pair:
        rows = measure(Path(options.pair), options)
        show(rows, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # In a process of its own: on Linux a child's peak memory is at least its parent's.
        subprocess.run([sys.executable, *sys.argv, "--make-in", folder], check=True)
        rows = measure(Path(folder), options)
    show(rows, options)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows as a table, or with `--json` as they are."""
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':24}{'inside / copy':>26}{'inside s':>10}{'wall s':>8}{'cpu s':>8}{'peak MB':>9}")
    for row in rows:
        ratios = row.get("inside_ratios")
        ratio = f"{row['inside_ratio']:.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})" if ratios else ""
        numbers = (row[key] for key in ("inside_s", "wall_s", "cpu_s", "peak_mb"))
        print("{:24}{:>26}{:10.2f}{:8.2f}{:8.2f}{:9.0f}".format(row["name"], ratio, *numbers))


if __name__ == "__main__":
    main()
