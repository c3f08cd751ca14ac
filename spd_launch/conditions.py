"""The language of `where` in sweep files: comparisons and arithmetic over the keys of a run.

Python's syntax, read by its parser and worked out here: nothing else of Python can be reached.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from spd_launch.errors import LaunchError, nearest
from spd_launch.values import Setting, show

COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.eq, ast.IsNot: operator.ne,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
CONSTANTS = {"null": None, "true": True, "false": False}


def holds(condition: str, run: Mapping[str, Setting]) -> bool:
    """Whether a run meets a condition, such as `train.lr.start * train.batch_size < 10`.

    A key stands for its value; where the sweep names its values, for the name.

    Raises:
        LaunchError: no such key, or more than comparisons, arithmetic, and, or, not.
    """
    try:
        return bool(_value(ast.parse(condition.strip(), mode="eval").body, run))
    except (SyntaxError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise LaunchError(f"it cannot be decided: {error}") from None


def _value(node: ast.expr, run: Mapping[str, Setting]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element, run) for element in elements]
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return _value_of_key(_key(node), run)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, run) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_value(part, run) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, run)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, run)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            numbers = [_value(left, run), _value(right, run)]
            if not all(isinstance(number, int | float) for number in numbers):
                raise TypeError(f"{ast.unparse(node)} is arithmetic of other things than numbers")
            return ARITHMETIC[type(op)](*numbers)
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(part, run) for part in (left, *others)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        case _:
            raise LaunchError(
                f"{ast.unparse(node)!r}: a condition is made of keys, numbers, words in quotes, "
                "comparisons, `in`, and, or, not, + - * / // %"
            )


def _key(node: ast.expr) -> str:
    """a.b["c.d"] -> `a.b[c.d]`, as it is written elsewhere."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_key(inner)}.{name}"
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() as name)):
            return f"{_key(inner)}[{name}]"
        case _:
            raise LaunchError(f"{ast.unparse(node)!r} is no key")


def _value_of_key(key: str, run: Mapping[str, Setting]) -> Any:
    if key in run:
        shown, value = run[key].shown, run[key].value
        return value if shown == show(value) else shown
    if key in CONSTANTS:
        return CONSTANTS[key]
    raise LaunchError(f"{key} is no key that the sweep sets here{nearest(key, run)}")
