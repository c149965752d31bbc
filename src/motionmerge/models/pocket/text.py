"""The pocket model's tokenizer: a fixed vocabulary that says clearly which words it knows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch

from motionmerge.errors import DataError

from .language import WORDS

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


class PocketTokenizer:
    """Turn prompts into token ids `[batch, 24]`; unknown words are an error, never a guess.

    Case and punctuation do not matter; some synonyms are understood ("square" is "box").
    """

    model_max_length = MAX_TOKENS

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Tokenize.

        Raises:
            DataError: a word is unknown (all known ones are listed), or a prompt is too long.
        """
        return torch.tensor([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> list[int]:
        tokens = [_START]
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
            tokens.append(_INDEX[known])
        tokens.append(_END)
        if len(tokens) > MAX_TOKENS:
            raise DataError(
                f"The prompt has {len(tokens) - 2} words; the pocket model reads {MAX_TOKENS - 2}",
                fix="Describe at most two objects and the camera.",
            )
        return tokens + [_PAD] * (MAX_TOKENS - len(tokens))
