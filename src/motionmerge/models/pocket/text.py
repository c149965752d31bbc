"""The pocket model's tokenizer: a fixed vocabulary that says clearly which words it knows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from motionmerge.errors import DataError
from motionmerge.lazy_torch import torch

from .language import CAMERA_MOVES, COLORS, DIRECTIONS, SHAPES, WORDS

MAX_TOKENS = 24
_PAD, _START, _END = range(3)
_INDEX = {word: index for index, word in enumerate(WORDS)}
_SYNONYMS = {
    "a": "the",
    "an": "the",
    "it": "the",
    "move": "moves",
    "moving": "moves",
    "goes": "moves",
    "pan": "pans",
    "panning": "pans",
    "tilt": "tilts",
    "zoom": "zooms",
    "square": "box",
    "circle": "ball",
    "upwards": "up",
    "downwards": "down",
    "rest": "rests",
    "static": "rests",
    "is": None,
    "to": None,
    "while": "and",
}


def known_words(prompt: str) -> list[str]:
    """List a prompt's words as the model knows them: synonyms replaced, empty words left out."""
    words = re.findall(r"[a-z0-9']+", prompt.lower())
    known = (_SYNONYMS.get(word, word) for word in words)
    return [word for word in known if word is not None]


_DIRECTION, _CAMERA = "|".join(DIRECTIONS), "|".join(CAMERA_MOVES)
_CLAUSE = re.compile(
    rf"(?P<thing>(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})) moves "
    rf"(?P<first>{_DIRECTION})(?: then (?:moves )?(?P<second>{_DIRECTION}))?"
    rf"|camera (?P<camera>{_CAMERA})"
)
_MOST = {"thing": 2, "camera": 1}

LANGUAGE = (
    "Join by `and` at most two of `the COLOR SHAPE moves DIRECTION`, where a second direction can "
    f"follow after `then`, and one of `the camera MOVE`. Colors: {', '.join(COLORS)}. Shapes: "
    f"{', '.join(SHAPES)}. Directions: {', '.join(DIRECTIONS)}. Moves of the camera: "
    f"{', '.join(CAMERA_MOVES)}."
)
"""All that the pocket model understands, in the words of a `Fix:`."""


def check_prompt(prompt: str) -> None:
    """Check that the pocket model can read a prompt; torch is not imported for it.

    Raises:
        DataError: As `PocketTokenizer`.
    """
    _encode(prompt)


class PocketTokenizer:
    """Turn prompts into token ids `[batch, 24]`; what is not understood is an error, never a guess.

    Case, punctuation and missing articles do not matter; some synonyms are understood ("square" is
    "box"). An empty prompt says nothing of what happens.
    """

    model_max_length = MAX_TOKENS

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Tokenize.

        Raises:
            DataError: a word is unknown (all known ones are listed), a clause is not whole, or a
                prompt is too long.
        """
        return torch.tensor([_encode(prompt) for prompt in prompts])


def _encode(prompt: str) -> list[int]:
    words = _as_trained(_understood_words(prompt), prompt=prompt)
    tokens = [_START, *(_INDEX[word] for word in words), _END]
    if len(tokens) > MAX_TOKENS:
        raise DataError(
            f"The prompt has {len(tokens) - 2} words; the pocket model reads {MAX_TOKENS - 2}",
            fix="Describe at most two objects and the camera.",
        )
    return tokens + [_PAD] * (MAX_TOKENS - len(tokens))


def _understood_words(prompt: str) -> list[str]:
    words = []
    for word in re.findall(r"[a-z0-9']+", prompt.lower()):
        known = _SYNONYMS.get(word, word)
        if known is None:
            continue
        if known not in _INDEX:
            near = difflib.get_close_matches(word, list(_INDEX)[3:], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"The pocket model does not know the word {word!r} in {prompt!r}.{hint}",
                fix="Use only these words: " + " ".join(WORDS[3:]) + '. Example: "the red ball '
                'moves up then left and the camera pans left".',
            )
        words.append(known)
    return words


def _as_trained(words: Sequence[str], *, prompt: str) -> list[str]:
    """Write a prompt as the captions are that the model was trained on.

    Raises:
        DataError: A clause is not whole, or there are more of a kind than in any caption.
    """
    if not words:
        return []
    clauses, counts = [], dict.fromkeys(_MOST, 0)
    for clause in " ".join(words).split(" and "):
        found = _CLAUSE.fullmatch(" ".join(word for word in clause.split() if word != "the"))
        if found is None:
            raise DataError(
                f"The pocket model does not understand {clause!r} in {prompt!r}.", fix=LANGUAGE
            )
        counts["thing" if found["thing"] else "camera"] += 1
        if found["camera"]:
            clauses.append(f"the camera {found['camera']}")
        else:
            moves = " then ".join(filter(None, (found["first"], found["second"])))
            clauses.append(f"the {found['thing']} moves {moves}")
    caption = " and ".join(clauses).split()
    if len(caption) + 2 <= MAX_TOKENS and any(counts[kind] > most for kind, most in _MOST.items()):
        raise DataError(
            f"The prompt {prompt!r} moves {counts['thing']} things and tells {counts['camera']} "
            "moves of the camera; the pocket model knows at most two things and one.",
            fix=LANGUAGE,
        )
    return caption
