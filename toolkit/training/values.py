"""Values of options and YAML keys: how a word becomes typed, what fits an annotation, which name is nearest."""

from __future__ import annotations

import collections.abc
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from toolkit.errors import ConfigError

INTEGER = re.compile(r"[-+]?[0-9][0-9_]*\Z")
NUMBER = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
SPECIAL_NUMBERS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
NOTHING = ("null", "Null", "NULL", "None", "none", "~", "")
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

PLAIN_TYPES: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list such as [a, b]",
    tuple: "a list such as [a, b]",
    dict: "a mapping such as {a: 1}",
    type(None): "null",
}


class CommandLineText(str):
    """A value as typed on the command line: its type is decided where the key's own type is known."""


class WrongType(ConfigError):
    """A value does not fit the type expected of it; the message has no place yet."""


def parse_value(text: str) -> Any:
    """The value that ``text`` has as a YAML scalar or a flow list; tags and ``a: b`` stay plain text.

    Example
    -------
    >>> [parse_value(word) for word in ("3", "1e-4", "None", "true", "a=b:c", "[1, x]", "'5'")]
    [3, 0.0001, None, True, 'a=b:c', [1, 'x'], '5']
    """
    word = text.strip()
    if word in NOTHING:
        return None
    if word in TRUTHS:
        return TRUTHS[word]
    if INTEGER.match(word):
        return int(word.replace("_", ""))
    if NUMBER.match(word):
        return float(word.replace("_", ""))
    if word.lower() in SPECIAL_NUMBERS:
        return SPECIAL_NUMBERS[word.lower()]
    if word[0] in "[{" or (word[0] in "'\"" and word[-1] == word[0] and len(word) > 1):
        return _parse_flow(word)
    if word[0] == "(" and word[-1] == ")":
        return tuple(_parse_flow("[" + word[1:-1].rstrip(", ") + "]"))
    return str(text)


def _parse_flow(text: str) -> Any:
    """A flow list, a flow mapping or a quoted text, through YAML's safe loader: no tag builds anything."""
    try:
        return _plain(YAML(typ="safe", pure=True).load(text))
    except YAMLError as error:
        problem = getattr(error, "problem", None) or "it is not a YAML list, mapping or quoted text"
        advice = "write lists as [a, b] and mappings as {a: 1}"
        raise WrongType(f"{text!r} cannot be read ({problem}); {advice}") from error


def _plain(value: Any) -> Any:
    """``value`` with the words that mean nothing or a truth typed as on the top level ("None" -> None)."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value == "None" else value


def coerce(value: Any, annotation: Any) -> Any:
    """``value`` as the type ``annotation`` asks, where the annotation is plain; otherwise ``value`` unchanged.

    Arguments
    ---------
    value : a plain value, or a `CommandLineText`, which is typed here.
    annotation : a type, a union, a ``Literal`` or ``Any``. Types other than None, bool, int, float, str,
        list/Sequence, tuple and dict/Mapping are not plain, and nothing is checked then.

    Raises
    ------
    WrongType : the value does not fit.

    Example
    -------
    >>> coerce(CommandLineText("0012"), str), coerce(CommandLineText("1e5"), int), coerce(3, float | None)
    ('0012', 100000, 3.0)
    """
    choices = _literal_choices(annotation)
    if choices is not None:
        typed = str(value) if isinstance(value, CommandLineText) else value
        if typed in choices or parse_choice(value) in choices:
            return typed if typed in choices else parse_choice(value)
        raise WrongType(f"must be one of {', '.join(map(str, choices))}, but is {describe(value)}")
    kinds = plain_kinds(annotation)
    if kinds is None:
        return parse_value(value) if isinstance(value, CommandLineText) else value
    if isinstance(value, CommandLineText):
        value = _typed_text(value, kinds)
    fitted = _fit(value, kinds)
    if fitted is _NO_FIT:
        raise WrongType(f"must be {expected_words(kinds)}, but is {describe(value)}" + _advice(value, kinds))
    return fitted


def parse_choice(value: Any) -> Any:
    """A choice typed on the command line as YAML reads it; any other as it is."""
    return parse_value(value) if isinstance(value, CommandLineText) else value


def plain_kinds(annotation: Any) -> tuple[type, ...] | None:
    """The plain types that ``annotation`` admits; None when it admits anything else as well."""
    if annotation is None:
        return (type(None),)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [plain_kinds(part) for part in typing.get_args(annotation)]
        return None if None in parts else tuple(kind for part in parts for kind in part or ())
    base = origin or annotation
    if base is Path:
        return (str,)
    if base in PLAIN_TYPES:
        return (base,)
    if base in (collections.abc.Sequence, collections.abc.Iterable):
        return (list, tuple)
    if base is collections.abc.Mapping:
        return (dict,)
    return None


def kinds_like(default: Any) -> tuple[type, ...] | None:
    """The types that may replace ``default``, a plain value of a YAML; None: anything may.

    A whole number may be replaced by a broken one (seconds are often written whole), and everything by nothing.
    """
    if default is None:
        return None
    for kind, kinds in ((bool, (bool,)), (int, (int, float)), (float, (float,)), (str, (str,)), (list, (list, tuple)),
                        (tuple, (tuple, list)), (dict, (dict,))):
        if isinstance(default, kind):
            return (*kinds, type(None))
    return None


def _literal_choices(annotation: Any) -> tuple[Any, ...] | None:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [(None,) if part in (None, type(None)) else _literal_choices(part)
                 for part in typing.get_args(annotation)]
        if None not in parts:
            return tuple(choice for part in parts for choice in part or ())
    return None


def _typed_text(text: CommandLineText, kinds: tuple[type, ...]) -> Any:
    """A command line's word: text where text is expected, else as YAML reads it."""
    if str not in kinds:
        return parse_value(text)
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return parse_value(text)
    if text in NOTHING[:-1] and type(None) in kinds:
        return None
    if set(kinds) <= {str, type(None)}:
        return str(text)
    return parse_value(text)


_NO_FIT = object()


def _fit(value: Any, kinds: tuple[type, ...]) -> Any:
    if value is None:
        return None if type(None) in kinds else _NO_FIT
    if isinstance(value, bool):
        return value if bool in kinds else _NO_FIT
    if isinstance(value, int):
        return value if int in kinds else float(value) if float in kinds else _NO_FIT
    if isinstance(value, float):
        if float in kinds:
            return value
        return int(value) if int in kinds and math.isfinite(value) and value == int(value) else _NO_FIT
    if isinstance(value, Path):
        value = str(value)
    for kind in (str, dict):
        if isinstance(value, kind):
            return value if kind in kinds else _NO_FIT
    if isinstance(value, list | tuple):
        if type(value) in kinds:
            return value
        return tuple(value) if tuple in kinds else list(value) if list in kinds else _NO_FIT
    return value


def expected_words(kinds: tuple[type, ...]) -> str:
    """What is expected, in words."""
    words = list(dict.fromkeys(PLAIN_TYPES[kind] for kind in kinds if kind is not int or float not in kinds))
    return " or ".join(words)


def describe(value: Any) -> str:
    """A value and its kind, for a message."""
    if isinstance(value, str):
        return f"the text {str(value)!r}"
    if value is None:
        return "null"
    return f"{value!r}"


def _advice(value: Any, kinds: tuple[type, ...]) -> str:
    if value == "None" and type(None) in kinds:
        return " (YAML writes null for nothing; None is text there)"
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off") and bool in kinds:
        return " (write True or False)"
    if isinstance(value, str) and (list in kinds or tuple in kinds):
        return f" (write [{value}])"
    return ""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like ``name``, or None when none is like it.

    Example
    -------
    >>> nearest("num_layer", ["num_layers", "num_heads"])
    'num_layers'
    """
    choices = list(choices)
    lowered = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if not found and "." in name:
        # A nested key given without its parents, or under another one.
        last = name.rsplit(".", 1)[1].lower()
        found = [low for low in lowered if low.rsplit(".", 1)[-1] == last][:1]
    return lowered[found[0]] if found else None


def did_you_mean(name: str, choices: Iterable[str], *, prefix: str = "") -> str:
    """``"did you mean PREFIXname?"``, or the list of choices when none is near."""
    choices = sorted(set(choices))
    close = nearest(name, choices)
    if close is not None:
        return f"did you mean {prefix}{close}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"known: {shown}" if choices else "there are none"
