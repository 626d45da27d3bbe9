"""Whether a value is of the kind that an annotation asks for."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "names with values",
    type(None): "nothing",
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value (of JSON or YAML) suits an annotation; a whole number is a number, not true or infinity."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple and Ellipsis not in parts:
        same = isinstance(value, list | tuple) and len(value) == len(parts)
        return same and all(map(fits, value, parts))
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def told(hint: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(told(part) for part in parts if part is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple and Ellipsis not in parts:
        return f"a list of {len(parts)}, each {told(parts[0])}"
    if origin in (list, tuple):
        return f"a list, each item {told(parts[0])}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))
