"""Pickled checkpoints, read without running what they hold.

The reading itself is torch's own restricted unpickler (``weights_only``): it builds tensors, containers, numbers and
strings, and calls nothing that it was not told of. Checkpoints of other programs hold objects of their configuration
classes too; each class that is known here gets a stand-in of the same name, which keeps what it is given and does
nothing. Any other name is refused before anything is built.
"""

from __future__ import annotations

import argparse
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, which torch.save still writes
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch

from toolkit.errors import CheckpointError

LEFT_TO_TORCH = (
    "torch.*",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.set",
    "builtins.bytearray",
    "builtins.complex",
)
"""Names that torch's unpickler judges by its own list, which holds nothing but constructors of data."""

STAND_INS = (
    "omegaconf.*",
    "fairseq.*",
    "fairseq_user_dir_*",
    "examples.*",
    "typing.*",
    "operator.getitem",  # how typing.List[int] is pickled
    "_operator.getitem",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.*",
    "numpy._core.multiarray.*",
    "pathlib.*Path",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"enum.{name}" for name in ("Enum", "IntEnum", "EnumMeta")),
)
"""Names that stand in a checkpoint's settings, for which an object that does nothing is enough."""

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Start of what torch.save wrote before torch 1.6: a pickled constant, then four more pickles and the tensors."""


class StandIn:
    """An object of a class that is not here: the name, the arguments and the state that it was pickled with.

    Example
    -------
    >>> node = stand_in_class("omegaconf.nodes.AnyNode")()
    >>> node.__setstate__({"_val": 3})
    >>> node.name, node.state
    ('omegaconf.nodes.AnyNode', {'_val': 3})
    """

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any
    name = ""

    def __new__(cls, *args: Any) -> StandIn:
        made = object.__new__(cls)
        made.args, made.state = args, {}
        return made

    def __init__(self, *args: Any) -> None:
        """All is done: a pickle may make the object without coming here."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainDict(dict):
    """In place of collections.defaultdict, whose factory would be called: makes an ordinary dict."""

    def __new__(cls, *_: Any) -> dict:  # type: ignore[misc]
        return {}


def stand_in_class(name: str) -> type[StandIn]:
    """A class of stand-ins for the class of the full name ``name``."""
    module, _, own = name.rpartition(".")
    # torch finds a class that it may use by these two names.
    return type(own, (StandIn,), {"__slots__": (), "name": name, "__module__": module, "__qualname__": own})


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What a file written by ``torch.save`` holds, of any version of torch; nothing in the file is run.

    Tensors of a file of torch 1.6 or later are mapped from the disk and read when they are used.

    Arguments
    ---------
    path : the file.

    Returns
    -------
    Tensors (on the host), dicts, lists, numbers, strings, ``argparse.Namespace``, and a :class:`StandIn` for each
    object of a known configuration class.

    Raises
    ------
    CheckpointError : the file is missing, damaged or not of torch.save, or it wants something run or built that is
        neither a tensor nor a known setting (the error names it).
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: this is a folder; give the file of the checkpoint in it.")
    try:
        names, mapped = _names_in(path)
    except OSError as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error.strerror or error}).") from error
    allowed = [_class_for(name, path) for name in sorted(names) if not _matches(name, LEFT_TO_TORCH)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or forged pickle makes the unpickler fail in any way there is
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise _refusal(refused[1], path) from error
        raise CheckpointError(
            f"{path}: the file is damaged or no checkpoint ({type(error).__name__}); copy or download it again."
        ) from error


def _names_in(path: Path) -> tuple[set[str], bool]:
    """The full names of all that a file's pickles ask for, and whether its tensors can be mapped.

    Nothing is built here; torch's unpickler looks again at each name, so what is overlooked here is refused there.
    """
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
        file.seek(0)
        if not start:
            raise CheckpointError(f"{path}: the file is empty; copy or download it again.")
        try:
            if start.startswith(b"PK\x03\x04"):
                return _names_in_zip(file, path)
            if start == MAGIC:
                return set().union(*(_names_in_pickle(file) for _ in range(5))), False
        except CheckpointError:
            raise
        except (ValueError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(
                f"{path}: the file is damaged, cut short or of an unusual form ({error}); copy or save it again."
            ) from error
    raise CheckpointError(
        f"{path}: this is no file of torch.save, it begins with {start[:8]!r}; give a checkpoint (.pt, .bin, .ckpt)."
    )


def _names_in_zip(file: IO[bytes], path: Path) -> tuple[set[str], bool]:
    with zipfile.ZipFile(file) as archive:
        pickles = [entry for entry in archive.namelist() if entry.split("/")[-1] == "data.pkl"]
        if any(entry.split("/")[-1] == "constants.pkl" for entry in archive.namelist()):
            raise CheckpointError(
                f"{path}: this is a TorchScript program, which would have to be run; give the checkpoint that it was "
                "made from."
            )
        if not pickles:
            raise CheckpointError(f"{path}: this zip archive holds no data.pkl; give a file of torch.save.")
        names: set[str] = set()
        for entry in pickles:
            with archive.open(entry) as stream:
                names |= _names_in_pickle(stream)
        # Only what was stored as it is can be mapped; torch would map packed bytes without a word.
        return names, all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _names_in_pickle(stream: IO[bytes]) -> set[str]:
    """Full names of the globals of one pickle, in today's spelling; the stream is left behind its end."""
    names = set()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "PROTO" and argument not in (2, 3):
            raise ValueError(f"pickle protocol {argument}; torch.save takes 2 unless it is told otherwise")
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names


def _class_for(name: str, path: Path) -> Any:
    """The class to build for a name that torch does not know."""
    if name == "argparse.Namespace":
        return argparse.Namespace
    if name == "collections.defaultdict":
        return type("defaultdict", (_PlainDict,), {"__module__": "collections", "__qualname__": "defaultdict"})
    if _matches(name, STAND_INS):
        return stand_in_class(name)
    raise _refusal(name, path)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refusal(name: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: the file asks for {name}, which is neither a tensor nor a known setting and could run anything; "
        "nothing was read. If you trust the file, save its weights alone with the program that made it."
    )
