"""Says in words when a run goes wrong, from the rows of its log.

A rule looks at one row after the other and answers with a sentence when something is the matter. The rules for
self-supervised pretraining know how such runs die: the code book shrinks to one entry, the loss stands where guessing
puts it, or the target is the same everywhere.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from toolkit.errors import ConfigError, DivergenceError

EARLY_SHARE = 0.2
"""Part of a short run after which its rules speak, however many updates they would wait in a long one."""

PERFECT = 0.9999
"""From here on an accuracy counts as 1."""


class Rule(Protocol):
    """One thing that can go wrong."""

    def look(self, row: Mapping[str, Any]) -> str | None:
        """A sentence when ``row`` shows it, else None. Rows without its values are passed over."""


class LowPerplexity:
    """The quantizer uses hardly more than one entry of each code book.

    Arguments
    ---------
    key : name of the perplexity in the rows, the sum over code books (so it is ``num_groups`` at its lowest); rows may
        also have each one alone, as ``<key>_group0`` and so on (1 at its lowest).
    num_groups : number of code books.
    margin : warn below ``num_groups * margin``, and below ``margin`` for one alone.
    after_update : not before, or in a short run not in its first fifth; a short dip early in the warm-up is usual.

    Example
    -------
    >>> LowPerplexity(after_update=0).look({"update": 900, "code_perplexity": 2.1})[:47]
    'code_perplexity is 2.1, and 2 is its lowest: on'
    """

    def __init__(
        self, *, key: str = "code_perplexity", num_groups: int = 2, margin: float = 1.5, after_update: int = 1000
    ) -> None:
        self.key, self.num_groups, self.margin, self.after_update = key, num_groups, margin, after_update

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        if _is_early(row, self.after_update):
            return None
        lowest = {self.key: self.num_groups} | {f"{self.key}_group{group}": 1 for group in range(self.num_groups)}
        low = [name for name, floor in lowest.items() if _is_number(row.get(name)) and row[name] <= floor * self.margin]
        if not low:
            return None
        name = low[0]
        return (
            f"{name} is {row[name]:.3g}, and {lowest[name]} is its lowest: one entry of a code book stands for "
            "everything (collapse); start again with a lower rate, a longer warm-up or a larger effective batch."
        )


class StuckAtChance:
    """The loss stands at what guessing among all candidates gives.

    Arguments
    ---------
    key : name of the loss in nats.
    num_candidates : the true target and its negatives: 101 for wav2vec 2.0.
    tolerance : nats around ``log(num_candidates)``.
    patience : rows in a row.
    after_update : not before.

    Example
    -------
    >>> rule = StuckAtChance(patience=2, after_update=0)
    >>> rows = [{"update": update, "contrastive": 4.615} for update in (1, 2)]
    >>> [rule.look(row) is not None for row in rows]
    [False, True]
    """

    def __init__(
        self,
        *,
        key: str = "contrastive",
        num_candidates: int = 101,
        tolerance: float = 0.02,
        patience: int = 10,
        after_update: int = 1000,
    ) -> None:
        self.key, self.chance, self.candidates = key, math.log(num_candidates), num_candidates
        self.tolerance, self.patience, self.after_update = tolerance, patience, after_update
        self._rows = 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get(self.key)
        if not _is_number(value) or _is_early(row, self.after_update):
            return None
        self._rows = self._rows + 1 if abs(value - self.chance) <= self.tolerance else 0
        if self._rows < self.patience:
            return None
        return (
            f"{self.key} stands at {value:.3f}, which is log({self.candidates}), the loss of guessing, for "
            f"{self._rows} rows: nothing is learned; check the learning rate, and that the audio is not silence."
        )


class RepeatedValue:
    """A value is exactly the same row after row: the model's output no longer depends on its input.

    Arguments
    ---------
    key : which value.
    patience : rows in a row.

    Example
    -------
    >>> rule = RepeatedValue(patience=3)
    >>> [rule.look({"update": update, "loss": 1.5}) is not None for update in (1, 2, 3)]
    [False, False, True]
    """

    def __init__(self, *, key: str = "loss", patience: int = 5) -> None:
        if patience < 2:
            raise ConfigError(f"patience of RepeatedValue is {patience}, expected 2 or more.")
        self.key = key
        self._last: deque[float] = deque(maxlen=patience)

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get(self.key)
        if not _is_number(value):
            return None
        self._last.append(value)
        if len(self._last) < (self._last.maxlen or 0) or len(set(self._last)) > 1:
            return None
        return (
            f"{self.key} has been exactly {value:.6g} for {len(self._last)} rows: the output no longer depends on the "
            "input; check the learning rate, the data, and whether everything is frozen."
        )


class GradNormRange:
    """The norm of the gradient leaves the range in which a run is healthy.

    Arguments
    ---------
    low, high : the range; pretraining of wav2vec 2.0 feels well between 0.1 and 10 or so, 0.5 to 2 being ideal.
    patience : rows in a row.
    after_update : not before; the first updates may be wild.

    Example
    -------
    >>> GradNormRange(low=0.01, high=10, patience=1, after_update=0).look({"update": 5, "grad_norm": 50.0})[:15]
    'grad_norm is 50'
    """

    def __init__(
        self, *, low: float = 1e-3, high: float = 100.0, patience: int = 5, after_update: int = 100
    ) -> None:
        if not 0 <= low < high:
            raise ConfigError(f"GradNormRange has low {low} and high {high}, expected 0 <= low < high.")
        self.low, self.high, self.patience, self.after_update = low, high, patience, after_update
        self._rows = 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get("grad_norm")
        if not _is_number(value) or _is_early(row, self.after_update):
            return None
        self._rows = 0 if self.low <= value <= self.high else self._rows + 1
        if self._rows < self.patience:
            return None
        advice = (
            "the gradient has died away; look for a collapse or a rate of 0"
            if value < self.low
            else "the run may be about to diverge; lower the learning rate or set max_grad_norm"
        )
        where = f"outside {self.low:g} to {self.high:g}" if math.isfinite(self.high) else f"below {self.low:g}"
        return f"grad_norm is {value:.3g}, {where} for {self._rows} rows: {advice}."


class GradNormJump:
    """The norm of the gradient is far above what this run has had so far.

    What is usual differs from task to task (a CTC loss is a sum over an utterance, and norms of hundreds are healthy
    then), so the run is compared with itself.

    Arguments
    ---------
    factor : how many times the median of all rows so far is too much.
    patience : rows in a row.
    after_rows : rows to compare with, at least.

    Example
    -------
    >>> rule = GradNormJump(patience=1, after_rows=3)
    >>> norms = (700.0, 650.0, 720.0, 9000.0)
    >>> [rule.look({"update": 50 * place, "grad_norm": norm}) is not None for place, norm in enumerate(norms)]
    [False, False, False, True]
    """

    def __init__(self, *, factor: float = 10.0, patience: int = 5, after_rows: int = 20) -> None:
        if factor <= 1 or after_rows < 1:
            raise ConfigError(
                f"GradNormJump has factor {factor} and after_rows {after_rows}, expected a factor above 1 and at "
                "least 1 row."
            )
        self.factor, self.patience, self.after_rows = factor, patience, after_rows
        self._sorted: list[float] = []
        self._rows = 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get("grad_norm")
        if not _is_number(value):
            return None
        usual = self._sorted[len(self._sorted) // 2] if self._sorted else value
        is_jump = len(self._sorted) >= self.after_rows and value > self.factor * usual
        self._rows = self._rows + 1 if is_jump else 0
        # High rows too: where a higher norm is here to stay (layers thawed, say), it becomes the usual one.
        bisect.insort(self._sorted, value)
        if self._rows < self.patience or not is_jump:
            return None
        return (
            f"grad_norm is {value:.3g}, more than {self.factor:g} times its median so far ({usual:.3g}) for "
            f"{self._rows} rows: the run may be about to diverge; lower the learning rate or max_grad_norm."
        )


class UndecidedQuantizer:
    """The quantizer takes all entries alike for every frame: its mean softmax is even, and stays so.

    Arguments
    ---------
    num_codes : entries of each code book.
    num_groups : code books; ``num_groups * num_codes`` is the perplexity at its highest.
    key : name of the perplexity of the mean softmax.
    share : from this part of the highest value on it counts as highest.
    patience : rows in a row.
    after_update : not before; an even softmax is where training begins.

    Example
    -------
    >>> rule = UndecidedQuantizer(num_codes=320, patience=1, after_update=0)
    >>> rule.look({"update": 900, "prob_perplexity": 639.9})[:51]
    'prob_perplexity is 640, and 640 is its highest, for'
    """

    def __init__(
        self,
        *,
        num_codes: int = 320,
        num_groups: int = 2,
        key: str = "prob_perplexity",
        share: float = 0.999,
        patience: int = 10,
        after_update: int = 1000,
    ) -> None:
        self.highest, self.key, self.share = num_groups * num_codes, key, share
        self.patience, self.after_update = patience, after_update
        self._rows = 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get(self.key)
        if not _is_number(value) or _is_early(row, self.after_update):
            return None
        self._rows = self._rows + 1 if value >= self.share * self.highest else 0
        if self._rows < self.patience:
            return None
        return (
            f"{self.key} is {value:.3g}, and {self.highest} is its highest, for {self._rows} rows: the quantizer "
            "decides nothing; raise the learning rate, or check that the audio is not silence."
        )


class PerfectAccuracy:
    """Every masked frame is told from its negatives: the targets are equal, and so there is nothing to tell.

    Arguments
    ---------
    key : name of the accuracy (0 to 1).
    patience : rows in a row.
    after_update : not before.

    Example
    -------
    >>> rule = PerfectAccuracy(patience=2, after_update=0)
    >>> [rule.look({"update": update, "accuracy": 1.0}) is not None for update in (1, 2)]
    [False, True]
    """

    def __init__(self, *, key: str = "accuracy", patience: int = 3, after_update: int = 0) -> None:
        self.key, self.patience, self.after_update = key, patience, after_update
        self._rows = 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        value = row.get(self.key)
        if not _is_number(value) or _is_early(row, self.after_update):
            return None
        self._rows = self._rows + 1 if value >= PERFECT else 0
        if self._rows < self.patience:
            return None
        return (
            f"{self.key} is {value:.6g} for {self._rows} rows: all targets are equal (collapse), so that any answer "
            "is right; start again with a lower rate, a longer warm-up or a larger effective batch."
        )


class CollapsedVariance:
    """data2vec's targets or predictions have become the same at every position: a warning first, then the run's end.

    The limits and when they end a run are fairseq's.

    Arguments
    ---------
    limits : name of a deviation in the rows, and what it has to stay above.
    after_update : no warning before; small deviations are where training begins.
    stop_after : from this update on a value below its limit ends the run.

    Raises
    ------
    DivergenceError : from ``look``, below a limit after ``stop_after``.

    Example
    -------
    >>> rule = CollapsedVariance(after_update=100)
    >>> rule.look({"update": 2000, "target_var": 0.05, "pred_var": 0.2})[:42]
    'target_var is 0.05, below 0.1: the targets'
    """

    def __init__(
        self, *, limits: Mapping[str, float] | None = None, after_update: int = 1000, stop_after: int = 5000
    ) -> None:
        self.limits = dict({"target_var": 0.1, "pred_var": 0.01} if limits is None else limits)
        self.after_update, self.stop_after = after_update, stop_after

    def look(self, row: Mapping[str, Any]) -> str | None:
        """See `Rule`."""
        if _is_early(row, self.after_update):
            return None
        low = [name for name, limit in self.limits.items() if _is_number(row.get(name)) and row[name] < limit]
        if not low:
            return None
        name = low[0]
        what = "targets are" if name.startswith("target") else "predictions are"
        sentence = (
            f"{name} is {row[name]:.3g}, below {self.limits[name]:g}: the {what} nearly the same everywhere "
            "(collapse); start again with a lower rate, a longer warm-up or a slower teacher (ema_decay)."
        )
        if row["update"] > self.stop_after:
            raise DivergenceError(f"after update {row['update']} {sentence}")
        return sentence


class HealthMonitor:
    """Asks its rules at every row of the log and repeats a warning only after a while.

    Arguments
    ---------
    rules : what to look for; None = a repeated loss, and a gradient that dies away or grows far above the usual.
    repeat_rows : a rule that keeps warning is heard again after so many rows.

    Example
    -------
    >>> monitor = HealthMonitor([RepeatedValue(patience=2)])
    >>> [len(monitor.check({"update": update, "loss": 0.5})) for update in (1, 2, 3)]
    [0, 1, 0]
    """

    def __init__(self, rules: Sequence[Rule] | None = None, *, repeat_rows: int = 50) -> None:
        usual = (RepeatedValue(), GradNormRange(high=math.inf), GradNormJump())
        self.rules: tuple[Rule, ...] = usual if rules is None else tuple(rules)
        self.repeat_rows = repeat_rows
        self.warnings = 0
        self._quiet = [0] * len(self.rules)

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """The sentences that ``row`` (with ``update`` and the averages of the metrics) gives rise to."""
        sentences = []
        for index, rule in enumerate(self.rules):
            sentence = rule.look(row)
            self._quiet[index] = max(0, self._quiet[index] - 1) if sentence else 0
            if sentence and self._quiet[index] == 0:
                sentences.append(sentence)
                self._quiet[index] = self.repeat_rows
        self.warnings += len(sentences)
        return sentences


def pretraining_health(
    *, num_groups: int = 2, num_codes: int = 320, num_candidates: int = 101, after_update: int = 1000
) -> HealthMonitor:
    """The monitor for wav2vec 2.0 pretraining: rows hold ``contrastive``, ``accuracy``, both perplexities, the norm.

    Arguments
    ---------
    num_groups, num_codes : code books, and entries of each.
    num_candidates : targets to choose from, the true one included.
    after_update : the warm-up, in which nothing is said about perplexity and loss.

    Example
    -------
    >>> len(pretraining_health().rules)
    7
    """
    perplexities = [
        LowPerplexity(key=key, num_groups=num_groups, after_update=after_update)
        for key in ("code_perplexity", "prob_perplexity")
    ]
    stuck = StuckAtChance(num_candidates=num_candidates, after_update=after_update)
    undecided = UndecidedQuantizer(num_codes=num_codes, num_groups=num_groups, after_update=after_update)
    norm = GradNormRange(after_update=after_update)
    return HealthMonitor([*perplexities, undecided, stuck, PerfectAccuracy(), RepeatedValue(), norm])


def data2vec_health(*, after_update: int = 1000) -> HealthMonitor:
    """The monitor for data2vec: rows hold ``target_var``, ``pred_var``, the loss and the norm.

    Arguments
    ---------
    after_update : the warm-up, in which nothing is said about deviations and the norm.

    Example
    -------
    >>> len(data2vec_health().rules)
    3
    """
    variance, norm = CollapsedVariance(after_update=after_update), GradNormRange(after_update=after_update)
    return HealthMonitor([variance, RepeatedValue(), norm])


def _is_early(row: Mapping[str, Any], after_update: int) -> bool:
    """Whether a row is of the first ``after_update`` updates; in a short run, of its first fifth."""
    return row["update"] < min(after_update, EARLY_SHARE * row.get("total_updates", math.inf))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
