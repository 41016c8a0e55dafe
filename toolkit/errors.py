"""The errors a user sees: one sentence each, saying what is wrong, where, and what to do.

Every class derives from :class:`ToolkitError`; a script's ``main`` is started through
:func:`run_main`, which prints the sentence without a traceback and returns a non-zero exit code.
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence

USER_ERROR = 2
"""Exit code of a run that ended with a user's error."""

INTERRUPTED = 130
"""Exit code of a run that was stopped with Ctrl-C."""

PIPE_CLOSED = 141
"""Exit code of a command whose reader has gone (``... --help | head``), as if SIGPIPE had ended it."""


class ToolkitError(Exception):
    """Base of all errors whose message is written for the user of a recipe."""


class ConfigError(ToolkitError, ValueError):
    """A YAML file, a command line option or an argument has a wrong name, type or value."""


class ManifestError(ToolkitError, ValueError):
    """A manifest (CSV, JSON, JSONL, tsv) is missing, malformed or changed."""


class AudioError(ToolkitError, ValueError):
    """An audio file is missing, unreadable, empty or of a wrong kind."""


class TokenError(ToolkitError, ValueError):
    """A transcript cannot be turned into tokens, or a token file cannot be read."""


class ModelError(ToolkitError, ValueError):
    """A model's settings do not fit together, or do not fit its input."""


class CheckpointError(ToolkitError, ValueError):
    """A checkpoint or a model folder is missing, truncated, foreign or does not fit."""


class DeviceError(ToolkitError, RuntimeError):
    """A device, a precision or a process group that was asked for is not to be had."""


class TrainingError(ToolkitError, RuntimeError):
    """Training cannot go on: losses not finite, too much bad audio, no data."""


class DivergenceError(TrainingError):
    """Training itself has gone wrong (losses not finite, constant targets): as it stands it is not worth keeping."""


class WorkerError(TrainingError):
    """A process that loads ahead has died."""


def describe_os_error(error: OSError) -> str:
    """One sentence for an operating system error, with the path and what to do."""
    where = f" {error.filename!r}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the device while writing{where}; free some space and run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to use{where}: {os.strerror(error.errno)}; choose another folder or change its rights."
    if error.errno == errno.ENOENT:
        return f"the file or folder{where} does not exist; check the path."
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"the operating system refused to use{where}: {reason}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: the host's (also numpy's and torch's own words) or a device's.

    Example
    -------
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("no such layer"))
    (True, False)
    """
    # By name and words: this module is imported where torch is not needed, and must not load it.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in words or "out of memory" in words)


def describe_out_of_memory(error: BaseException, *, batch: str = "") -> str:
    """One sentence for an error that `is_out_of_memory`, with what to do; ``batch`` says what was worked on.

    Example
    -------
    >>> describe_out_of_memory(MemoryError(), batch="a batch of 2 utterances")[:53]
    'memory ran out at a batch of 2 utterances (MemoryErro'
    """
    first = next(iter(str(error).strip().splitlines()), "")
    first = re.sub(r"^\[enforce fail [^]]*\].*?(?=DefaultCPUAllocator)", "", first)
    # torch goes on about the whole device, and about settings of its allocator.
    first = re.split(r"\.\s+(?=GPU |Of the |Error code|If )", first)[0].rstrip(".")
    where = f" at {batch}" if batch else ""
    return (
        f"memory ran out{where} ({first or type(error).__name__}); lower batch_seconds or batch_tokens "
        "(effective_batch may stay), set gradient_checkpointing to True where the YAML has it, or end what else uses "
        "the memory."
    )


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's ``main(argv)`` and turn a user's error into one line and an exit code.

    Arguments
    ---------
    main : takes the command line without the program's name; returns an exit code or None.
    argv : the command line; None takes ``sys.argv[1:]``.

    Returns
    -------
    The exit code: 0, what ``main`` returned, ``USER_ERROR``, ``INTERRUPTED`` or ``PIPE_CLOSED``. Any other
    exception is a defect of the program and keeps its traceback (set ``TOOLKIT_TRACEBACK=1`` to see it for a user's
    error too).
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = main(arguments) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that has gone can still be met in silence
        return code
    except ToolkitError as error:
        message = str(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            return PIPE_CLOSED
        if error.errno is None:
            raise
        message = describe_os_error(error)
    except KeyboardInterrupt:
        # What is on disk differs from script to script; training itself says where its checkpoint is.
        print("\ninterrupted; the same command goes on from what is already saved, if anything.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = describe_out_of_memory(error)
    if os.environ.get("TOOLKIT_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def _is_reader_gone() -> bool:
    """Whether it is the standard output that nobody reads any more; nothing more is written to it then."""
    try:
        poller = select.poll()
        poller.register(sys.stdout, 0)
        is_gone = any(events & select.POLLERR for _, events in poller.poll(0))
    except (AttributeError, OSError, TypeError, ValueError):  # no such call on this system, or no real output
        return False
    if is_gone:
        # The interpreter flushes once more at its end, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return is_gone
