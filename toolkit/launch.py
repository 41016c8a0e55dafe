"""torchrun with an exit code that a scheduler can act on.

    python -m toolkit.launch --nproc-per-node=8 train.py hparams/NAME.yaml --key value ...

takes torchrun's options. When a run was told to stop (SIGTERM or SIGUSR1, to this process or to any rank) its ranks
save and end with code 75; torchrun itself makes a 1 of that, like of any failure, and knows nothing of SIGUSR1, which
ends it and leaves its ranks alone. Here SIGUSR1 is passed on as SIGTERM, and the code is 75 (130 after Ctrl-C) where
all ranks of this node ended so: one that failed meanwhile, or was killed because it took too long, makes it a 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from toolkit.errors import INTERRUPTED, USER_ERROR

REQUEUE = 75
"""As in `toolkit.training.limits`, which is not loaded here: the launcher stays small beside its ranks."""

ENDED_BY_LAUNCHER = -signal.SIGTERM
"""Code of a rank that was ended because another one had ended."""


def main(argv: Sequence[str]) -> int:
    """Launch, and return the exit code: 0, 75, 130, 2 for wrong options, or 1 after torchrun's own report of what
    failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(list(argv))
    try:
        config, *_ = run.config_from_args(options)
        if config.nproc_per_node < 1:
            raise ValueError("nproc_per_node must be 1 or more")
    except (AssertionError, ValueError) as error:
        print(f"error: torchrun cannot start with these options: {error}.", file=sys.stderr, flush=True)
        return USER_ERROR
    if options.nnodes not in ("1", "1:1"):
        # Ranks that are started again need a store without what the first ones left there. On one node they find one
        # by the count of restarts, and the launcher's store can still be asked when process 0 stands.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    ended = _codes_of_ranks()
    try:
        run.main(list(argv))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (REQUEUE, INTERRUPTED):
            if code in codes and codes <= {code, ENDED_BY_LAUNCHER}:
                return code
        print(error, file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        code = INTERRUPTED if error.sigval == signal.SIGINT else REQUEUE
        others = sorted(set(ended) - {code, 0, -error.sigval, ENDED_BY_LAUNCHER})
        if not others:
            return code
        print(f"error: told to stop, but ranks ended with {', '.join(map(str, others))} and may have saved nothing "
              "(torchrun kills those that take longer than 30 s).", file=sys.stderr, flush=True)  # fmt: skip
        return 1
    return 0


def _codes_of_ranks() -> list[int]:
    """The exit codes of this node's ranks, once torchrun has ended them; it tells nobody those of a run that it was
    told to stop."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    codes: list[int] = []
    close = SubprocessContext.close

    def noted(self: Any, *args: Any, **options: Any) -> None:
        close(self, *args, **options)
        codes[:] = [handler.proc.returncode for handler in self.subprocess_handlers.values()]

    SubprocessContext.close = noted  # type: ignore[method-assign]
    return codes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
