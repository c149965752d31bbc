"""Parse the expressions of a recipe: a whitelist over Python's syntax tree, nothing is executed.

    base + 0.75 * dare(-0.25 * (tuned - base), drop_rate=0.7, seed=0)

A fault is reported with a caret under the guilty column.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from keyword import kwlist
from pathlib import PurePath
from typing import Any

from motionmerge.expressions import MAX_DEPTH, ExpressionReader
from motionmerge.merging.algebra.nodes import Checkpoint, TaskVector
from motionmerge.merging.algebra.terms import is_number
from motionmerge.merging.inputs.sources import Source
from motionmerge.merging.recipes.functions import FUNCTIONS
from motionmerge.named import named
from motionmerge.text import fix_unknown_name

_BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


def parse_expression(
    text: str,
    names: Collection[str],
    *,
    where: str = "expression",
    files: MutableMapping[str, str] | None = None,
    parameters: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Parse the text of an expert.

    Args:
        text: One expression; line breaks count as spaces.
        names: The inputs that it may refer to.
        where: What the text is, for error messages, e.g. `experts.dynamics`.
        files: Takes the paths that the expression gives in quotes, by the names that stand for
            them in the result; without it such paths are refused.
        parameters: Numbers that it may call by name.

    Raises:
        RecipeError: It is no checkpoint expression of the whitelist; a caret shows where.
    """
    return _Parser(text, names, where, files, parameters or {}).checkpoint()


class _Parser(ExpressionReader):
    def __init__(
        self,
        text: str,
        names: Collection[str],
        where: str,
        files: MutableMapping[str, str] | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__(text, where, shorter="Split it into several experts.")
        self._names, self._files, self._parameters = names, files, parameters

    def checkpoint(self) -> Checkpoint:
        """Parse the whole text."""
        value = self._visit(self._tree(), 0)
        if not isinstance(value, Checkpoint):
            raise self._fault(
                0,
                "An expert is a checkpoint, and this is a "
                + ("number." if is_number(value) else "task vector."),
                fix=f"Add it to a checkpoint: `{next(iter(self._names), 'base')} + ...`.",
            )
        return value

    def _visit(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._fault(
                node, f"Nested deeper than {MAX_DEPTH} levels.", fix="Write a simpler expression."
            )
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Constant):
            return self._number(node, instead="a number or a checkpoint")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = self._visit(node.operand, depth + 1)
            return self._build(node, lambda: -operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._binary(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        raise self._fault(
            node,
            "Not part of the recipe language.",
            fix=f"Use names, numbers, + - * and the functions {', '.join(FUNCTIONS)}.",
        )

    def _name(self, node: ast.Name) -> Checkpoint | float:
        if node.id in self._parameters:
            return named(self._parameters[node.id], node.id)
        if node.id not in self._names:
            known = [*self._names, *self._parameters, *FUNCTIONS]
            what = "input or parameter" if self._parameters else "input"
            message = f"There is no {what} `{node.id}`."
            raise self._fault(node, message, fix=fix_unknown_name(node.id, known))
        return Checkpoint(Source(node.id))

    def _binary(self, node: ast.BinOp, depth: int) -> Any:
        left, right = self._visit(node.left, depth + 1), self._visit(node.right, depth + 1)
        symbol, apply = _BINARY[type(node.op)]
        start = self._column(node.left.end_col_offset)
        column = self._text.index(symbol, start)
        if is_number(left) and is_number(right):
            if symbol != "*":
                raise self._fault(
                    column,
                    f"`{symbol}` between two numbers is not part of the recipe language.",
                    fix="Write the result.",
                )
            product = left * right
            if abs(product) >= 1 << 63:
                raise self._fault(
                    column, "This number is too large.", fix="Write a smaller number."
                )
            return product
        return self._build(column, lambda: apply(left, right))

    def _call(self, node: ast.Call, depth: int) -> TaskVector:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS:
            raise self._fault(
                node.func,
                f"There is no function `{name}`." if name else "Only functions can be called.",
                fix=fix_unknown_name(name, FUNCTIONS) if name else f"Use {', '.join(FUNCTIONS)}.",
            )
        function = FUNCTIONS[name]
        usage = f"Write `{name}({function.signature})`."
        count, least = len(node.args), len(function.positional)
        if count < least or (count > least and not function.repeats):
            more = " or more" if function.repeats else ""
            raise self._fault(
                node,
                f"{name}() takes {least}{more} positional argument(s), got {count}.",
                fix=usage,
            )
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg not in function.settings or keyword.arg in keywords:
                raise self._fault(
                    keyword.value, f"{name}() has no setting `{keyword.arg}`.", fix=usage
                )
            keywords[keyword.arg] = self._visit(keyword.value, depth + 1)
        for required in function.settings:
            if required not in keywords:
                raise self._fault(node, f"{name}() needs `{required}`.", fix=usage)
        kinds = [*function.positional, *[function.positional[-1]] * (count - least)]
        values = [self._argument(*pair, depth) for pair in zip(node.args, kinds, strict=True)]
        return self._build(node, lambda: function.build(*values, **keywords))  # type: ignore[no-any-return]

    def _argument(self, node: ast.expr, kind: str, depth: int) -> Any:
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return self._visit(node, depth + 1)
        return self._file(node, node.value) if kind == "file" else node.value

    def _file(self, node: ast.expr, path: str) -> Checkpoint:
        """Return the input that a path in quotes stands for; a new one gets a name of its own."""
        if path in self._names:
            return Checkpoint(Source(path))
        if self._files is None:
            raise self._fault(
                node, f'"{path}" is no input.', fix="List the file under `inputs:` and name it."
            )
        name = re.sub(r"\W", "_", PurePath(path).stem, flags=re.ASCII)[:60]
        name = name if name.isidentifier() else f"file_{name}"
        taken = {*self._names, *FUNCTIONS, *kwlist}
        while name in taken or self._files.get(name, path) != path:
            name += "_"
        self._files[name] = path
        return Checkpoint(Source(name))
