"""The floors of the house, read from the imports: nothing upward, nothing in a circle, no private name of another
room; torch.cuda only in the device table; no pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each room may import. A room is the first name under toolkit, a single file its own.
GROUND = {"errors", "seeds", ""}
FLOORS: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "seeds": {"errors"},
    "nn": GROUND,
    "data": GROUND,
    "training": GROUND | {"data"},
    "models": GROUND | {"nn", "data.tokens"},
    "decoding": GROUND | {"data"},
    "pretraining": GROUND | {"data", "models", "training"},
    "classification": GROUND | {"data", "models", "training"},
    "recognition": GROUND | {"data", "decoding", "models", "training"},
    "curves": GROUND,
    "launch": GROUND,
    "__main__": {"*"},
}
OUTSIDE = ("recipes", "templates", "demo", "benchmarks", "tests")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DEVICES = "toolkit/training/devices.py"
# Where other programs' checkpoints are read (by torch's restricted unpickler only) and written.
PICKLE_READER = "toolkit/models/convert/unpickle.py"
PICKLE_WRITER = "toolkit/models/convert/fairseq_write.py"


@dataclass(frozen=True)
class Import:
    """One import of a module of the toolkit: who, whom, which names, in which line; a type-only one needs no floor."""

    source: str
    target: str
    names: tuple[str, ...]
    line: int
    only_for_types: bool


def module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def trees(root: Path, folder: str) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((root / folder).rglob("*.py")):
        if "fixtures" not in file.parts:
            yield file, ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def type_only_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            lines |= {line for inner in node.body for line in range(inner.lineno, (inner.end_lineno or 0) + 1)}
    return lines


def absolute(source: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = source.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_of(root: Path) -> list[Import]:
    """Every import of the toolkit within itself, in functions too."""
    files = list(trees(root, "toolkit"))
    modules = {module_name(root, file) for file, _ in files}
    found = []
    for file, tree in files:
        source, quiet = module_name(root, file), type_only_lines(tree)
        for node in ast.walk(tree):
            pairs: list[tuple[str, tuple[str, ...]]] = []
            if isinstance(node, ast.Import):
                pairs = [(alias.name, ()) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = absolute(source, file.name == "__init__.py", node)
                for alias in node.names:  # `from package import module` imports the module
                    inner = f"{base}.{alias.name}"
                    pairs.append((inner, ()) if inner in modules else (base, (alias.name,)))
            for target, names in pairs:
                if target.split(".")[0] in ("toolkit", *OUTSIDE):
                    found.append(Import(source, target, names, node.lineno, node.lineno in quiet))
    return found


def upward(root: Path) -> list[str]:
    problems = []
    for item in imports_of(root):
        own, other = room(item.source), room(item.target)
        where = f"{item.source}, line {item.line}: imports {item.target}"
        if not item.target.startswith("toolkit"):
            problems.append(f"{where}, which stands above the toolkit")
        elif own not in FLOORS:
            problems.append(f"{item.source}: the room {own!r} has no floor; write its row into FLOORS")
        elif other != own and not item.only_for_types:
            allowed, inner = FLOORS[own], item.target.removeprefix("toolkit.")
            if not allowed & {"*", other, ".".join(inner.split(".")[:2])}:
                problems.append(f"{where}, but {own or 'toolkit'} may only use {', '.join(sorted(allowed - {''}))}")
    return problems


def circles(root: Path) -> list[str]:
    graph: dict[str, set[str]] = {}
    for item in imports_of(root):
        if not item.only_for_types and item.source != item.target:
            graph.setdefault(item.source, set()).add(item.target)
    found, state = [], dict.fromkeys(graph, "new")

    def visit(module: str, path: tuple[str, ...]) -> None:
        state[module] = "open"
        for target in sorted(graph[module]):
            if state.get(target) == "open":
                found.append(" -> ".join([*path[path.index(target) :], target]))
            elif state.get(target) == "new":
                visit(target, (*path, target))
        state[module] = "done"

    for module in sorted(graph):
        if state[module] == "new":
            visit(module, (module,))
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(root: Path) -> list[str]:
    """Private names taken from another room: imported, or read from an imported module."""
    problems = []
    for item in imports_of(root):
        if room(item.source) != room(item.target):
            hidden = [name for name in (*item.names, *item.target.split(".")) if is_private(name)]
            problems += [f"{item.source}, line {item.line}: takes {name} from {item.target}" for name in hidden]
    for folder in ("toolkit", *OUTSIDE[:4]):
        for file, tree in trees(root, folder):
            own = room(module_name(root, file)) if folder == "toolkit" else None
            aliases = foreign_modules(tree, own)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
                    if node.value.id in aliases:
                        problems.append(f"{file.relative_to(root)}, line {node.lineno}: reads {ast.unparse(node)}")
                outside = folder != "toolkit" and isinstance(node, ast.ImportFrom)
                if outside and (node.module or "").startswith("toolkit"):
                    hidden = [alias.name for alias in node.names if is_private(alias.name)]
                    problems += [f"{file.relative_to(root)}, line {node.lineno}: takes {name}" for name in hidden]
    return problems


def foreign_modules(tree: ast.Module, own: str | None) -> set[str]:
    """The names under which a file knows things of the toolkit's other rooms."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit") and not node.level:
            for alias in node.names:
                if room(f"{node.module}.{alias.name}") != own:
                    names.add(alias.asname or alias.name)
    return names


def cuda_outside_devices(root: Path) -> list[str]:
    problems = []
    for folder in ("toolkit", *OUTSIDE[:4]):
        for file, tree in trees(root, folder):
            name = file.relative_to(root).as_posix()
            for node in ast.walk(tree):
                attribute = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
                plain = isinstance(node, ast.Import) and any(a.name.startswith("torch.cuda") for a in node.names)
                source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                inside = source.startswith("torch.cuda") or (
                    source == "torch" and any(alias.name == "cuda" for alias in node.names)
                )
                if (attribute or plain or inside) and name != DEVICES:
                    problems.append(f"{name}, line {node.lineno}: torch.cuda; ask the device table")
    return problems


def is_conversion(file: str, call: ast.Call) -> bool:
    """The one call that reads foreign checkpoints, restricted to data, and the one that writes them."""
    called = ast.unparse(call.func)
    restricted = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
    return (file, called) == (PICKLE_WRITER, "torch.save") or (
        (file, called) == (PICKLE_READER, "torch.load") and restricted
    )


def pickles(root: Path) -> list[str]:
    """Anything that reads or writes pickles: the modules, torch.load and torch.save, numpy's allow_pickle."""
    problems = []
    for folder in ("toolkit", *OUTSIDE[:4]):
        for file, tree in trees(root, folder):
            for node in ast.walk(tree):
                bad = ""
                if isinstance(node, ast.Import):
                    bad = next((a.name for a in node.names if a.name.split(".")[0] in PICKLES), "")
                elif isinstance(node, ast.ImportFrom):
                    module = (node.module or "").split(".")[0]
                    taken = {alias.name for alias in node.names} if module == "torch" else set()
                    bad = module if module in PICKLES else ", ".join(taken & {"load", "save"})
                elif isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    allowed = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                    bad = called if called in ("torch.load", "torch.save") else "allow_pickle" if allowed else ""
                    if is_conversion(file.relative_to(root).as_posix(), node):
                        continue
                if bad:
                    problems.append(f"{file.relative_to(root)}, line {node.lineno}: {bad} is pickle")
    return problems


RULES = {
    "upward": upward,
    "circles": circles,
    "private names": private_names,
    "torch.cuda": cuda_outside_devices,
    "pickle": pickles,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule: str) -> None:
    problems = RULES[rule](ROOT)
    assert not problems, "\n".join(problems)


def test_the_whole_toolkit_was_read() -> None:
    read = {module_name(ROOT, file) for file, _ in trees(ROOT, "toolkit")}
    assert {"toolkit", "toolkit.errors", "toolkit.nn", "toolkit.data", "toolkit.training"} <= read


BROKEN = [
    ("upward", {"toolkit/nn/a.py": "from toolkit.data.audio import read_audio"}, "toolkit.nn.a, line 1"),
    ("upward", {"toolkit/nn/a.py": "def f():\n    from ..models import ctc"}, "toolkit.nn.a, line 2"),
    ("upward", {"toolkit/models/a.py": "import toolkit.data.audio"}, "toolkit.models.a, line 1"),
    ("upward", {"toolkit/data/a.py": "from recipes import x"}, "above the toolkit"),
    ("upward", {"toolkit/attic/a.py": "import toolkit.errors"}, "'attic' has no floor"),
    ("circles", {"toolkit/nn/a.py": "from toolkit.nn import b", "toolkit/nn/b.py": "from .a import f"}, "nn.b -> "),
    ("circles", {"toolkit/nn/__init__.py": "from .a import f", "toolkit/nn/a.py": "from toolkit.nn import g"}, "->"),
    ("private names", {"toolkit/models/a.py": "from toolkit.nn.b import _f"}, "takes _f"),
    ("private names", {"toolkit/models/a.py": "from toolkit.nn import b\nb._f()"}, "reads b._f"),
    ("private names", {"recipes/a.py": "from toolkit.nn.b import _f"}, "takes _f"),
    ("torch.cuda", {"toolkit/nn/a.py": "import torch\ntorch.cuda.synchronize()"}, "line 2"),
    ("torch.cuda", {"recipes/a.py": "from torch import cuda"}, "recipes/a.py, line 1"),
    ("pickle", {"toolkit/nn/a.py": "import pickle"}, "pickle is pickle"),
    ("pickle", {"toolkit/nn/a.py": "import torch\ntorch.save(1, 'x')"}, "torch.save"),
    ("pickle", {"toolkit/nn/a.py": "import numpy\nnumpy.load('x', allow_pickle=True)"}, "allow_pickle"),
    ("pickle", {PICKLE_READER: "import torch\ntorch.load('x')"}, "torch.load"),
    ("pickle", {PICKLE_READER: "import torch\ntorch.load('x', weights_only=False)"}, "torch.load"),
    ("pickle", {PICKLE_READER: "import torch\ntorch.save(1, 'x')"}, "torch.save"),
]


@pytest.mark.parametrize(("rule", "files", "said"), BROKEN)
def test_each_rule_sees_what_breaks_it(tmp_path: Path, rule: str, files: dict[str, str], said: str) -> None:
    for name, text in {"toolkit/__init__.py": "", "toolkit/data/__init__.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    problems = RULES[rule](tmp_path)
    assert len(problems) >= 1 and said in "\n".join(problems)


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    files = {
        "toolkit/__init__.py": "",
        "toolkit/errors.py": "",
        "toolkit/nn/__init__.py": "",
        "toolkit/nn/a.py": "from toolkit.errors import E\nfrom . import b\nb._f()\nimport torch\ntorch.load_inline = 1",
        "toolkit/nn/b.py": "def _f(): pass",
        "toolkit/data/tokens.py": "",
        "toolkit/models/a.py": "from toolkit.data.tokens import T\nfrom toolkit.nn import a",
        "toolkit/training/devices.py": "import torch\ntorch.cuda.is_available()",
        "toolkit/training/b.py": "import typing\nif typing.TYPE_CHECKING:\n    from toolkit.models import a",
        "toolkit/__main__.py": "from toolkit.models.a import T\nfrom toolkit import curves",
        PICKLE_READER: "import torch\ntorch.load('x', weights_only=True)",
        PICKLE_WRITER: "import torch\ntorch.save({}, 'x')",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {rule: problems for rule, check in RULES.items() if (problems := check(tmp_path))} == {}
