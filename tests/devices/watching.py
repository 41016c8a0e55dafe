"""What a training step asks of its device: reads, shapes that depend on values, and copies that wait.

For any device that is not the CPU. A mode sees every operation of forward, backward and optimizer before it is carried
out; what a library's kernel does inside of one operation it does not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "allclose"}
"""They give the host a number."""

SHAPES_FROM_VALUES = {
    "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "histc",
}  # fmt: skip


class DeviceWatch(TorchDispatchMode):
    """Lists what waits for the device, and every operation with the shapes of its tensors.

    ``waits`` are sentences; ``operations`` tuples of the operator's name and the shapes and formats of its tensors.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.waits: list[str] = []
        self.operations: list[tuple[Any, ...]] = []

    def take(self) -> tuple[list[str], list[tuple[Any, ...]]]:
        """What was seen since the last call."""
        seen = self.waits, self.operations
        self.waits, self.operations = [], []
        return seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        out = func(*args, **kwargs)
        made = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        if any(self._there(tensor) for tensor in (*given, *made)):
            self.operations.append((name, *((tuple(t.shape), str(t.dtype)) for t in (*given, *made))))
            self.waits += self._judge(name, func, given, made, args, kwargs)
        return out

    def _there(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _judge(self, name, func, given, made, args, kwargs) -> Iterator[str]:
        on_device = [tensor for tensor in given if self._there(tensor)]
        if on_device and name in READS:
            yield f"{name}: a number is read"
        if on_device and name in SHAPES_FROM_VALUES:
            yield f"{name}: the shape of the result depends on values"
        if name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(args)):
            yield f"{name}: indexed by a mask"
        if name == "repeat_interleave" and on_device and kwargs.get("output_size") is None and len(args) < 3:
            yield f"{name}: without the size of its result"
        if name == "lift_fresh" and on_device:
            yield "tensor: made on the device from numbers of the host, which waits"
        if name in ("_to_copy", "copy_", "_copy_from"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
            if self._there(source) and not self._there(target):
                yield f"{name}: {tuple(source.shape)} comes to the host"
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            # A number of the host rides in the kernel's arguments.
            if not self._there(source) and self._there(target) and waits and source.dim() > 0:
                yield f"{name}: {tuple(source.shape)} goes to the device and is waited for"


def _indices(args: tuple[Any, ...]) -> list[Tensor]:
    """The index tensors of index, index_put, index_put_, ..."""
    lists = [value for value in args if isinstance(value, (list, tuple))]
    return [value for values in lists for value in values if isinstance(value, Tensor)]
