"""The functions that expressions may call, ours and those that users register."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.lazy_torch import torch
from motionmerge.merging.algebra.applied import expect_vector
from motionmerge.merging.algebra.computed import ByBlock, ByTensor, Computed
from motionmerge.merging.algebra.functions import low_rank, ties, trim
from motionmerge.merging.algebra.groups import only
from motionmerge.merging.algebra.nodes import Checkpoint, TaskVector
from motionmerge.merging.algebra.sparsify import dare
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.lora.task_vector import lora
from motionmerge.named import NamedFloat, NamedInt

MORE = "..."
"""As the last argument: more like the one before it may follow."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function that expressions may call.

    Attributes:
        build: Makes the task vector; every argument after the positional ones is keyword-only.
        arguments: Names of the positional arguments. In place of a `file` stands an input's name
            or a path in quotes. The last may be `MORE`.
        settings: Names of the keyword arguments; all are required.
        citation: BibTeX of its source; empty if it has none.
        registered: What `register_function` got for it, to do it again in another process.
    """

    build: Callable[..., TaskVector]
    arguments: tuple[str, ...]
    settings: tuple[str, ...]
    citation: str
    registered: Mapping[str, Any]

    @property
    def positional(self) -> tuple[str, ...]:
        """The positional arguments that must be given."""
        return tuple(name for name in self.arguments if name != MORE)

    @property
    def repeats(self) -> bool:
        """Whether more arguments like the last positional one may follow."""
        return self.arguments[-1:] == (MORE,)

    @property
    def signature(self) -> str:
        """Print the arguments, e.g. `vector, drop_rate=..., seed=...`."""
        return ", ".join([*self.arguments, *(f"{name}=..." for name in self.settings)])


FUNCTIONS: dict[str, Function] = {}
"""Everything that an expression may call; `register_function` adds to it."""


def register_function(
    name: str,
    *,
    arguments: Sequence[str] = ("vector",),
    settings: Mapping[str, type[int] | type[float]] | None = None,
    blocks: Callable[..., npt.NDArray[Any]] | None = None,
    tensors: Callable[..., torch.Tensor] | None = None,
    build: Callable[..., TaskVector] | None = None,
    citation: str = "",
) -> Callable[..., TaskVector]:
    """Add a function of task vectors to the recipe language.

        def clip(vector, *, block, limit):
            return np.clip(vector, -limit, limit)

        clip = register_function("clip", settings={"limit": float}, blocks=clip)

    Recipes that are read afterwards may call it: `base + clip(tuned - base, limit=0.01)`. Give one
    of `blocks`, `tensors` and `build`. The result is zero where no argument reaches a tensor;
    where some do, the others are zeros.

    Args:
        name: What expressions call it.
        arguments: Names of its task vectors. The last may be `"..."`: more may follow.
        settings: Its keyword arguments, all required: `int` or `float`, by name.
        blocks: Computes it block by block, each entry from the entries at its place. It is called
            with a flat fp32 array of NumPy for each task vector (fp64 where an input is stored
            so), which it must not change, with `block`, whose `name` and `start` say where in
            which tensor the entries lie, and with the settings. How tensors are cut must not
            matter: look at `block` only to find the place of an entry. Any thread may call it.
        tensors: Computes it on whole tensors: called with a torch tensor for each task vector,
            which it must not change, with the tensor's `name`, and with the settings. Memory then
            grows with the largest tensor.
        build: Makes a task vector of its arguments, for what is neither: a class of your own,
            whose `formula` prints a call of `name`, and whose `function` is `name`.
        citation: BibTeX of its source, which `motionmerge show --cite` prints.

    Returns:
        The function for expressions in Python: `base + clip(tuned - base, limit=0.01)`.

    Raises:
        ConfigError: The name is taken or is no name, or the arguments do not fit together.
    """
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a function.",
            fix="Use letters, digits and underscores, and none of Python's own words.",
        )
    if name in FUNCTIONS:
        raise ConfigError(f"There is a function `{name}` already.", fix="Choose another name.")
    num_ways = sum(way is not None for way in (blocks, tensors, build))
    if num_ways != 1:
        raise ConfigError(
            f"`{name}` is computed in {num_ways} ways.",
            fix="Pass one of `blocks`, `tensors` and `build`.",
        )
    kinds = dict(settings or {})
    for key, kind in kinds.items():
        if not key.isidentifier() or key in ("block", "name") or kind not in (int, float):
            raise ConfigError(
                f"`{name}` cannot have the setting {key!r} of type {kind!r}.",
                fix="Use `int` or `float`, and a name other than `block` and `name`.",
            )
    if not arguments or arguments[0] == MORE or isinstance(arguments, str):
        raise ConfigError(
            f"`{name}` has the arguments {arguments!r}.", fix='Pass e.g. `arguments=("vector",)`.'
        )
    ways = {"blocks": blocks, "tensors": tensors, "build": build}
    registered = {"arguments": tuple(arguments), "settings": kinds, **ways, "citation": citation}
    if blocks is not None:
        build = _builder(name, ByBlock, blocks, kinds)
    elif tensors is not None:
        build = _builder(name, ByTensor, tensors, kinds)
    assert build is not None  # for the type checker: one of the three is given
    FUNCTIONS[name] = Function(
        build=build,
        arguments=tuple(arguments),
        settings=tuple(kinds),
        citation=citation,
        registered=registered,
    )
    return build


def called_functions(experts: Iterable[Checkpoint]) -> dict[str, Mapping[str, Any]]:
    """Return the functions of users that expressions call, for `register_missing`."""
    text = " ".join(map(str, experts))
    called = FUNCTIONS.keys() & set(re.findall(r"([A-Za-z_]\w*)\(", text)) - _OURS
    return {name: FUNCTIONS[name].registered for name in sorted(called)}


def register_missing(functions: Mapping[str, Mapping[str, Any]]) -> None:
    """Register functions of another process that this one does not know."""
    for name, registered in functions.items():
        if name not in FUNCTIONS:
            register_function(name, **registered)


def _builder(
    name: str, node: type[Computed], compute: Callable[..., Any], kinds: Mapping[str, type]
) -> Callable[..., TaskVector]:
    """Make the function for Python of what computes it; it checks its arguments."""

    def build(*vectors: TaskVector, **settings: float) -> TaskVector:
        function = FUNCTIONS[name]
        count, least = len(vectors), len(function.positional)
        is_count_right = count == least or (count > least and function.repeats)
        if not is_count_right or settings.keys() != kinds.keys():
            came = ", ".join([f"{count} task vector(s)", *settings])
            usage = f"Write `{name}({function.signature})`."
            raise RecipeError(f"{name}() got {came}.", fix=usage)
        example = ", ".join(["tuned - base"] * least + [f"{key}=1" for key in kinds])
        for vector in vectors:
            expect_vector(vector, name, example=f"{name}({example})")
        ordered = tuple((key, _setting(key, settings[key], kind)) for key, kind in kinds.items())
        return node(name, vectors, ordered, compute)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Apply `{name}`, a registered function of the recipe language."
    return build


def _setting(key: str, value: object, kind: type) -> float:
    """Refuse a setting that has not its type, or that a recipe cannot write."""
    is_right = is_number(value) and (kind is float or isinstance(value, int))
    if is_number(value) and is_right and math.isfinite(value) and abs(value) < 1 << 63:
        is_named = isinstance(value, (NamedFloat, NamedInt))
        return value if is_named else kind(value)
    wanted = "an integer" if kind is int else "a finite number"
    raise RecipeError(f"{key}={value!r} is not {wanted}.", fix=f"Use e.g. `{key}=1`.")


_DARE = """@inproceedings{yu2024language,
  title     = {Language Models are Super Mario: Absorbing Abilities from Homologous Models
               as a Free Lunch},
  author    = {Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin},
  booktitle = {ICML},
  year      = {2024},
  eprint    = {2311.03099}
}"""
_LORA = """@inproceedings{hu2022lora,
  title     = {LoRA: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and others},
  booktitle = {ICLR},
  year      = {2022},
  eprint    = {2106.09685}
}"""
_TIES = """@inproceedings{yadav2023ties,
  title     = {TIES-Merging: Resolving Interference When Merging Models},
  author    = {Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and
               Bansal, Mohit},
  booktitle = {NeurIPS},
  year      = {2023},
  eprint    = {2306.01708}
}"""

register_function("dare", settings={"drop_rate": float, "seed": int}, build=dare, citation=_DARE)
register_function("lora", arguments=("file", "scale"), build=lora, citation=_LORA)
register_function("low_rank", settings={"rank": int}, build=low_rank)
register_function("only", arguments=("vector", "group_or_pattern"), build=only)
register_function(
    "ties",
    arguments=("vector", "vector", MORE),
    settings={"keep": float},
    build=ties,
    citation=_TIES,
)
register_function("trim", settings={"keep": float}, build=trim, citation=_TIES)

_OURS = frozenset(FUNCTIONS)
