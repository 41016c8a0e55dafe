"""A YAML as a tree of nodes with places: keys, lines, comments, overrides, references; nothing is built here."""

from __future__ import annotations

import inspect
import io
import pydoc
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from toolkit.errors import ConfigError
from toolkit.training.values import CommandLineText, WrongType, coerce, did_you_mean, kinds_like, parse_value

CALL_TAGS = ("!new:", "!name:", "!apply:", "!applyref:")
OPENABLE = (*CALL_TAGS, "!include:")
REFERENCE = re.compile(r"<([^>]*)>")
TUPLE_TAG = "!tuple"
Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlTree:
    """A YAML file as ruamel's round-trip nodes, with the text for places and comments."""

    path: Path
    root: CommentedMap
    lines: tuple[str, ...]

    def line(self, keys: Keys) -> int | None:
        """Line number (from 1) of the key, or of the nearest one above it that stands in the file."""
        node: Any = self.root
        found = None
        for key in keys:
            try:
                place = node.lc.key(key) if isinstance(node, dict) else node.lc.item(key)
                node = node[key]
            except (KeyError, TypeError, AttributeError, IndexError):
                break
            found = place[0] + 1
        return found

    def where(self, keys: Keys) -> str:
        """``"FILE, line N, key 'a.b'"``."""
        line = self.line(keys)
        return f"{self.path}" + (f", line {line}" if line else "") + (f", key {dotted(keys)!r}" if keys else "")

    def comment(self, keys: Keys) -> str:
        """The comment lines directly above a key and the one behind its value, joined by blanks."""
        line = self.line(keys)
        if line is None:
            return ""
        above: list[str] = []
        index = line - 2
        while index >= 0 and self.lines[index].strip().startswith("#"):
            above.insert(0, self.lines[index].strip().lstrip("#").strip())
            index -= 1
        behind = re.search(r"\s#\s?(.*)$", self.lines[line - 1])
        words = [text for text in above if re.search(r"\w", text) and not re.match(r"[-=#*~]{3}", text)]  # no rulers
        if behind and not re.search(r"""['"][^'"]*#""", self.lines[line - 1]):
            words.append(behind.group(1).strip())
        return " ".join(words)


def dotted(keys: Keys) -> str:
    """``("a", "b")`` -> ``"a.b"``."""
    return ".".join(str(key) for key in keys)


def teach_tuples() -> None:
    """Have ruamel read ``(1, 2)`` as a tuple, and quote text of that shape when it writes.

    hyperpyyaml adds this rule to the library's common list at its first load; without it the same YAML would be
    read and written differently before that load and after.
    """
    if not any(rule[1] == TUPLE_TAG for rule in ruamel.yaml.resolver.implicit_resolvers):
        type("TupleLoader", (ruamel.yaml.Loader,), {}).add_implicit_resolver(TUPLE_TAG, re.compile(r"^\(.*\)$"), "(")


def parse_tree(text: str, path: Path) -> YamlTree:
    """Read YAML text; every defect of it is a ConfigError with file and line."""
    teach_tuples()
    parser = YAML()
    parser.preserve_quotes = True
    try:
        root = parser.load(text)
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "([^"]*)"', str(error.problem))
        raise ConfigError(
            f"{path}, line {error.problem_mark.line + 1}: the key {key.group(1) if key else ''!r} stands there a "
            "second time; delete or rename one of the two."
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: this is no YAML: {error.problem or error.context}.") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: this is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(root, CommentedMap):
        raise ConfigError(f"{path}: the file holds no `key: value` lines.")
    tree = YamlTree(path, root, tuple(text.splitlines()))
    for keys, node in walk(root):
        for key in node if isinstance(node, dict) else ():
            if not isinstance(key, str) and not keys:
                raise ConfigError(f"{tree.where((key,))} must be text; put it into quotes or rename it.")
    return tree


def read_tree(path: Path | str) -> YamlTree:
    """Read a YAML file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = sorted(str(item) for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"the YAML file {path} does not exist; " + did_you_mean(str(path), beside)
            if beside else f"the YAML file {path} does not exist; check the path."
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; name a YAML file in it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from error
    return parse_tree(text, path)


def dump(root: CommentedMap) -> str:
    """The tree as YAML text."""
    stream = io.StringIO()
    writer = YAML()
    writer.preserve_quotes = True
    writer.width = 4096
    writer.dump(root, stream)
    return stream.getvalue()


def tag_of(node: Any) -> str:
    """The node's tag, "" without one (a tuple's counts as none)."""
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    return "" if tag == TUPLE_TAG else tag


def walk(node: Any, keys: Keys = (), *, _seen: frozenset[int] = frozenset()) -> Iterator[tuple[Keys, Any]]:
    """Every node below and including ``node``, with its keys, in file order."""
    yield keys, node
    if id(node) in _seen:
        return
    if isinstance(node, dict):
        for key, item in node.items():
            yield from walk(item, (*keys, key), _seen=_seen | {id(node)})
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from walk(item, (*keys, index), _seen=_seen | {id(node)})


def plain(node: Any) -> Any:
    """A node without tags as plain Python values; raises TypeError where a tag stands below it."""
    if tag_of(node):
        raise TypeError(tag_of(node))
    if isinstance(node, dict):
        return {key: plain(item) for key, item in node.items()}
    if isinstance(node, list):
        return [plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float):
        if isinstance(node, kind):
            return kind(node)
    if isinstance(node, TaggedScalar):
        return parse_value(str(node.value))  # a tuple
    return str(node) if isinstance(node, str) else node


@dataclass(frozen=True)
class Callee:
    """What a ``!new:`` or ``!name:`` calls: the names it takes and their types."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    annotations: dict[str, Any]
    any_name: bool


def callee_of(node: Any) -> Callee | None:
    """The callee of a call tag; None when it cannot be found or has no signature to read."""
    tag = tag_of(node)
    prefix = next((prefix for prefix in CALL_TAGS if tag.startswith(prefix)), None)
    if prefix is None:
        return None
    try:
        target = pydoc.locate(tag[len(prefix):])
        parameters = inspect.signature(target).parameters.values() if target is not None else None
    except (pydoc.ErrorDuringImport, ValueError, TypeError):
        return None
    if parameters is None:
        return None
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        hints = {}
    named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    return Callee(
        names=tuple(item.name for item in named),
        required=tuple(item.name for item in named if item.default is item.empty),
        annotations={item.name: hints[item.name] for item in named if item.name in hints},
        any_name=any(item.kind is item.VAR_KEYWORD for item in parameters),
    )


def key_names(root: CommentedMap, *, arguments: bool = False) -> list[str]:
    """All dotted names of the tree; with ``arguments`` those too that its constructors take and it leaves out."""
    names = [dotted(keys) for keys, _ in walk(root) if keys and all(isinstance(key, str) for key in keys)]
    if arguments:
        for keys, node in walk(root):
            callee = callee_of(node)
            names += [dotted((*keys, name)) for name in callee.names] if callee else []
    return list(dict.fromkeys(names))


def set_key(tree: YamlTree, name: str, value: Any) -> None:
    """Replace the value of the (dotted) key ``name`` in the tree.

    Raises
    ------
    ConfigError : there is no such key (with the nearest name), or the value's type does not fit.
    """
    parent, keys = _parent_of(tree, name)
    key = keys[-1]
    if tag_of(parent).startswith("!include:"):
        inner = included_tree(tree, keys[:-1], parent)
        try:
            set_key(inner, str(key), value)
        except ConfigError as error:
            raise ConfigError(str(error).replace(" --", f" --{dotted(keys[:-1])}.")) from error
        parent[key] = inner.root[key]
        return
    callee = callee_of(parent)
    known = key in parent if isinstance(parent, dict) else True
    if not known and not (callee and (key in callee.names or callee.any_name)):
        below = [*parent, *(callee.names if callee else ())]
        if len(keys) > 1:
            raise ConfigError(
                f"{tree.path}: '{dotted(keys[:-1])}' has no key {key!r}; "
                + did_you_mean(key, map(str, below), prefix=f"--{dotted(keys[:-1])}.")
            )
        raise ConfigError(f"{tree.path}: there is no key {key!r}; " + did_you_mean(key, map(str, below), prefix="--"))
    default = parent[key] if known else None
    annotation = callee.annotations.get(key, Any) if callee else Any
    try:
        typed = _typed(value, default, annotation, key, _takes_null(tree, keys))
    except WrongType as error:
        raise ConfigError(f"--{name} {error} ({_default_words(tree, keys, default)}).") from error
    if isinstance(typed, dict) and (isinstance(default, CommentedMap) or tag_of(default).startswith(OPENABLE)):
        for inner, item in typed.items():
            set_key(tree, f"{name}.{inner}", item)
        return
    if isinstance(typed, tuple):
        typed = TaggedScalar(value=f"({', '.join(map(_item_words, typed))})", tag=TUPLE_TAG)
    parent[key] = typed


def _item_words(item: Any) -> str:
    """An item of a tuple as YAML writes it."""
    if item is None:
        return "null"
    return "'" + item.replace("'", "''") + "'" if isinstance(item, str) else str(item)


def _default_words(tree: YamlTree, keys: Keys, default: Any) -> str:
    if tag_of(default).startswith(CALL_TAGS):
        return f"{tree.where(keys)} builds an object; set its arguments as --{dotted(keys)}.NAME"
    return tree.where(keys)


def _takes_null(tree: YamlTree, keys: Keys) -> bool:
    """Whether a key that has a value may be set to nothing: its comment then says what null means."""
    return re.search(r"\bnull\b", tree.comment(keys)) is not None


def _typed(value: Any, default: Any, annotation: Any, key: str | int, takes_null: bool) -> Any:
    """``value`` checked against the argument's annotation and against the value that stands in the YAML.

    Nothing in the place of a value (``takes_null`` False) is refused where people type it; code knows what it does.
    """
    if isinstance(value, Path):
        value = str(value)
    nothing: tuple[type, ...] = (type(None),) if takes_null or not isinstance(value, CommandLineText) else ()
    # Folders and files may be named by digits, which are no number then.
    is_path = re.search(r"(folder|file|path|dir|manifest|csv|json|pretrained)$", str(key)) is not None
    if annotation is not Any:
        value = coerce(value, annotation)
    tag = tag_of(default)
    if tag.startswith(CALL_TAGS):
        typed = coerce(value, typing.Union[(dict, *nothing)])
    elif tag == "!PLACEHOLDER":
        typed = coerce(value, str) if is_path and isinstance(value, CommandLineText) else coerce(value, Any)
    elif tag:
        typed = coerce(value, str if "/" in str(getattr(default, "value", "")) else Any)
    else:
        kinds = kinds_like(plain_or_none(default))
        if kinds is not None:
            kinds = (*(kind for kind in kinds if kind is not type(None)), *nothing)
        elif is_path and isinstance(value, CommandLineText):
            kinds = (str, type(None))
        typed = coerce(value, Any) if kinds is None else coerce(value, typing.Union[kinds])  # noqa: UP007
    return coerce(typed, Any)


def plain_or_none(node: Any) -> Any:
    """`plain`, with None for what holds tags (an empty list or mapping of their kind for those)."""
    try:
        return plain(node)
    except TypeError:
        return {} if isinstance(node, dict) else [] if isinstance(node, list) else None


def _parent_of(tree: YamlTree, name: str) -> tuple[Any, Keys]:
    """The node that holds (or may take) the last part of ``name``, and the parts."""
    parts = name.split(".")
    if name in tree.root:
        return tree.root, (name,)
    node: Any = tree.root
    holder: Any = None
    for depth, part in enumerate(parts):
        if depth and not isinstance(node, dict | list):
            node = _opened(tree, tuple(parts[:depth]), node)
            holder[parts[depth - 1]] = node
        if depth == len(parts) - 1:
            break
        holder, key = node, _child_key(node, part)
        if key is None:
            raise ConfigError(
                f"{tree.path}: there is no key {dotted(tuple(parts[:depth + 1]))!r} to set {name!r} in; "
                + did_you_mean(name, key_names(tree.root, arguments=True), prefix="--")
            )
        parts[depth] = key
        node = node[key]
    last = _child_key(node, parts[-1])
    return node, (*parts[:-1], parts[-1] if last is None else last)


def _child_key(node: Any, part: str) -> Any:
    """The key of ``node`` that ``part`` means (a dash may stand for an underscore), None without one."""
    if isinstance(node, list):
        return int(part) if part.isdigit() and int(part) < len(node) else None
    return part if part in node else part.replace("-", "_") if part.replace("-", "_") in node else None


def _opened(tree: YamlTree, keys: Keys, node: Any) -> CommentedMap:
    """A node without keys as one that takes keys: an object without arguments yet; else a ConfigError says why not."""
    tag = tag_of(node)
    if tag.startswith(OPENABLE):
        opened = CommentedMap()
        opened.yaml_set_ctag(node.tag)
        return opened
    if tag in ("!ref", "!copy"):
        target = REFERENCE.search(str(node.value))
        there = re.sub(r"\[([^\]]*)\]", r".\1", target.group(1)) if target else ""
        raise ConfigError(f"{tree.where(keys)} refers to {there!r}; set the value there: --{there}.NAME.")
    raise ConfigError(f"{tree.where(keys)} holds one value and has no keys of its own.")


def placeholders(tree: YamlTree) -> list[tuple[Keys, str]]:
    """Keys whose value only the user knows and has not given yet, with their comments, included files' too."""
    found: list[tuple[Keys, str]] = []
    for keys, node in walk(tree.root):
        if tag_of(node) == "!PLACEHOLDER":
            found.append((keys, tree.comment(keys)))
        elif tag_of(node).startswith("!include:"):
            inner = included_tree(tree, keys, node)
            given = node if isinstance(node, dict) else {}
            found += [((*keys, *below), words) for below, words in placeholders(inner) if below[0] not in given]
    return found


def included_tree(tree: YamlTree, keys: Keys, node: Any) -> YamlTree:
    """The tree of the file that an ``!include:`` names, relative to the file it stands in."""
    name = tag_of(node)[len("!include:"):]
    path = tree.path.parent / name
    if not path.is_file():
        raise ConfigError(f"{tree.where(keys)} includes {name!r}, but there is no file {path}.")
    return read_tree(path)


def check_references(tree: YamlTree) -> None:
    """Raise a ConfigError for a reference to nothing, or one that comes back to itself."""
    finished: set[Keys] = set()
    for keys, node in walk(tree.root):
        if tag_of(node) in ("!ref", "!copy"):
            _follow(tree, keys, (), finished)


def _follow(tree: YamlTree, keys: Keys, trail: tuple[Keys, ...], finished: set[Keys]) -> None:
    if keys in finished:
        return
    if keys in trail:
        circle = [dotted(item) for item in (*trail[trail.index(keys):], keys)]
        raise ConfigError(f"{tree.where(keys)} refers to itself: {' -> '.join(circle)}; give one of them a value.")
    node = node_at(tree.root, keys)
    if isinstance(node, dict | list) and not isinstance(node, TaggedScalar):
        for inner, item in walk(node):
            if inner and tag_of(item) in ("!ref", "!copy"):
                _follow(tree, (*keys, *inner), (*trail, keys), finished)
    elif tag_of(node) in ("!ref", "!copy"):
        for name in REFERENCE.findall(str(node.value)):
            target = tuple(re.sub(r"\[([^\]]*)\]", r"\n\1", name.split(".", 1)[0]).split("\n"))
            if node_at(tree.root, target) is _MISSING:
                raise ConfigError(
                    f"{tree.where(keys)} refers to <{name}>, and there is no such key; "
                    + did_you_mean(dotted(target), key_names(tree.root))
                )
            # What stands around a reference is not finished when the reference is: a circle through it shows.
            _follow(tree, target, (*trail, keys), finished)
    finished.add(keys)


_MISSING = object()


def node_at(root: Any, keys: Keys) -> Any:
    """The node at ``keys``, or a marker that equals nothing else when there is none."""
    node = root
    for key in keys:
        if tag_of(node).startswith("!include:"):
            return node  # its keys are read later, by the library
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            return _MISSING
    return node
