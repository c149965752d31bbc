"""Find the videos of UCF101 by their names, and the words of their classes.

A video is called `v_ApplyEyeMakeup_g01_c01.avi`: class, group and clip. Videos lie in folders of
their classes, as the data set is published, or all in one folder.

Source: Soomro et al. 2012 (UCF101).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from motionmerge.errors import ConfigError, DataError
from motionmerge.io.decoding import SUFFIXES
from motionmerge.io.paths import is_plain_file
from motionmerge.io.ucf101_names import class_in_name, words_of_class
from motionmerge.sampling.batch.manifest import read_list
from motionmerge.text import lines_of

CLASS_NAME = "class-name"
PLACEHOLDER = "{class}"
MOST_CANDIDATES = 100_000
"""UCF101 has 13,320 videos."""


@dataclass(frozen=True)
class Candidate:
    """A video of UCF101.

    Attributes:
        path: The file.
        class_name: As the file's name has it, such as `ApplyEyeMakeup`.
    """

    path: Path
    class_name: str

    @property
    def id(self) -> str:
        """The name without its suffix."""
        return self.path.stem


@dataclass(frozen=True)
class PromptRule:
    """How a class becomes a prompt; papers do not say how, so it must be chosen.

    Attributes:
        text: `class-name`, or a text with `{class}` in it.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text != CLASS_NAME and PLACEHOLDER not in self.text:
            raise ConfigError(
                f"The rule {self.text[:80]!r} gives all classes the same prompt.",
                fix=f"Give `prompt=` as {CLASS_NAME}, or as a text such as "
                f"'a video of {PLACEHOLDER}'.",
            )

    def of(self, class_name: str) -> str:
        """Return the prompt of a class; `ApplyEyeMakeup` is written `Apply Eye Makeup`."""
        words = words_of_class(class_name)
        return words if self.text == CLASS_NAME else self.text.replace(PLACEHOLDER, words)


def find_candidates(folder: Path, *, split: Path | None = None) -> list[Candidate]:
    """List the videos of UCF101 in a folder or its class folders, sorted by name.

    Args:
        folder: The data set.
        split: A list such as `testlist01.txt`; only its videos are taken.

    Raises:
        DataError: There is none, two have one name, or the split names one that is not there.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder.", fix="Give the folder of UCF101's videos.")
    found: dict[str, Candidate] = {}
    for pattern in ("v_*", "*/v_*"):
        for path in folder.glob(pattern):
            name = class_in_name(path.stem)
            if name is None or path.suffix.lower() not in SUFFIXES or not is_plain_file(path):
                continue
            one = found.setdefault(path.stem, Candidate(path, name))
            if one.path != path:
                raise DataError(
                    f"{one.path} and {path} have the same name.", fix="Remove one of them."
                )
            if len(found) > MOST_CANDIDATES:
                raise DataError(
                    f"{folder} holds more than {MOST_CANDIDATES:,} videos.",
                    fix="Give the folder of UCF101 alone.",
                )
    if split is not None:
        names = _read_split(split)
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"{len(missing)} videos of {split} are not in {folder}, e.g. {missing[0]}.",
                fix="Give the whole data set, or a split file of the videos that are there.",
            )
        found = {name: found[name] for name in names}
    if not found:
        raise DataError(
            f"{folder} holds no video named as UCF101's.",
            fix="Give a folder with files such as ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi.",
        )
    return [found[name] for name in sorted(found)]


def _read_split(path: Path) -> Iterable[str]:
    """Read the names of a split: `Class/v_Class_g01_c01.avi`, in training lists with a number."""
    names: dict[str, None] = {}
    for number, line in enumerate(lines_of(read_list(path)), start=1):
        if not line.strip():
            continue
        stem = Path(line.split()[0].replace("\\", "/")).stem
        if class_in_name(stem) is None:
            raise DataError(
                f"{path}, line {number}: {line.strip()[:80]!r} names no video of UCF101.",
                fix="Give a list such as testlist01.txt.",
            )
        names[stem] = None
    return names
