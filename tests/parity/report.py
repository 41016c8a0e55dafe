"""Ours against what was recorded, name by name, and the table of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.parity.recording import Recording, Tolerance

EQUAL = "equal"
"""The kind of everything that must be the same: whole numbers, masks, codes, lists of names."""

GROUPS = ("in", "rand", "ema", "mid", "out", "full", "train", "unmasked", "eval", "grad_frozen", "grad")
"""Beginnings of recorded names, in the order in which they are printed."""


@dataclass(frozen=True)
class Value:
    """One quantity as we computed it.

    ours : a tensor, a number, or a collection of words.
    kind : of tolerance: a key of the recording's tolerances, or EQUAL.
    view : brings the recorded tensor to the form of ours (frames without padding, batch first).
    limit : a limit of its own for the absolute difference, in place of the kind's.
    """

    ours: Any
    kind: str = "activations"
    view: Callable[[Tensor], Tensor] | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; ``passed`` is False where something is outside, or was not compared."""

    name: str
    absolute: float | None
    relative: float | None
    limit: str
    verdict: str
    passed: bool


@dataclass
class Measured:
    """Everything a case can say, by recorded name, and the names that went in."""

    values: dict[str, Value] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    others: list[tuple[str, Value, Any]] = field(default_factory=list)

    def add(self, name: str, ours: Any, kind: str = "activations", **options: Any) -> None:
        """Say a tensor."""
        self.values[name] = Value(ours, kind, **options)

    def scalar(self, path: str, ours: Any, kind: str = "loss", **options: Any) -> None:
        """Say a scalar of the section ``scalars``."""
        self.values["scalars." + path] = Value(ours, kind, **options)

    def beside(self, name: str, ours: Any, theirs: Any, kind: str) -> None:
        """Say something that is recorded elsewhere: in the checkpoint itself."""
        self.others.append((name, Value(ours, kind), theirs))


def compare_all(recording: Recording, measured: Measured, tolerances: Mapping[str, Tolerance]) -> list[Row]:
    """A row for every recorded tensor, in the order of the forward pass, and for every scalar."""
    said = {name: place for place, name in enumerate(measured.values)}

    def place(name: str) -> tuple[int, int, str]:
        group = re.sub(r"^ema\d+b?$", "ema", name.split(".")[0])
        return (GROUPS.index(group) if group in GROUPS else len(GROUPS), said.get(name, len(said)), name)

    rows = []
    tensors = [(name, recording.tensors[name]) for name in sorted(recording.tensors, key=place)]
    for name, theirs in [*tensors, *recording.scalars.items()]:
        if name in measured.inputs:
            rows.append(Row(name, None, None, "", "went in", True))
        elif name not in measured.values:
            rows.append(Row(name, None, None, "", "NOT COMPARED", False))
        else:
            rows.append(compare_one(name, measured.values[name], theirs, tolerances))
    return rows + [compare_one(name, value, theirs, tolerances) for name, value, theirs in measured.others]


def compare_one(name: str, value: Value, theirs: Any, tolerances: Mapping[str, Tolerance]) -> Row:
    """One quantity against the recorded one."""
    if value.ours is None or theirs is None:
        same = value.ours is theirs
        return Row(name, float(not same), None, EQUAL, "ok" if same else f"NO NUMBER ({theirs!r})", same)
    if isinstance(theirs, (str, list)) or isinstance(value.ours, (set, frozenset, list)):
        return _compare_words(name, value, theirs)
    try:
        theirs = torch.as_tensor(theirs)
        if value.view is not None:
            theirs = value.view(theirs)
    except (IndexError, RuntimeError, TypeError) as error:
        return Row(name, None, None, "", f"OTHER SHAPE ({str(error).splitlines()[0]})", False)
    ours = torch.as_tensor(value.ours).detach().cpu()
    if ours.shape != theirs.shape:
        return Row(name, None, None, "", f"OTHER SHAPE ({tuple(ours.shape)}, theirs {tuple(theirs.shape)})", False)
    if value.kind == EQUAL:
        return _compare_equal(name, ours, theirs)
    tolerance = Tolerance(f"atol {value.limit:.1e}", absolute=value.limit) if value.limit is not None else None
    return _compare_near(name, ours.double(), theirs.double(), tolerance or tolerances[value.kind])


def _compare_words(name: str, value: Value, theirs: Any) -> Row:
    if not isinstance(value.ours, (set, frozenset, list)) or not isinstance(theirs, list):
        return Row(name, None, None, EQUAL, f"NO NUMBER ({theirs!r})", False)
    if isinstance(value.ours, list):
        different = sum(a != b for a, b in zip(value.ours, theirs, strict=False)) + abs(len(value.ours) - len(theirs))
    else:
        different = len(value.ours ^ frozenset(theirs))
    return Row(name, float(different), None, EQUAL, "OTHER NAMES" if different else "ok", not different)


def _compare_equal(name: str, ours: Tensor, theirs: Tensor) -> Row:
    different = int((ours != theirs).sum())
    largest = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
    verdict = f"OUTSIDE ({different} of {ours.numel()} differ)" if different else "ok"
    return Row(name, largest, None, EQUAL, verdict, not different)


def _compare_near(name: str, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> Row:
    """Infinities in the same places, everything else within the tolerance; not a number is never within."""
    infinite = theirs.isinf()
    if not torch.equal(ours.isinf(), infinite) or not torch.equal(ours[infinite], theirs[infinite]):
        count = int((ours.isinf() != infinite).sum())
        return Row(name, math.inf, math.inf, tolerance.text, f"OUTSIDE ({count} infinities elsewhere)", False)
    ours, theirs = ours[~infinite], theirs[~infinite]
    if not theirs.numel():
        return Row(name, 0.0, 0.0, tolerance.text, "ok", True)
    difference, size = (ours - theirs).abs(), theirs.abs()
    allowed = tolerance.absolute + tolerance.relative * size + tolerance.of_largest * size.max()
    outside = int((~(difference <= allowed)).sum())
    absolute, largest = float(difference.max()), float(size.max())
    if math.isnan(float(difference.sum())):
        absolute = math.nan
    relative = absolute / largest if largest else (0.0 if absolute == 0 else math.inf)
    verdict = f"OUTSIDE ({outside} of {theirs.numel()})" if outside else "ok"
    return Row(name, absolute, relative, tolerance.text, verdict, not outside)


def table(rows: list[Row]) -> str:
    """The rows as aligned text; relative means the largest difference over the largest recorded entry."""
    cells = [("recorded", "absolute", "relative", "limit", "")]
    for row in rows:
        numbers = ("" if value is None else f"{value:.1e}" for value in (row.absolute, row.relative))
        cells.append((row.name, *numbers, row.limit, row.verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = []
    for name, absolute, relative, limit, verdict in cells:
        lines.append(
            f"  {name:<{widths[0]}}  {absolute:>{widths[1]}}  {relative:>{widths[2]}}  {limit:<{widths[3]}}  {verdict}"
        )
    return "\n".join(line.rstrip() for line in lines)


def summary(rows: list[Row]) -> str:
    """The counts in one line."""
    compared = [row for row in rows if row.absolute is not None]
    unknown = sum(row.verdict == "NOT COMPARED" for row in rows)
    outside = sum(not row.passed for row in rows) - unknown
    inputs = sum(row.verdict == "went in" for row in rows)
    return f"{len(compared)} compared, {outside} outside, {unknown} not compared, {inputs} went in"
