"""Random bytes, guided by coverage, for the safetensors header reader and the recipe parser.

    pip install atheris && python benchmarks/fuzz.py --seconds 180

Only the package's named errors may come out of them, whatever goes in; what is read is read whole,
and what is parsed prints a text that parses to the same. Anything else stops the run with the
input. Needs atheris (Linux, CPython), which is in no list of dependencies.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    raise SystemExit(
        "atheris is not installed.\nFix: run `pip install atheris` in an environment of its own; "
        "the shorter fuzz tests of the suite, with hypothesis, need none."
    ) from None

with atheris.instrument_imports(include=["motionmerge"]):
    from motionmerge.errors import MotionMergeError
    from motionmerge.io.safetensors_file import SafetensorsFile
    from motionmerge.merging.recipes.parser import parse_expression
    from motionmerge.merging.recipes.recipe import Recipe

NAMES = ("base", "tuned", "style")
HEADER, WHOLE, RECIPE, EXPRESSION = range(4)
ENTRY = b'{"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
EXPRESSIONS = (
    b"base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)",
    b'base - only(low_rank(ties(tuned - base, 2 * (style - base), keep=0.3), rank=4), "re:a")',
    b"base + trim(tuned - base, keep=0.2) + lora(style, 1.0)",
)
RECIPES = (
    b"inputs: {base: a.safetensors, tuned: {path: b, sha256: null}}\n"
    b'experts:\n  dynamics: base - 0.25 * (tuned - base)\n  consistency: base + lora("c", 1.0)\n'
    b"schedule:\n  - {expert: dynamics, above: 0.64}\n  - {expert: consistency}\n",
)
WORDS = (
    "__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "I64", "F8_E4M3",
    "inputs:", "experts:", "schedule:", "above:", "timestep:", "step_fraction:", "sha256:",
    "path:", "dare(", "drop_rate=", "seed=", "only(", "temporal", "re:", "trim(", "keep=",
    "ties(", "low_rank(", "rank=", "lora(", "base", "tuned", "style", "lambda:", "**", "1e999",
)  # fmt: skip


def read_whole(path: Path, data: bytes) -> None:
    """Open the bytes as a file and read every tensor."""
    path.write_bytes(data)
    file = SafetensorsFile(path)
    try:
        for name in file.tensors:
            file.read(name)
    finally:
        file.close()


def parse_and_print(text: str) -> None:
    """Parse a recipe, print it and parse it again."""
    recipe = Recipe.parse(text)
    assert Recipe.parse(recipe.print()) == recipe, recipe.print()


def express_and_print(text: str) -> None:
    """Parse an expression, print it and parse it again."""
    expression = parse_expression(text, NAMES)
    assert parse_expression(str(expression), NAMES) == expression, str(expression)


def main() -> None:
    """Fuzz for some seconds; the number of executions is printed at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0, help="0 draws one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, words = Path(folder) / "corpus", Path(folder) / "words"
        corpus.mkdir()
        entry = struct.pack("<Q", len(ENTRY)) + ENTRY + bytes(8)
        starts = [bytes([HEADER]) + ENTRY, bytes([WHOLE]) + entry]
        starts += [bytes([RECIPE]) + text for text in RECIPES]
        starts += [bytes([EXPRESSION]) + text for text in EXPRESSIONS]
        for number, start in enumerate(starts):
            (corpus / str(number)).write_bytes(start)
        words.write_text("".join(f'"{word}"\n' for word in WORDS), encoding="utf-8")
        file = Path(folder) / "model.safetensors"

        def test_one_input(data: bytes) -> None:
            kind, rest = data[0] % 4 if data else HEADER, data[1:]
            try:
                if kind == HEADER:
                    read_whole(file, struct.pack("<Q", len(rest)) + rest + bytes(8))
                elif kind == WHOLE:
                    read_whole(file, rest)
                elif kind == RECIPE:
                    parse_and_print(rest.decode("utf-8", errors="replace"))
                else:
                    express_and_print(rest.decode("utf-8", errors="replace"))
            except MotionMergeError:
                pass

        settings = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=2048"]
        settings += ["-timeout=20", "-print_final_stats=1", f"-dict={words}", str(corpus)]
        atheris.Setup([sys.argv[0], *settings], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
