"""Whether a JSON value is what its key takes, by the key's type and rule. Standard library only."""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping

from utils.errors import UserError

LARGEST = 2**53  # of any number; above it floats skip whole numbers
TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
TEXTS = {  # kind of text -> its pattern, and that in words
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, '.', '_' and '-' (at most 100, no folders)"),
    "device": (r"auto|cpu|mps|cuda(:\d{1,3})?", "auto, cpu, mps, cuda or cuda:<number>"),
    "score": (r"(max|min) \S+", '"max SCORE" or "min SCORE"'),
}


def checked(key: str, value, hint, rule: Mapping):
    """The value, a whole number as a float where a float is meant.

    Raises: UserError for another type than the hint's, or what the rule excludes (see `knob`).
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind, inner = typing.get_origin(option) or option, typing.get_args(option)
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        if type(value) is not kind:
            continue
        if kind is list:
            return [checked(f"{key}[{i}]", item, inner[0], rule) for i, item in enumerate(value)]
        if kind is dict:
            names = {name: checked(key, name, inner[0], rule) for name in value}
            return {name: checked(f"{key}.{name}", value[name], inner[1], rule) for name in names}
        if kind is str:
            _check_text(key, value, rule)
        elif kind in (int, float):
            _check_number(key, value, rule)
        return value
    expected = " or ".join(_name_of_type(option) for option in options)
    raise UserError(f"key {key!r}: expected {expected}, found {name_of(value)} {_short(value)}")


def _check_number(key: str, value: float, rule: Mapping) -> None:
    low, high, above = rule.get("low", -LARGEST), rule.get("high", LARGEST), rule.get("above", -math.inf)
    if not max(low, above) <= value <= high or value == above:  # NaN is in no range
        least = f"more than {above}" if "above" in rule else f"at least {low}"
        raise UserError(f"key {key!r}: expected {least} and at most {high}, found {_short(value)}")


def _check_text(key: str, value: str, rule: Mapping) -> None:
    choices, expected = rule.get("choices"), None
    pattern, in_words = TEXTS.get(rule.get("kind"), (".*", ""))
    if choices is not None and value not in choices:
        raise UserError(f"key {key!r}: {_short(value)} is not one of {', '.join(choices)}{suggest(value, choices)}")
    if not value or "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
        expected = "a text of printable characters"
    elif len(os.fsencode(value)) > 1000 or any(len(os.fsencode(name)) > 255 for name in value.split("/")):
        expected = "at most 1000 bytes, and 255 for a file"
    elif not re.fullmatch(pattern, value, re.DOTALL):
        expected = in_words
    if expected:
        raise UserError(f"key {key!r}: expected {expected}, found {_short(value)}")


# --- messages ---
def suggest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?`, where one of the choices is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def name_of(value) -> str:
    """The kind of a JSON value, in words."""
    return _name_of_type(type(value))


def _name_of_type(kind) -> str:
    kind = typing.get_origin(kind) or kind
    return TYPE_NAMES.get(kind, "an object" if kind is dict else "null")


def _short(value) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
