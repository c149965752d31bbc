"""Simulated raters of a study: whoever knows the truth can see whether the analysis finds it.

    python benchmarks/simulated_raters.py study full=0.8 base=0 --raters 24 -o simulated.jsonl

Each system has a strength. A rater prefers it by the difference, with noise of the scene and of the
moment (both normal); small differences are ties. Careless raters click at random, checks included.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motionmerge.evaluation.study.manifest import AttentionCheck, Study, read_study

TIE_BELOW, SCENE_SPREAD, MOMENT_SPREAD = 0.25, 0.3, 0.8


def simulated_answers(
    study: Study,
    strengths: Mapping[str, float],
    *,
    num_raters: int,
    seed: int = 0,
    careless: float = 0.0,
    left_bias: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Answer a study as its page would send it.

    Args:
        study: What is answered.
        strengths: Of each system.
        num_raters: How many answer; they take the forms in turn.
        seed: Of everything that is drawn.
        careless: Share of raters who click at random.
        left_bias: Added to whatever is on the left.
    """
    draw, manifest = random.Random(seed), study.manifest
    scenes: dict[tuple[Any, ...], float] = {}
    for number in range(num_raters):
        rater, is_careless = f"{draw.getrandbits(128):032x}", draw.random() < careless
        swapped = draw.random() < 0.5
        tasks = [one for one in manifest.tasks if one.form == number % manifest.num_forms]
        draw.shuffle(tasks)
        pairs = [one for one in tasks if one.first != one.second]
        again = pairs[: manifest.num_repeats]
        shown = [(one, False) for one in tasks] + [(one, True) for one in again]
        for place, (task, repeat) in enumerate(shown):
            turned = swapped != repeat
            choices = {}
            for question in manifest.questions:
                what = study.key[task.id]
                if is_careless:
                    choices[question] = draw.choice(["left", "right", "tie"])
                elif isinstance(what, AttentionCheck):
                    choices[question] = what.expected
                else:
                    scene = (question, what.scene, *sorted((what.first, what.second)))
                    effect = scenes.setdefault(scene, draw.gauss(0, SCENE_SPREAD))
                    sign = 1 if what.first < what.second else -1
                    value = strengths[what.first] - strengths[what.second] + sign * effect
                    value = (-value if turned else value) + left_bias
                    value += draw.gauss(0, MOMENT_SPREAD)
                    choices[question] = (
                        "tie" if abs(value) < TIE_BELOW else "left" if value > 0 else "right"
                    )
            yield {
                "study": manifest.id,
                "rater": rater,
                "task": task.id,
                "repeat": repeat,
                "swapped": turned,
                "choices": choices,
                "seconds": round(draw.uniform(0.5, 1.5) if is_careless else draw.uniform(8, 30), 1),
                "place": place,
            }


def main() -> None:
    """Read the command line, and write answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("strengths", nargs="+", metavar="NAME=STRENGTH")
    parser.add_argument("--raters", type=int, default=24)
    parser.add_argument("--careless", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("simulated.jsonl"))
    given = parser.parse_args()
    pairs = (one.partition("=") for one in given.strengths)
    strengths = {name: float(value) for name, _, value in pairs}
    answers = simulated_answers(
        read_study(given.study),
        strengths,
        num_raters=given.raters,
        seed=given.seed,
        careless=given.careless,
    )
    lines = [json.dumps(answer) + "\n" for answer in answers]
    given.output.write_text("".join(lines))
    print(f"wrote {len(lines)} simulated answers to {given.output}")


if __name__ == "__main__":
    main()
