"""Flags that several verbs share are the fields of a dataclass, which the verbs then take whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that takes each field of its dataclasses as a flag.

    A parameter of its own stands for the flag of that name, and says what the dataclass has there.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: one.annotation for name, one in own.items() if is_dataclass(one.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        shared = get_type_hints(groups[name], include_extras=True)
        parameters += [
            parameter.replace(name=flag.name, annotation=shared[flag.name], default=flag.default)
            for flag in fields(groups[name])
            if flag.name not in own
        ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        taken = {
            name: group(**{flag.name: values[flag.name] for flag in fields(group)})
            for name, group in groups.items()
        }
        command(**{name: taken[name] if name in taken else values[name] for name in own})

    signature = inspect.Signature(parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
