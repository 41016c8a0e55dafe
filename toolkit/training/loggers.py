"""Where a run tells what happens: the console, ``metrics.jsonl``, ``log.txt``, TensorBoard, and plug-ins."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from toolkit.data.units import SECONDS, TOKENS
from toolkit.errors import ConfigError
from toolkit.training.folders import write_atomic

SHOWN_FIRST = ("loss", "lr", "grad_norm")
"""What a line of the console begins with."""

NOT_SHOWN = {"stage", "update", "total_updates", "epoch", "elapsed_seconds", SECONDS.total, TOKENS.total}
"""Keys of a row that a line of the console leaves to the file."""


class Logger(Protocol):
    """What a plug-in has to offer; all of it is called on the main process only."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row: flat, plain values, always with ``stage`` and ``update`` (updates that are complete)."""

    def say(self, sentence: str) -> None:
        """A sentence for people."""

    def rewind(self, update: int) -> None:
        """The run goes on from ``update``: forget the rows behind it."""

    def close(self) -> None:
        """The run is over."""


class JsonLinesLogger:
    """One JSON object a line, flushed at once; numbers that are not finite become null.

    Arguments
    ---------
    path : the file; an existing one is continued.

    Example
    -------
    >>> import tempfile
    >>> logger = JsonLinesLogger(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    >>> logger.log({"stage": "train", "update": 10, "loss": 2.5})
    >>> logger.path.read_text()
    '{"stage": "train", "update": 10, "loss": 2.5}\\n'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Logger`."""
        # Opened for each row: rows are rare, and a rewind or a full disk never meets a stale handle.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _json_value(value) for key, value in row.items()}) + "\n")

    def say(self, sentence: str) -> None:
        """Sentences go elsewhere."""

    def rewind(self, update: int) -> None:
        """Drop the rows behind ``update``, and what is no row: a last line that a kill cut short, damaged lines."""
        if not self.path.exists():
            return
        kept = []
        # Whatever a crash of the machine left in the file: bytes that are no text make a line that is no row.
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            row = _row_of(line)
            if row is not None and row["update"] <= update:
                kept.append(line)
        write_atomic(self.path, "".join(kept))

    def close(self) -> None:
        """Nothing is open."""


class TextLogger:
    """Sentences and rows with the time of day, for ``log.txt``.

    Arguments
    ---------
    path : the file; an existing one is continued.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Logger`."""
        self.say(format_row(row))

    def say(self, sentence: str) -> None:
        """See `Logger`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def rewind(self, update: int) -> None:
        """The text keeps what happened."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardLogger:
    """Curves for TensorBoard, as ``<stage>/<name>`` over updates.

    Arguments
    ---------
    folder : for the event files.

    Raises
    ------
    ConfigError : the package is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard is True, but the package is not installed; run `pip install tensorboard` or leave it out."
            ) from error
        self._make = SummaryWriter
        self._writer: Any = None

    def log(self, row: Mapping[str, Any]) -> None:
        """See `Logger`."""
        if self._writer is None:
            self._writer = self._make(str(self.folder))
        for name, value in row.items():
            if name != "update" and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(f"{row['stage']}/{name}", value, global_step=row["update"])

    def say(self, sentence: str) -> None:
        """Sentences go elsewhere."""

    def rewind(self, update: int) -> None:
        """TensorBoard itself forgets what lies behind the step of a purge."""
        self._writer = self._make(str(self.folder), purge_step=update + 1)

    def close(self) -> None:
        """See `Logger`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Console:
    """A bar with loss, pace and time left on a terminal, plain lines elsewhere.

    Arguments
    ---------
    progressbar : False = plain lines on a terminal too.
    stream : where to write.

    Example
    -------
    >>> console = Console(progressbar=False, stream=sys.stdout)
    >>> console.log({"stage": "train", "update": 50, "total_updates": 200, "loss": 1.25, "throughput": 105.0})
    update 50/200: loss 1.25, 105 audio s/s
    """

    def __init__(self, *, progressbar: bool = True, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.has_bar = progressbar and self.stream.isatty()
        self._bar: Any = None

    def say(self, sentence: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(sentence, file=self.stream)
        else:
            print(sentence, file=self.stream, flush=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Train rows move the bar (or make a line); other rows always make a line."""
        if row["stage"] == "train" and self._bar is not None:
            self._bar.set_postfix_str(", ".join(_parts(row)[:3] + _pace(row)), refresh=False)
        else:
            self.say(format_row(row))

    def progress(self, update: int, total_updates: int) -> None:
        """The bar stands at ``update`` of ``total_updates``."""
        if not self.has_bar:
            return
        if self._bar is None:
            self._bar = tqdm(initial=update, unit="update", dynamic_ncols=True, file=self.stream, mininterval=0.5)
        self._bar.total = total_updates
        self._bar.update(update - self._bar.n)

    def rewind(self, update: int) -> None:
        """The console keeps what it showed."""

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Loggers:
    """Several loggers as one; with none of them (other ranks) everything is silent.

    Arguments
    ---------
    loggers : who gets every row and sentence.
    console : gets them too, and the progress.
    """

    def __init__(self, loggers: Iterable[Logger] = (), console: Console | None = None) -> None:
        self.console = console
        self.loggers: tuple[Logger, ...] = (*loggers, *(() if console is None else (console,)))

    def log(self, row: Mapping[str, Any]) -> None:
        """One row to all."""
        for logger in self.loggers:
            logger.log(row)

    def say(self, sentence: str) -> None:
        """One sentence to all."""
        for logger in self.loggers:
            logger.say(sentence)

    def progress(self, update: int, total_updates: int) -> None:
        """Move the bar."""
        if self.console is not None:
            self.console.progress(update, total_updates)

    def pause(self) -> None:
        """Take the bar away until the next ``progress``."""
        if self.console is not None:
            self.console.close()

    def rewind(self, update: int) -> None:
        """Forget the rows behind ``update``."""
        for logger in self.loggers:
            logger.rewind(update)

    def close(self) -> None:
        """The run is over."""
        for logger in self.loggers:
            logger.close()


def format_row(row: Mapping[str, Any]) -> str:
    """A row as a line for people.

    Example
    -------
    >>> format_row({"stage": "valid", "update": 100, "loss": 0.5, "wer": 12.345})
    'valid at update 100: loss 0.5, wer 12.35'
    """
    total = f"/{row['total_updates']}" if row.get("total_updates") else ""
    place = f"update {row['update']}{total}" if row["stage"] == "train" else f"{row['stage']} at update {row['update']}"
    return f"{place}: {', '.join(_parts(row) + _pace(row))}"


def _parts(row: Mapping[str, Any]) -> list[str]:
    hidden = NOT_SHOWN | {"throughput", "padding_share", "loader_wait_share"}
    names = [name for name in SHOWN_FIRST if name in row] + [name for name in row if name not in SHOWN_FIRST]
    return [f"{name} {_short(row[name])}" for name in names if name not in hidden]


def _pace(row: Mapping[str, Any]) -> list[str]:
    unit = TOKENS if TOKENS.total in row else SECONDS
    pace = [f"{_short(row['throughput'])} {unit.pace}"] if "throughput" in row else []
    for name, words in (("padding_share", "padding"), ("loader_wait_share", "waiting for data")):
        if row.get(name, 0.0) >= 0.01:
            pace.append(f"{words} {100 * row[name]:.0f} %")
    return pace


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row_of(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("update"), int)
    return row if is_row and line.endswith("\n") else None
