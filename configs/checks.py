"""Whether a JSON value is what its key takes, by the key's type and rule. Standard library only."""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping

from utils.errors import UserError

LARGEST = 2**53  # of any number; above it floats skip whole numbers
TYPE_NAMES = {
    **{str: "a text", int: "a whole number", float: "a number", bool: "true or false"},
    **{list: "a list", dict: "an object", types.NoneType: "null"},
}
TEXTS = {  # kind of text -> its pattern, and that in words
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, '.', '_' and '-' (at most 100, no folders)"),
    "device": (r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:<number>"),
    "score": (r"(max|min) \S+", '"max SCORE" or "min SCORE"'),
}


def checked(key: str, value, hint, rule: Mapping):
    """The value, a whole number as a float where a float is meant.

    Raises: UserError for another type than the hint's, or what the rule excludes (see `knob`).
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options]
    for kind, option in zip(kinds, options, strict=True):
        inner = typing.get_args(option)
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        if type(value) is not kind:
            continue
        if kind is list:
            return [checked(f"{key}[{i}]", item, inner[0], rule) for i, item in enumerate(value)]
        if kind is dict:
            names = {name: checked(key, name, inner[0], rule) for name in value}
            return {name: checked(f"{key}.{name}", value[name], inner[1], rule) for name in names}
        if expected := _broken_rule(value, rule):
            raise UserError(f"key {key!r}: expected {expected}, found {ascii(value)[:80]}")
        return value
    expected = " or ".join(TYPE_NAMES[kind] for kind in kinds)
    raise UserError(f"key {key!r}: expected {expected}, found {TYPE_NAMES[type(value)]} {ascii(value)[:80]}")


def _broken_rule(value: str | float | bool | None, rule: Mapping) -> str:
    """What the rule expects instead of the value, if it does not fit."""
    if isinstance(value, bool | None):
        return ""
    if isinstance(value, str):
        choices, (pattern, in_words) = rule.get("choices"), TEXTS.get(rule.get("kind"), (".*", ""))
        if choices is not None and value not in choices:
            return f"one of {', '.join(choices)}{suggest(value, choices)}"
        if not value or "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
            return "a text of printable characters"
        if len(os.fsencode(value)) > 1000 or any(len(os.fsencode(name)) > 255 for name in value.split("/")):
            return "at most 1000 bytes, and 255 for a file"
        return "" if re.fullmatch(pattern, value, re.DOTALL) else in_words
    low, high = rule.get("low", -LARGEST), rule.get("high", LARGEST)
    if low <= value <= high and value > rule.get("above", -2 * LARGEST):  # NaN is in no range
        return ""
    least = f"more than {rule['above']}" if "above" in rule else f"at least {low}"
    return f"{least} and at most {high}"


def suggest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?`, where one of the choices is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
