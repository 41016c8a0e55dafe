"""Which number format a model's body computes in.

``torch.autocast`` is the one switch that a user of the toolkit turns. A model asks it once, at the top of its
forward, passes the format on explicitly and runs its body with autocast off: each weight is cast once per
micro-batch, and nothing is cast behind the model's back.
"""

from __future__ import annotations

import torch


def compute_dtype(device_type: str, default: torch.dtype = torch.float32) -> torch.dtype:
    """The format that products are to run in on this device.

    Arguments
    ---------
    device_type : "cpu", "cuda", ... (``tensor.device.type``).
    default : the format where autocast is off, usually that of the parameters.

    Returns
    -------
    The autocast format if autocast is on for this device, else ``default``.

    Example
    -------
    >>> compute_dtype("cpu")
    torch.float32
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     compute_dtype("cpu")
    torch.bfloat16
    """
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return default


def explicit_precision(device_type: str) -> torch.autocast:
    """A context in which nothing is cast implicitly; a model's body runs in it."""
    return torch.autocast(device_type, enabled=False)
