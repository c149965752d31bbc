"""Names of UCF101's videos: `v_ApplyEyeMakeup_g01_c01` is class, group and clip.

Source: Soomro et al. 2012 (UCF101).
"""

from __future__ import annotations

import re

_NAME = re.compile(r"v_(?P<name>[A-Za-z0-9]{1,60})_g\d{2}_c\d{2}")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def class_in_name(stem: str) -> str | None:
    """Return the class that a file's name without suffix states; None if it is none of UCF101's."""
    found = _NAME.fullmatch(stem)
    return found["name"] if found else None


def words_of_class(class_name: str) -> str:
    """Separate the words of a class: `ApplyEyeMakeup` is written `Apply Eye Makeup`."""
    return " ".join(_WORD.findall(class_name))
