"""Real runs in one process, one after the other, each step watched: ``python drive.py JOBS.json RESULTS.json``.

A job is {"script", "words", "stop", "watch"}: what a person would type, the update before which the run gets SIGTERM
(or null), and whether its steps are watched. A result is how it ended and what `Watch` saw.

Gumbel noise is drawn by rows, of which an accelerator has more than the CPU (`toolkit.nn.masking.MaskedFrames`). Here
all rows get the same row of noise, so that both compute the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.faults.real_runs import run_here
from toolkit.models import wav2vec2
from toolkit.training.brain import Brain
from toolkit.training.step import UpdateStep

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_pin_memory"}


class Watch(TorchDispatchMode):
    """Notes what is computed with tensors of the host that are more than one number.

    ``host`` counts operators and formats, ``transfers`` copies between host and device, ``device_formats`` the formats
    of products on the device, ``places`` the devices that tensors were on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.device_formats: set[str] = set()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.places |= {str(tensor.device) for tensor in tensors}
        hosts = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim() > 0]
        name = func._schema.name
        if name in COPIES:
            if 0 < len(hosts) < len(tensors):
                self.transfers["to host" if result.device.type == "cpu" else "to device"] += 1
        elif hosts:
            self.host[f"{name} {hosts[0].dtype}".replace("torch.", "")] += 1
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.device_formats |= {str(tensor.dtype) for tensor in tensors if tensor.device.type != "cpu"}
        return result

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"host": dict(self.host), "transfers": dict(self.transfers), "places": sorted(self.places),
                "device_formats": sorted(self.device_formats)}  # fmt: skip


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One run; the fall-backs are those inside of steps and updates."""
    watch, fallbacks = Watch(), set()
    forward, finish, draw = Brain.fit_batch, UpdateStep.finish, wav2vec2.draw_gumbel_noise

    def watched(call: Any, *arguments: Any) -> Any:
        torch.ops.npu_standin.take_fallbacks()  # those of the probe are none of the step's
        with watch if job["watch"] else contextlib.nullcontext():
            result = call(*arguments)
        fallbacks.update(torch.ops.npu_standin.take_fallbacks())
        return result

    def fit_batch(self: Brain, micro: Any) -> None:
        if job["stop"] is not None and self.update >= job["stop"]:
            os.kill(os.getpid(), signal.SIGTERM)
        watched(forward, self, micro)

    Brain.fit_batch, UpdateStep.finish = fit_batch, lambda *arguments: watched(finish, *arguments)
    wav2vec2.draw_gumbel_noise = lambda shape, generator: draw((1, *shape[1:]), generator).expand(shape)
    try:
        ended = run_here(Path(job["script"]), job["words"])
    finally:
        Brain.fit_batch, UpdateStep.finish, wav2vec2.draw_gumbel_noise = forward, finish, draw
    return {"code": ended.code, "log": ended.stderr, "fallbacks": sorted(fallbacks),
            **watch.as_dict()}  # fmt: skip


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([run_job(job) for job in jobs]), encoding="utf-8")
