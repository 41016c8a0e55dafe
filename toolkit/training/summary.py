"""The end of a run in numbers: ``summary.json`` and a table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from toolkit.training.folders import write_json

if TYPE_CHECKING:
    from toolkit.training.brain import Brain


def summarize(brain: Brain) -> dict[str, Any]:
    """What every run reports, from its Brain (a collective: peak memory is the highest of all ranks).

    Returns
    -------
    ``updates``, ``epochs``, ``wall_seconds`` (training, validation and checkpoints, all sessions), ``audio_seconds`` or
    ``text_tokens`` (what went through the training), ``throughput`` {``value``, ``unit``} (training alone, all ranks
    together), ``peak_memory_gb`` (10^9 bytes, one rank), ``device``, ``precision``, ``world_size``,
    ``best`` (validation metrics and their update; None without), ``final`` (last rows of training and validation).
    """
    progress = brain.progress
    peak = max(brain.world.gather_objects(brain.device_row.peak_memory_bytes()))
    return {
        "updates": progress.update,
        "epochs": progress.epochs,
        "wall_seconds": round(progress.length.elapsed(), 3),
        progress.unit.total: round(progress.amount, 3),
        "throughput": {"value": round(progress.throughput, 4), "unit": progress.unit.rate},
        "peak_memory_gb": round(peak / 1e9, 3),
        "device": brain.device_row.name,
        "precision": brain.precision,
        "world_size": brain.world.size,
        "parameters": sum(parameter.numel() for parameter in brain.modules.parameters()),
        "best": progress.best or None,
        "final": progress.final,
    }


def write_summary(folder: Path | str, values: Mapping[str, Any]) -> Path:
    """Write ``summary.json``; numbers that are not finite become null.

    Example
    -------
    >>> import tempfile
    >>> write_summary(tempfile.mkdtemp(), {"updates": 3, "test_wer": float("nan")}).read_text()
    '{\\n "updates": 3,\\n "test_wer": null\\n}\\n'
    """
    return write_json(Path(folder) / "summary.json", _plain(values))


def format_summary(values: Mapping[str, Any]) -> str:
    """The summary as a table of names and values, for the console.

    Example
    -------
    >>> print(format_summary({"updates": 10, "throughput": {"value": 2.5, "unit": "s/s"}, "test_wer": 12.3456}))
    updates               10
    throughput            2.5 s/s
    test_wer              12.35
    """
    lines = []
    for name, value in values.items():
        if name == "throughput":
            value = f"{_short(value['value'])} {value['unit']}"
        elif isinstance(value, Mapping):
            value = ", ".join(
                f"{key} {_short(item)}" for key, item in value.items() if not isinstance(item, Mapping | list)
            )
            if not value:
                continue
        lines.append(f"{name:<21} {_short(value)}")
    return "\n".join(lines)


def describe_modules(modules: nn.ModuleDict) -> str:
    """A table of modules with their parameters, for the log.

    Example
    -------
    >>> print(describe_modules(nn.ModuleDict({"model": nn.Linear(1000, 10)})))
    module                 parameters      trainable
    model                      10,010         10,010
    """
    lines = [f"{'module':<18} {'parameters':>14} {'trainable':>14}"]
    for name, module in modules.items():
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        lines.append(f"{name:<18} {total:>14,} {trained:>14,}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
