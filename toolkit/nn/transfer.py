"""Small tensors from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on ``device``, without waiting for what the device still has to do.

    Arguments
    ---------
    tensor : any; one that is on a device already is moved plainly.
    device : where to.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    try:
        # A copy out of ordinary memory first waits for the device's queue.
        tensor = tensor.pin_memory()
    except RuntimeError:
        pass  # a device without pinned memory: the plain copy is right, only later
    return tensor.to(device, non_blocking=True)
