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


def coerce(key: str, value, hint):
    """The value in the key's type; an int where a float is meant is converted. Raises: UserError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is float and type(value) is int and abs(value) <= LARGEST:
            return float(value)
        if origin is list and type(value) is list:
            return [coerce(f"{key}[{i}]", item, inner[0]) for i, item in enumerate(value)]
        if origin is dict and type(value) is dict:
            return {name: coerce(f"{key}.{name}", item, inner[1]) for name, item in value.items()}
        if type(value) is origin:
            return value
    expected = " or ".join(_name_of_type(option) for option in options)
    raise UserError(f"key {key!r}: expected {expected}, found {name_of(value)} {_short(value)}")


def check_value(key: str, value, rule: Mapping) -> None:
    """Raises: UserError for a value outside of the key's choices, bounds or kind of text."""
    if isinstance(value, list):
        for item in value:
            check_value(key, item, rule)
    elif isinstance(value, dict):
        for name, item in value.items():
            if rule["choices"] is not None:
                _check_choice(key, name, rule["choices"])
            _check_number(f"{key}.{name}", item, rule)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        _check_number(key, value, rule)
    else:
        if rule["choices"] is not None:
            _check_choice(key, value, rule["choices"])
        _check_text(key, value, rule["kind"])


def _check_choice(key: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f"key {key!r}: {_short(value)} is not one of {', '.join(choices)}{suggest(value, choices)}")


def _check_number(key: str, value, rule) -> None:
    low, high, above = rule["low"], rule["high"], rule["above"]
    found = f"found {_short(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"key {key!r}: expected a finite number, {found}")
    if low is not None and value < low:
        raise UserError(f"key {key!r}: expected at least {low}, {found}")
    if above is not None and value <= above:
        raise UserError(f"key {key!r}: expected more than {above}, {found}")
    if value > (LARGEST if high is None else high):
        raise UserError(f"key {key!r}: expected at most {LARGEST if high is None else high}, {found}")


def _check_text(key: str, value: str, kind: str | None) -> None:
    if not value or "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise UserError(f"key {key!r}: expected a text of printable characters, found {_short(value)}")
    if kind == "name" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise UserError(
            f"key {key!r}: expected letters, digits, '.', '_' and '-' (at most 100, no folders), found {_short(value)}"
        )
    is_elsewhere = os.path.isabs(os.path.expanduser(value))
    if (kind == "inside" and is_elsewhere) or (kind in ("inside", "beside") and ".." in re.split(r"[/\\]", value)):
        raise UserError(f"key {key!r}: expected a place inside root_data_dir, found {_short(value)}")
    if kind in ("path", "inside", "beside") and (
        len(os.fsencode(value)) > 1000 or any(len(os.fsencode(name)) > 255 for name in value.split("/"))
    ):
        raise UserError(f"key {key!r}: a path of {len(value)} characters is too long, or a name in it is")
    if kind == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise UserError(f"key {key!r}: expected auto, cpu, mps, cuda or cuda:<number>, found {_short(value)}")


# --- messages ---
def suggest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean ...?`, where one of the choices is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _name_of_type(kind) -> str:
    kind = typing.get_origin(kind) or kind
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    return names.get(kind, "an object" if kind is dict else "null")


def name_of(value) -> str:
    """The kind of a JSON value, in words."""
    return _name_of_type(type(value))


def _short(value) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
