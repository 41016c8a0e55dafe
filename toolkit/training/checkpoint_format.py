"""The files of a checkpoint: tensors as safetensors, the rest as JSON, a checksum of each; nothing is unpickled.

A checkpoint is a folder ``step_00012345`` with ``model.safetensors``, ``optimizer.safetensors``, others of their
kind, ``state.json`` and, written last, ``checksums.json``. Without a valid ``checksums.json`` a folder is none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.errors import CheckpointError
from toolkit.training.folders import flush_to_disk

CHECKSUMS_NAME = "checksums.json"
STATE_NAME = "state.json"
HASH = "sha256"  # also what `sha256sum` prints, and in hardware on recent CPUs
BLOCK = 1 << 22
Copy = Callable[[torch.Tensor, bool], torch.Tensor]
"""Takes a tensor, and whether it is a temporary one (gathered just now), and returns one in host memory."""
TENSOR_MARK, FLOAT_MARK = "__tensor__", "__float__"
COMPILED_PREFIX = "_orig_mod."
"""What torch.compile puts before the names of the module it wraps."""
LOCAL_SETTINGS = ("fused", "foreach", "capturable", "differentiable")
"""Settings of an optimizer that follow the machine it runs on, not the run."""


def step_name(update: int) -> str:
    """Folder name of the checkpoint after ``update`` updates."""
    return f"step_{update:08d}"


def step_of(path: Path) -> int | None:
    """The update in a folder's name, None when it is not named like a checkpoint."""
    found = re.fullmatch(r"step_(\d+)", path.name)
    return int(found.group(1)) if found else None


def checksum(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.new(HASH)
    with open(path, "rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def write_folder(target: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
    """Write a checkpoint's folder whole or not at all: beside it, flushed to the disk, then renamed.

    Arguments
    ---------
    target : the folder; one of that name is replaced.
    tensors : file name without ending to its tensors (host memory; copies of one another allowed).
    state : what goes into ``state.json``.

    Raises
    ------
    OSError : the disk is full or cannot be written; nothing of the new folder is left then.
    """
    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        aliases: dict[str, dict[str, str]] = {}
        for name, named in tensors.items():
            distinct, aliases[name] = without_copies(named)
            _save_tensors(temporary / f"{name}.safetensors", distinct)
        content = {**state, "aliases": {name: pairs for name, pairs in aliases.items() if pairs}}
        _write_text(temporary / STATE_NAME, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
        entries = {}
        for path in sorted(temporary.iterdir()):
            flush_to_disk(path)
            entries[path.name] = {"bytes": path.stat().st_size, HASH: checksum(path)}
        _write_text(temporary / CHECKSUMS_NAME, json.dumps({"files": entries}, indent=1))
        flush_to_disk(temporary / CHECKSUMS_NAME)
        flush_to_disk(temporary)
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an older folder of that name steps aside first and is deleted afterwards."""
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    os.replace(temporary, target)
    flush_to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half done; a folder that only stepped aside comes back."""
    for path in folder.glob(".step_*"):
        if path.suffix == ".old" and not (target := path.with_name(path.stem[1:])).exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Delete a checkpoint; killed in between, it does not look like a damaged one."""
    hidden = path.with_name(f".{path.name}.gone")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is none any more (``step_00000010.damaged``); returns where it lies."""
    names = (f"{path.name}.damaged{number}" for number in itertools.chain([""], itertools.count(2)))
    aside = next(place for place in map(path.with_name, names) if not place.exists())
    os.replace(path, aside)
    return aside


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code.group(1)) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def without_copies(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share no memory, and the names of those left out as equal to another (tied weights)."""
    distinct: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[Hashable, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place, storage = place_of(tensor), tensor.untyped_storage().data_ptr()
        if place is None:
            distinct[name] = tensor.contiguous()
        elif place in owners:
            aliases[name] = owners[place]
        else:
            owners[place] = name
            is_view = storage in storages
            distinct[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor.contiguous()
            storages.add(storage)
    return distinct, aliases


def place_of(tensor: torch.Tensor) -> Hashable | None:
    """Equal for tensors that are the same memory seen the same way (tied weights); None for one without elements."""
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def problem_of(path: Path, *, thorough: bool) -> str | None:
    """Why a folder is no valid checkpoint (half a sentence), None when it is one.

    ``thorough`` reads every file and compares its checksum; otherwise names and sizes only.
    """
    try:
        entries = json.loads((path / CHECKSUMS_NAME).read_text(encoding="utf-8"))["files"]
        sizes = {name: (int(entry["bytes"]), str(entry[HASH])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_NAME}, so it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {CHECKSUMS_NAME} is damaged"
    except OSError as error:
        return f"its {CHECKSUMS_NAME} cannot be read ({error.strerror})"
    if STATE_NAME not in sizes:
        return f"its {CHECKSUMS_NAME} names no {STATE_NAME}"
    for name, (size, expected) in sizes.items():
        file = path / name
        if not file.is_file():
            return f"its {name} is missing"
        if file.stat().st_size != size:
            return f"its {name} has {file.stat().st_size} bytes instead of {size}"
        if thorough and checksum(file) != expected:
            return f"the checksum of its {name} is wrong: the file was changed or the disk damaged it"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The content of ``state.json``; CheckpointError when it cannot be read."""
    try:
        state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: its {STATE_NAME} is damaged or missing.") from error
    if not isinstance(state, dict) or not isinstance(state.get("update"), int):
        raise CheckpointError(f"{path / STATE_NAME} is of another program: it names no update.")
    return state


class TensorFile:
    """Tensors of one file of a checkpoint, read one at a time.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(Path(folder) / step_name(1), {"model": {"a": torch.ones(2)}}, {"update": 1})
    ...     with TensorFile(Path(folder) / step_name(1), "model") as file:
    ...         file["a"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.safetensors"
        self._aliases: dict[str, str] = read_state(folder).get("aliases", {}).get(name, {})
        self._file: Any = None

    def __enter__(self) -> TensorFile:
        if not self.path.is_file():
            raise CheckpointError(f"the checkpoint {self.path.parent} holds no {self.path.name}.")
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read as safetensors: {error}.") from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)

    def names(self) -> list[str]:
        """Names of all tensors, tied ones too."""
        return [*self._file.keys(), *self._aliases]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it."""
        return tuple(self._file.get_slice(self._aliases.get(name, name)).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(self._aliases.get(name, name))


def name_of_tensor(name: str) -> str:
    """A tensor's name in a checkpoint, whether its module was compiled or not."""
    return name.replace(COMPILED_PREFIX, "")


def load_module(module: torch.nn.Module, file: TensorFile) -> None:
    """Copy a file's tensors into a module whose names and shapes are the same; CheckpointError says what differs."""
    targets = {name_of_tensor(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    names = set(file.names())
    missing, unexpected = targets.keys() - names, names - targets.keys()
    shapes = [
        f"{name} is {file.shape(name)} there and {tuple(targets[name].shape)} here"
        for name in sorted(names & targets.keys())
        if file.shape(name) != tuple(targets[name].shape)
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{file.path} does not fit the model: {len(missing)} of {len(targets)} tensors are missing "
            f"({some_names(missing)}), {len(unexpected)} are not known ({some_names(unexpected)}), {len(shapes)} have "
            f"another shape ({some_names(shapes)}); use the architecture that the run began with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            own = target.to_local() if hasattr(target, "to_local") else target
            own.copy_(part_of(file[name], target))


def split_state(
    value: Any, *, where: str, copy: Copy | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A nested state as JSON with marks, and its tensors by dotted place.

    ``copy`` is as for `host_tensor`.

    Raises
    ------
    CheckpointError : something that is neither a tensor nor a plain value; says where.

    Example
    -------
    >>> plain, tensors = split_state({"a": [1, torch.zeros(2)], "b": float("inf")}, where="scaler")
    >>> plain
    {'a': [1, {'__tensor__': 'a.1'}], 'b': {'__float__': 'inf'}}
    """
    tensors: dict[str, torch.Tensor] = {}

    def split(item: Any, place: str) -> Any:
        if isinstance(item, torch.Tensor):
            tensors[place] = host_tensor(item, copy)
            return {TENSOR_MARK: place}
        if isinstance(item, np.generic):
            item = item.item()
        if isinstance(item, float) and not math.isfinite(item):
            return {FLOAT_MARK: str(item)}
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
            return {key: split(inner, f"{place}.{key}" if place else key) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [split(inner, f"{place}.{index}" if place else str(index)) for index, inner in enumerate(item)]
        kind = type(item).__name__
        raise CheckpointError(
            f"the state of {where} holds a {kind} at {place or 'its top'!r}, but a checkpoint takes tensors, numbers, "
            "text, lists and mappings with text keys."
        )

    return split(value, ""), tensors


def join_state(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `split_state`; ``tensor`` gives the tensor of a place."""
    if isinstance(value, dict):
        if set(value) == {TENSOR_MARK}:
            return tensor(value[TENSOR_MARK])
        if set(value) == {FLOAT_MARK}:
            return float(value[FLOAT_MARK])
        return {key: join_state(item, tensor) for key, item in value.items()}
    return [join_state(item, tensor) for item in value] if isinstance(value, list) else value


def host_tensor(tensor: torch.Tensor, copy: Copy | None = None) -> torch.Tensor:
    """The whole tensor in host memory, gathered over ranks where it is sharded.

    Arguments
    ---------
    copy : brings it to the host (`Snapshot.copy`); None = no copy is made of what is there already.
    """
    tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return tensor.cpu() if copy is None else copy(tensor, False)
    whole = tensor.full_tensor()
    # One process alone has all in its own shard, which is the run's and will change.
    is_temporary = whole.untyped_storage().data_ptr() != tensor.to_local().untyped_storage().data_ptr()
    return whole.cpu() if copy is None else copy(whole, is_temporary)


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor what a tensor like ``like`` holds on this rank: all of it, or its shard."""
    if not hasattr(like, "full_tensor"):
        return whole
    for dimension, placement in enumerate(like.placements):
        if placement.is_shard():
            pieces = whole.chunk(like.device_mesh.size(dimension), placement.dim)
            rank = like.device_mesh.get_local_rank(dimension)
            # More ranks than rows: the last ones hold nothing.
            whole = pieces[rank] if rank < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Tensor], copy: Copy | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and plain values, both by parameter name.

    Arguments
    ---------
    names : parameter name to parameter.
    copy : as for `host_tensor`.

    Returns
    -------
    Tensors named ``slot/parameter`` (``exp_avg/encoder.weight``), and a JSON value with each group's settings and
    parameter names and the states that are numbers.

    Example
    -------
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> tensors, values = optimizer_to_tensors(optimizer, dict(model.named_parameters()))
    >>> sorted(tensors), values["groups"][0]["params"]
    (['momentum_buffer/bias', 'momentum_buffer/weight'], ['weight', 'bias'])
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors: dict[str, torch.Tensor] = {}
    groups: list[dict[str, Any]] = []
    numbers: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        members = [_name_in(name_of, parameter) for parameter in group["params"]]
        settings = {key: value for key, value in group.items() if key not in ("params", *LOCAL_SETTINGS)}
        settings = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
        plain, _ = split_state(settings, where="the optimizer")
        groups.append({"params": members, "settings": plain})
        for parameter, name in zip(group["params"], members, strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{slot}/{name}"] = host_tensor(value, copy)
                elif value is not None:
                    numbers.setdefault(name, {})[slot] = split_state(value, where="the optimizer")[0]
    return tensors, {"groups": groups, "numbers": numbers}


def _name_in(name_of: Mapping[int, str], parameter: torch.Tensor) -> str:
    try:
        return name_of[id(parameter)]
    except KeyError as error:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that belongs to no added module; add "
            "its module to the Checkpointer first."
        ) from error


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
) -> None:
    """Put a state of `optimizer_to_tensors` into an optimizer over parameters of the same names.

    Raises
    ------
    CheckpointError : the groups hold other parameters; names some.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    _check_groups(optimizer, name_of, values["groups"])
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number_of: dict[str, int] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        settings = join_state(saved["settings"], lambda place: tensors[place])
        merged = {key: value for key, value in group.items() if key != "params"}
        for key, value in settings.items():
            merged[key] = tuple(value) if isinstance(merged.get(key), tuple) else value
        for parameter in group["params"]:
            number_of[name_of[id(parameter)]] = len(number_of)
        groups.append({**merged, "params": [number_of[name_of[id(parameter)]] for parameter in group["params"]]})
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        state.setdefault(number_of[name], {})[slot] = _sharded_like(parameters[number_of[name]], tensor)
    for name, slots in values.get("numbers", {}).items():
        state.setdefault(number_of[name], {}).update(slots)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sharded_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A state of the parameter's shape in shards where the parameter is; others (counts) as they are."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    sharded = torch.zeros_like(parameter, dtype=tensor.dtype)
    sharded.to_local().copy_(part_of(tensor, parameter))
    return sharded


def _check_groups(optimizer: torch.optim.Optimizer, name_of: Mapping[int, str], saved: list[Any]) -> None:
    here = [[_name_in(name_of, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    if len(here) != len(saved):
        raise CheckpointError(
            f"the optimizer has {len(here)} parameter groups and the checkpoint {len(saved)}; use the parameter groups "
            "that the run began with."
        )
    for index, (mine, theirs) in enumerate(zip(here, saved, strict=True)):
        lacking, extra = set(mine) - set(theirs["params"]), set(theirs["params"]) - set(mine)
        if lacking or extra:
            raise CheckpointError(
                f"parameter group {index} of the optimizer does not fit the checkpoint: {some_names(lacking)} only "
                f"here, {some_names(extra)} only there; use the parameter groups that the run began with."
            )


def some_names(names: Iterable[str], limit: int = 4) -> str:
    """A few of many names, for a message."""
    names = sorted(names)
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "none"


def present_folders(folder: Path) -> list[tuple[int, Path]]:
    """(update, path) of every folder named like a checkpoint, oldest first."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            update = step_of(path)
            if update is not None and path.is_dir():
                found.append((update, path))
    return sorted(found)
