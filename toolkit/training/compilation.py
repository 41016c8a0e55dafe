"""torch.compile for a model as a whole, or for its blocks one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.training.options import RunOptions

VARIANTS = 64
"""Graphs that one piece of code may have, for bucket shapes, training and evaluation, student and teacher: beyond its
own limit (8) torch goes on without compiling, and says so in a log only."""


def compile_modules(modules: nn.ModuleDict, *, by_block: bool, **how: Any) -> int:
    """Have the modules compiled when they first run.

    Arguments
    ---------
    by_block : the innermost of each module's ``blocks()`` (a module without that method: as a whole). Layers of one
        kind share a graph, which is made once instead of once a layer. What shards parameters works around the blocks,
        outside of the graphs.
    how : further arguments of `torch.compile`.

    Returns
    -------
    How many pieces will be compiled.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    pieces: list[nn.Module] = []
    for module in modules.values():
        blocks = module.blocks() if by_block and hasattr(module, "blocks") else [module]
        pieces += [block for block in blocks if not any(_is_inside(other, block) for other in blocks)]
    for piece in pieces:
        if by_block:
            # Not the call with its hooks: those gather the parameters, and give them back.
            piece.forward = torch.compile(piece.forward, dynamic=False, **how)  # type: ignore[method-assign]
        else:
            piece.compile(dynamic=False, **how)
    return len(pieces)


def compile_as_told(modules: nn.ModuleDict, options: RunOptions) -> None:
    """Have the modules compiled as the options say; not at all without ``compile``."""
    if not options.compile:
        return
    how: dict[str, Any] = {"mode": options.compile_mode}
    if options.compile_backend is not None:  # modes are inductor's
        how = {"backend": options.compile_backend}
    compile_modules(modules, by_block=options.compile_blocks or options.parallel == "fsdp2", **how)


def check_compilation(options: RunOptions) -> None:
    """ConfigError where ``compile`` is asked for with a backend or mode that torch does not know."""
    if not options.compile:
        return
    if options.compile_backend is not None:
        known = sorted(torch.compiler.list_backends(exclude_tags=()))
        if options.compile_backend not in known:
            raise ConfigError(
                f"--compile_backend {options.compile_backend!r} is not known to torch here; name one of "
                f"{', '.join(known)}, or install the plugin that brings it."
            )
    else:
        from torch._inductor import list_mode_options

        modes = list(list_mode_options())
        if options.compile_mode not in modes:
            raise ConfigError(f"--compile_mode {options.compile_mode!r} is none of {', '.join(modes)}.")


def _is_inside(inner: nn.Module, outer: nn.Module) -> bool:
    return inner is not outer and any(module is inner for module in outer.modules())
