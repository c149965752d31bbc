"""Words for what was measured: what to look for in a clip, what goes wrong, what a run showed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from motionmerge.evaluation.pocket.claims import degree_difference, paired_difference
from motionmerge.evaluation.pocket.motion import ActorMeasures, ClipMeasures
from motionmerge.evaluation.pocket.runs import ConditionResults
from motionmerge.evaluation.statistics import Estimate
from motionmerge.models.pocket.language import Actor, Program

_HALVES = ("in the first half", "in the second half")
_SLIDES = {
    "pans left": "the photo sliding to the right",
    "pans right": "the photo sliding to the left",
    "tilts up": "the photo sliding down",
    "tilts down": "the photo sliding up",
    "zooms in": "the photo growing",
    "zooms out": "the photo shrinking",
    "rests": "the photo standing still",
}


def what_to_look_for(program: Program) -> str:
    """Describe what to see if a prompt is obeyed, as the rest of a sentence."""
    wanted = [f"{_name(actor)} going {' and then '.join(actor.moves)}" for actor in program.actors]
    if program.camera_is_captioned:
        wanted.append(f"{_SLIDES[program.camera]}, as the camera {program.camera}")
        return f"{_listed(wanted)}."
    return f"{_listed(wanted)}. Of the camera the prompt says nothing: it may do as it likes."


def disobedience(measures: ClipMeasures, program: Program) -> list[str]:
    """List what the objects and the camera do against the prompt; nothing where they obey."""
    faults = []
    for actor, own in zip(program.actors, measures.actors, strict=True):
        wrong = [
            (f"{_seen(moved, told)} instead of {told}", half)
            for moved, right, told, half in zip(
                own.displacements, own.directions_right, actor.phases, _HALVES, strict=True
            )
            if not right
        ]
        if len({words for words, _ in wrong}) < len(wrong):  # in both halves the same
            wrong = [(wrong[0][0], "throughout")]
        faults += [f"{_name(actor)} {words} {half}" for words, half in wrong]
    if program.camera_is_captioned and measures.camera_kind != program.camera:
        faults.append(
            f"the camera {measures.camera_kind}; the prompt says that it {program.camera}"
        )
    return faults


def damage(measures: ClipMeasures, program: Program) -> list[str]:
    """List the objects that are no longer whole."""
    faults = [
        f"{_name(actor)} {_broken(own)}"
        for actor, own in zip(program.actors, measures.actors, strict=True)
        if not own.whole
    ]
    return faults if measures.picture_holds else [*faults, "the photo tears or is lost"]


def result_sentence(full: ConditionResults, tuned: ConditionResults) -> str:
    """Describe a run in a sentence: two experts against the fine-tuned weights.

    A difference whose paired 95 % interval holds 0 is said to be one that may be chance.
    """
    far, near = full.degree, tuned.degree
    gain = degree_difference(full, tuned)
    times = f", {far / near:.1f} times as far" if near > 0 and gain.low > 0 else ""
    motion = (
        f"moves the camera {_compared(gain, 'farther', 'less far')} than the fine-tuned weights"
    )
    shares = [
        f"{words} {_compared(paired_difference(full, tuned, name), 'more often', 'less often')} "
        f"({100 * share(full, name):.0f} against {100 * share(tuned, name):.0f} % of the clips)"
        for name, words in (
            ("did_all", "does all that the prompt says"),
            ("whole", "leaves the clip whole"),
        )
    ]
    return (
        f"On {len(full.clips)} held-out prompts the full method {motion} "
        f"({far:.1f} against {near:.1f} px{times}), {shares[0]} and {shares[1]}."
    )


def share(results: ConditionResults, measure: str) -> float:
    """Return the share of clips for which a measure holds, in [0, 1]."""
    return float(results.column(measure).mean())


def _compared(difference: Estimate, more: str, less: str) -> str:
    if difference.low > 0:
        return more
    if difference.high < 0:
        return less
    return f"neither measurably {more} nor {less}"


def _name(actor: Actor) -> str:
    return f"the {actor.color} {actor.shape}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts)


def _seen(moved: tuple[float, float], told: str) -> str:
    """Describe where an object went that did not obey its prompt."""
    x, y = moved
    if math.isnan(x) or math.isnan(y):
        return "is gone"
    if max(abs(x), abs(y)) < 1:
        return "stands still"
    across = "right" if x > 0 else "left"
    along = "down" if y > 0 else "up"
    seen = across if abs(x) >= abs(y) else along
    return f"goes {seen}" if seen != told else "hardly moves"


def _broken(own: ActorMeasures) -> str:
    if own.area_ratio == 0:
        return "vanishes"
    return "splits or smears"
