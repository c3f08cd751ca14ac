"""Values by dotted key in nested dicts, and references between them.

What OmegaConf does, for the few kinds of references that configs are made of, in a twentieth of
its time: a sweep composes a thousand runs.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]
Path = tuple[str, ...]
REFERENCE = re.compile(r"\$\{(\.*)(\w+(?:\.\w+)*)\}")  # ${a.b}, or ${.b} from the same dict


@dataclass(frozen=True)
class Setting:
    """What one key of one run is set to.

    `shown` stands in names and messages; `choice` is set where Hydra must be told, as for the
    choice of a file: its override.
    """

    shown: str
    value: Any
    choice: str | None


def show(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def split_key(key: str) -> Path:
    """`a.b[c.d]` -> a, b, c.d: brackets hold what has dots of its own, such as a module pattern."""
    return tuple(bare or quoted for bare, quoted in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", key))


def with_value(tree: Any, path: Path, value: Any) -> Any:
    """A copy of the tree in which the value stands at the path; a dict is merged into a dict."""
    if not path:
        if not (isinstance(tree, dict) and isinstance(value, dict)):
            return value
        for key, inner in value.items():
            tree = with_value(tree, (key,), inner)
        return tree
    first, rest = path[0], path[1:]
    if isinstance(tree, list) and first.isdigit() and int(first) < len(tree):
        inner = with_value(tree[int(first)], rest, value)
        return [*tree[: int(first)], inner, *tree[int(first) + 1 :]]
    tree = tree if isinstance(tree, dict) else {}
    return {**tree, first: with_value(tree.get(first), rest, value)}


def resolve(tree: Tree) -> Tree:
    """A copy of the tree in which what references refer to stands in their places.

    Raises:
        OmegaConfBaseException: a reference to nothing.
    """
    result = tree
    for path, text in references(tree):
        value = _referred_to(tree, path, text)
        if isinstance(value, dict | list) or value == "???":
            return _resolve_by_omegaconf(tree)
        result = with_value(result, path, value)
    return result


def references(tree: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The path and the text of every value with a reference in it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from references(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from references(value, (*path, str(index)))
    elif isinstance(tree, str) and "${" in tree:
        yield path, tree


def _referred_to(tree: Tree, path: Path, text: str) -> Any:
    """The value at the end of a chain of plain references; a dict where it takes more to know."""
    value: Any = text
    for _ in range(10):
        if not (isinstance(value, str) and "${" in value):
            return value
        match = REFERENCE.fullmatch(value)
        if match is None:
            break
        dots, key = match.groups()
        path = (*path[: len(path) - len(dots)], *key.split(".")) if dots else split_key(key)
        value = tree
        for part in path:
            value = value.get(part, {}) if isinstance(value, dict) else {}
    return {}


def _resolve_by_omegaconf(tree: Tree) -> Tree:
    from omegaconf import OmegaConf

    resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
