"""A recipe's YAML, with overrides, to objects: checked as a whole first, built afterwards.

The dialect is hyperpyyaml's (``!new:``, ``!name:``, ``!ref``, ``!apply:``, ``!PLACEHOLDER``, ...). A YAML is
code: it can build and call anything, so run only files that you trust.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hyperpyyaml
import ruamel.yaml
import yaml

from toolkit.errors import ConfigError, ToolkitError
from toolkit.training.folders import write_atomic
from toolkit.training.options import RETIRED, coerce_option, option_types, options_help
from toolkit.training.presets import NO_PRESET, PRESET, follow_presets
from toolkit.training.values import CommandLineText, WrongType, coerce, did_you_mean, parse_value
from toolkit.training.yaml_tree import (
    CALL_TAGS,
    Callee,
    Keys,
    YamlTree,
    callee_of,
    check_references,
    dotted,
    dump,
    key_names,
    parse_tree,
    placeholders,
    plain,
    read_tree,
    set_key,
    tag_of,
    walk,
)

CONSTRUCTOR_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What a constructor raises when its arguments do not suit it; anything else is a defect and keeps its traceback."""

MINOR_KEYS = frozenset(
    "device num_workers noprogressbar tensorboard profile test_only log_interval keep_last "
    "keep_best async_save valid_interval_updates ckpt_interval_minutes ckpt_interval_updates threads fast_allocator "
    "fast_products debug debug_updates debug_batches nonfinite_patience compile compile_blocks "
    "compile_backend compile_mode parallel local_rank distributed_backend distributed_timeout_minutes max_bad_share "
    "skip_prep test_splits valid_splits".split()
)
"""Keys that may differ between two parts of one run without making it another run."""

COUNT = re.compile(r"^num_|(^|_)(seed|updates|layers|length|interval|size)$")
"""Names of keys that count something."""

OUTPUT_NAME = "hyperparams.yaml"
COPY_MARK = "# Resolved copy of "


class Hparams(dict[str, Any]):
    """A built YAML: its keys to values and objects. Asking for a key that it lacks is a ConfigError in one sentence."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self.path} has no key {key!r}, which the script asks for; add it to the file.")


@dataclass(frozen=True)
class HparamsPlan:
    """A YAML read, overridden and checked, with nothing built yet.

    ``text`` is the resolved YAML, ``values`` its top-level keys with plain values (what `RunOptions.from_values`
    takes), so process settings can be made before the first object is built.
    """

    path: Path
    text: str
    values: dict[str, Any]
    origin: YamlTree = field(repr=False)

    def build(self) -> dict[str, Any]:
        """Build every object of the YAML, in file order.

        Raises
        ------
        ConfigError : a constructor refused; the message names file, line and key. An error of the toolkit's own
            classes keeps its class.
        """
        stack: list[Any] = []
        loader = _recording_loader(stack)
        try:
            return Hparams(hyperpyyaml.load_hyperpyyaml(io.StringIO(self.text), loader=loader), self.path)
        except ToolkitError as error:
            raise type(error)(f"{self._place(stack)}: {error}") from error
        except (*CONSTRUCTOR_ERRORS, ruamel.yaml.error.YAMLError) as error:
            raise ConfigError(f"{self._place(stack)} could not be built: {_constructor_words(error)}.") from error
        finally:
            # hyperpyyaml makes deep construction the default of two libraries and, on an error, leaves it so.
            for library in (yaml.constructor, ruamel.yaml.constructor):
                library.BaseConstructor.construct_object.__defaults__ = (False,)

    def _place(self, stack: list[Any]) -> str:
        keys = _node_keys(stack[0], stack[-1]) if stack else None
        keys = keys or ()
        tag = stack[-1].tag if stack and str(stack[-1].tag).startswith(CALL_TAGS) else ""
        return self.origin.where(keys) + (f" ({tag})" if tag else "")

    def save(self, folder: Path | str) -> Path:
        """Write ``hyperparams.yaml`` into ``folder``: everything resolved; loading it gives the same again."""
        is_copy = self.text.startswith(COPY_MARK)
        header = f"{COPY_MARK}{self.path.name}, command line included; a run can be started from it.\n"
        return write_atomic(Path(folder) / OUTPUT_NAME, self.text if is_copy else header + self.text)

    def settings(self) -> dict[str, Any]:
        """Dotted key to plain value for what decides a run's results; places, limits and logs are left out."""
        root = parse_tree(self.text, self.path).root
        folders = [str(value) for key, value in self.values.items() if key.endswith("_folder") and value]
        settings: dict[str, Any] = {}
        for keys, node in walk(root):
            if not keys or keys[0] in MINOR_KEYS or re.search(r"(folder|path|file|dir)$", str(keys[-1])):
                continue
            if tag_of(node):
                settings[dotted(keys)] = tag_of(node)
            if isinstance(node, dict | list) or tag_of(node):
                continue
            value = plain(node)
            if not (isinstance(value, str) and any(folder in value for folder in folders)):
                settings[dotted(keys)] = list(value) if isinstance(value, tuple) else value
        return settings


def plan_hparams(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
) -> HparamsPlan:
    """Read a YAML, apply overrides, resolve references and check all of it; build nothing.

    Arguments
    ---------
    path : the YAML file; it may stand on another one (``based_on``, see `follow_presets`).
    overrides : YAML keys, dotted or as nested mappings, to values; values of the command line are typed here, and
        no tag in a value is ever run.
    options : run options of the command line; they replace the YAML's keys of the same name where it has them.

    Raises
    ------
    ConfigError : with file, line and key: no such file, no YAML, a doubled key, an unknown key (with the nearest
        name), a value of a wrong type, placeholders without a value (all of them, with their comments; with test_only
        none named train_...), a reference to nothing or to itself, a class that does not exist, an argument that its
        constructor lacks.
    """
    base, replaced = follow_presets(path, overrides)
    tree = read_tree(base)
    _check_options_in(tree)
    replaced.update({name: value for name, value in (options or {}).items() if name in tree.root})
    _apply(tree, replaced)
    missing = placeholders(tree)
    if plain(tree.root.get("test_only")) is True:  # an evaluation needs nothing of the training
        for keys, _ in missing:
            if str(keys[0]).startswith("train_"):
                set_key(tree, dotted(keys), None)
        missing = placeholders(tree)
    if missing:
        lines = [f"\n  --{dotted(keys)} VALUE    {words}".rstrip() for keys, words in missing]
        one = len(missing) == 1
        raise ConfigError(
            f"{tree.path} needs {'a value' if one else f'{len(missing)} values'} that only you know; add to the "
            "command line:" + "".join(lines)
        )
    check_references(tree)
    resolved = parse_tree(_resolve(tree), tree.path)
    _check_finite(tree, resolved)
    _check_calls(tree, resolved)
    return HparamsPlan(Path(path), dump(resolved.root), _plain_values(resolved), tree)


def load_hparams(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``plan_hparams(...).build()``: the YAML's keys to values and objects."""
    return plan_hparams(path, overrides, options=options).build()


def construct(
    function: Callable[..., Any], /, *, types: Callable[..., Any] | None = None, **parts: Mapping[str, Any]
) -> Any:
    """Call ``function`` with settings that stand in the YAML as plain mappings, checked before the call.

    Arguments
    ---------
    types : whose arguments' types count, where ``function`` itself passes them on; None = ``function``.
    parts : key of the YAML to its mapping (argument to value).

    Raises
    ------
    ConfigError : a value of a wrong type, or settings that the function refuses; names the keys.

    Example
    -------
    >>> import torch
    >>> construct(torch.nn.Linear, sizes={"in_features": 2}, rest={"out_features": 3, "bias": "yes"})
    Traceback (most recent call last):
        ...
    toolkit.errors.ConfigError: rest.bias must be True or False, but is the text 'yes' (write True or False).
    """
    source = function if types is None else types
    hints = typing.get_type_hints(source.__init__ if isinstance(source, type) else source)
    arguments: dict[str, Any] = {}
    for key, settings in parts.items():
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{key} must be a mapping such as {{a: 1}}, but is {settings!r}.")
        for name, value in settings.items():
            try:
                arguments[name] = coerce(value, hints.get(name, Any))
            except WrongType as error:
                raise ConfigError(f"{key}.{name} {error}.") from error
    try:
        return function(**arguments)
    except ToolkitError:
        raise
    except CONSTRUCTOR_ERRORS as error:
        name = getattr(source, "__name__", str(source))
        words = _constructor_words(error)
        raise ConfigError(f"{' and '.join(parts)}: no {name} with these settings: {words}.") from error


def help_text(path: Path | str | None) -> str:
    """What ``--help`` prints: the YAML's keys in file order with default and comment, then the run options."""
    lines = ["usage: train.py FILE.yaml [--key value] [--outer.inner value] ..."]
    known: set[str] = set()
    if path is not None:
        base, changes = follow_presets(path)
        tree = read_tree(base)
        _apply(tree, changes)
        known = set(tree.root)
        lines += ["", f"Keys of {path}" + (f" (based on {base})" if changes else "") + ":"]
        for keys, node in walk(tree.root):
            if keys and all(isinstance(key, str) for key in keys) and not str(keys[0]).startswith("__"):
                lines += _help_entry(f"--{dotted(keys)}", _shown(node), tree.comment(keys), 2 * len(keys))
    lines += ["", "Run options (may stand in the YAML too; the command line wins):"]
    if path is not None:
        lines += _help_entry(f"--{PRESET}", NO_PRESET, "Values put on top: a file of presets/ beside the YAML.", 2)
    for name, default, words in options_help():
        if name not in known:
            lines += _help_entry(f"--{name}", "null" if default is None else str(default), words, 2)
    return "\n".join(lines) + "\n"


def _help_entry(name: str, default: str, words: str, indent: int) -> list[str]:
    entry = [" " * indent + f"{name} {default}".rstrip()]
    return [*entry, " " * (indent + 6) + words] if words else entry


def _shown(node: Any) -> str:
    """A node's value as the help shows it."""
    tag = tag_of(node)
    if tag == "!PLACEHOLDER":
        return "VALUE (must be given)"
    if tag in ("!ref", "!copy"):
        return f"{tag} {node.value}"
    if tag:
        return f"({tag})"
    if isinstance(node, dict):
        return ""
    return "null" if node is None else str(plain(node)) if not isinstance(node, list) else _list_words(node)


def _list_words(node: list[Any]) -> str:
    return "[" + ", ".join(_shown(item) for item in node) + "]"


def _check_options_in(tree: YamlTree) -> None:
    """Run options that stand in the YAML have the option's type."""
    for name in option_types():
        if name in tree.root and not tag_of(tree.root[name]):
            coerce_option(name, plain(tree.root[name]), where=tree.where((name,)))


def _apply(tree: YamlTree, overrides: Mapping[str, Any]) -> None:
    """Set every override, and report all that cannot be set together."""
    problems: list[str] = []
    for name, value in overrides.items():
        try:
            if name in option_types():  # a file that stands on another may add one that the other leaves out
                tree.root[name] = coerce_option(name, value)
            elif name in RETIRED and name not in tree.root:
                raise ConfigError(f"--{name} does not exist here: {RETIRED[name]}.")
            elif "." not in name and name.replace("-", "_") not in tree.root and name not in tree.root:
                names = [*key_names(tree.root, arguments=True), *option_types()]
                raise ConfigError(
                    f"{tree.path} has no key {name!r}, and no run option has that name; "
                    + did_you_mean(name, [key for key in names if not key.startswith("__")], prefix="--")
                )
            else:
                name = name if name in tree.root or "." in name else name.replace("-", "_")
                set_key(tree, name, _whole_where_counted(tree, name, value))
        except ConfigError as error:
            problems.append(str(error))
    if len(problems) > 1:
        raise ConfigError(f"{len(problems)} values cannot be set:" + "".join(f"\n  {text}" for text in problems))
    if problems:
        raise ConfigError(problems[0])


def _whole_where_counted(tree: YamlTree, name: str, value: Any) -> Any:
    """``value``, as a whole number where the key counts something and the YAML has a whole number there.

    Elsewhere a whole number of the YAML may be replaced by a broken one: seconds and rates are often written whole.
    Keys inside of others are checked by the types of what takes them (`construct`, `_check_calls`).
    """
    number = parse_value(value) if isinstance(value, CommandLineText) and value else value
    default = tree.root.get(name)
    if not isinstance(number, float) or not COUNT.search(name):
        return value
    if not isinstance(default, int) or isinstance(default, bool):
        return value
    try:
        return coerce(number, int)
    except WrongType as error:
        raise ConfigError(f"--{name} {error} ({tree.where((name,))}).") from error


class _NamedText(io.StringIO):
    """Text that carries a file's name, from which hyperpyyaml takes the folder of included files."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def _resolve(tree: YamlTree) -> str:
    """The YAML's text with references, copies and included files put in."""
    try:
        return hyperpyyaml.resolve_references(_NamedText(dump(tree.root), os.path.abspath(tree.path))).getvalue()
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OSError) as error:
        raise ConfigError(f"{tree.path}: a reference or an included file cannot be resolved: {error}.") from error
    except ruamel.yaml.error.YAMLError as error:
        raise ConfigError(f"{tree.path}: an included file is no YAML: {str(error).splitlines()[0]}.") from error


def _check_finite(tree: YamlTree, resolved: YamlTree) -> None:
    """No number is infinite or none at all (also not by a reference's arithmetic): nothing can be trained with it."""
    for keys, node in walk(resolved.root):
        value = node if isinstance(node, float) and not math.isfinite(node) else None
        text = getattr(node, "value", node)
        if isinstance(text, str):
            # A tuple stands there as text.
            item = re.fullmatch(r"\((?:.*,)?\s*([-+]?(?:nan|inf))\s*(?:,.*)?\)", text)
            value = item and item[1]
        if value is not None:
            raise ConfigError(f"{tree.where(keys)} must be a finite number, but is {value}; write another value.")


def _check_calls(tree: YamlTree, resolved: YamlTree) -> None:
    """Check each call's path, argument names and plain arguments before anything is built; report all together."""
    problems: list[str] = []
    seen: set[int] = set()
    for keys, node in walk(resolved.root):
        tag = tag_of(node)
        if not tag or id(node) in seen:
            continue
        seen.add(id(node))
        if not tag.startswith((*CALL_TAGS, "!module:")):
            if tag.startswith("!") and not tag.startswith("!!"):
                known = [name.rstrip(":") for name in (*CALL_TAGS, "!module:", "!ref", "!copy", "!include:")]
                words = did_you_mean(tag.split(":", 1)[0], [*known, "!PLACEHOLDER"])
                problems.append(f"{tree.where(keys)}: there is no tag {tag!r}; {words}")
            continue
        path = tag.split(":", 1)[1]
        missing = _missing_path(path)
        if missing:
            problems.append(f"{tree.where(keys)}: {missing}")
            continue
        callee = callee_of(node)
        if callee is not None and (isinstance(node, dict) or not isinstance(node, list)):
            problems += _argument_problems(tree, keys, node, callee, needs_all=not tag.startswith("!name:"))
    if len(problems) > 1:
        raise ConfigError(f"{len(problems)} mistakes:" + "".join(f"\n  {text}" for text in problems))
    if problems:
        raise ConfigError(problems[0])


def _argument_problems(tree: YamlTree, keys: Keys, node: Any, callee: Callee, *, needs_all: bool) -> list[str]:
    given = node if isinstance(node, dict) else {}
    name = tag_of(node)
    problems = [
        f"{tree.where((*keys, key))}: {name} takes no argument {key!r}; " + did_you_mean(str(key), callee.names)
        for key in given
        if key not in callee.names and not callee.any_name and key not in ("_args", "_kwargs")
    ]
    lacking = [item for item in callee.required if item not in given]
    if needs_all and lacking and "_args" not in given:
        problems.append(f"{tree.where(keys)}: {name} also needs {', '.join(lacking)}.")
    for key, value in given.items():
        try:
            typed = coerce(plain(value), callee.annotations.get(key, Any))
        except TypeError:
            continue  # an object, whose type shows when it is built
        except WrongType as error:
            problems.append(f"{tree.where((*keys, key))} {error} ({name}).")
            continue
        if isinstance(value, float) and isinstance(typed, int):
            given[key] = typed  # 1e5 where a whole number is asked
    return problems


def _missing_path(path: str) -> str | None:
    """Why ``package.module.Name`` leads to nothing, in words; None when it leads somewhere."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        module = _import(".".join(parts[:end]))
        if isinstance(module, str):
            return f"{module} while looking for {path!r}"
        if module is None:
            continue
        value = module
        for index in range(end, len(parts)):
            if not hasattr(value, parts[index]):
                names = [name for name in dir(value) if not name.startswith("_")]
                near = difflib.get_close_matches(parts[index], names, n=1)
                here = ".".join(parts[:index])
                hint = f"; did you mean {here}.{near[0]}?" if near else "; check the spelling."
                return f"{here} has no {parts[index]!r}{hint}"
            value = getattr(value, parts[index])
        return None
    return f"there is no module {parts[0]!r} (asked for by {path!r}); is it installed, and the name right?"


def _import(name: str) -> Any:
    """The module ``name``, None when there is none, a sentence when its own import fails."""
    import builtins

    if hasattr(builtins, name):
        return getattr(builtins, name)
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ModuleNotFoundError, ValueError, AttributeError):
        return None
    try:
        return importlib.import_module(name)
    except CONSTRUCTOR_ERRORS as error:
        return f"importing {name} failed ({type(error).__name__}: {error})"


def _plain_values(resolved: YamlTree) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, node in resolved.root.items():
        try:
            values[key] = plain(node)
        except TypeError:
            continue  # objects are built later
    return {key: value for key, value in values.items() if not key.startswith("__")}


def _recording_loader(stack: list[Any]) -> type:
    """A loader class of its own (hyperpyyaml adds constructors to the class) that records what is being built."""

    class Loader(ruamel.yaml.Loader):
        def construct_object(self, node: Any, deep: bool = True) -> Any:
            # Popped only on success: after an error the stack still leads to the node that failed.
            stack.append(node)
            value = super().construct_object(node, deep)
            stack.pop()
            return value

    return Loader


def _node_keys(root: Any, wanted: Any) -> Keys | None:
    """Keys that lead from ``root`` to the node ``wanted``."""
    if root is wanted:
        return ()
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(root.value, list):
        is_map = isinstance(root, ruamel.yaml.MappingNode)
        pairs = [(key.value, item) for key, item in root.value] if is_map else enumerate(root.value)
    for key, item in pairs:
        below = _node_keys(item, wanted)
        if below is not None:
            return (key, *below)
    return None


def _constructor_words(error: Exception) -> str:
    words = ": ".join(str(item) for item in error.args) if isinstance(error, TypeError) else str(error)
    words = words.splitlines()[0] if isinstance(error, ruamel.yaml.error.YAMLError) else words
    words = re.sub(r"^Invalid argument to (class|callable) [\w.]+: ", "", words).strip().rstrip(".")
    return f"{words} ({type(error).__name__})" if words else type(error).__name__
