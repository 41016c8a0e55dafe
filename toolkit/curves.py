"""The curves of one run, or of several beside each other: a picture, and a table in Markdown.

    python -m toolkit curves results/w2v2_tiny [results/other ...] --output docs/curves.png

reads ``metrics.jsonl`` of each run folder. The table lands beside the picture under the same name with ``.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import ConfigError, run_main

FIRST = (
    "loss", "contrastive", "accuracy", "code_perplexity", "prob_perplexity", "diversity",
    "feature_penalty", "wer", "cer", "grad_norm", "lr", "throughput",
)  # fmt: skip
"""The order in which readers look for curves; others follow by name."""

BOOKKEEPING = {
    "update", "total_updates", "epoch", "elapsed_seconds", "audio_seconds", "text_tokens", "stage", "micro_batches",
}  # fmt: skip
"""Keys of a row that are no curve."""

SPREAD = ("grad_norm", "loss")
"""Metrics that are drawn on a logarithmic axis when they range over more than a factor of 100."""

MAX_PANELS = 12
SMOOTH_FROM = 200  # points; above it the raw curve goes pale under its running mean


@dataclass(frozen=True)
class RunCurves:
    """What one run logged.

    Arguments
    ---------
    name : what the legend calls it.
    series : by (stage, metric), two arrays of one length: updates (int64) and values (float64, finite).
    """

    name: str
    series: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of all stages, in reading order."""
        names = {metric for _, metric in self.series}
        return tuple(name for name in FIRST if name in names) + tuple(sorted(names - set(FIRST)))

    @property
    def stages(self) -> tuple[str, ...]:
        """train, valid, test: those that are there."""
        return tuple(stage for stage in ("train", "valid", "test") if any(key[0] == stage for key in self.series))


def read_curves(path: Path | str, *, name: str | None = None) -> RunCurves:
    """Read a run folder, or a ``metrics.jsonl`` itself.

    A row without ``stage`` counts as training. A last line that a kill cut short is passed over; of rows for the
    same update the later one counts (a resumed run).

    Raises
    ------
    ConfigError : no such file, no rows, or a line that is no JSON object.

    Example
    -------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = file.write_text('{"stage": "train", "update": 20, "loss": 2.0}\\n{"update": 40, "loss": 1.5}\\n')
    >>> read_curves(file, name="demo").series["train", "loss"][1].tolist()
    [2.0, 1.5]
    """
    given = Path(path)
    file = given / "metrics.jsonl" if given.is_dir() else given
    if not file.is_file():
        raise ConfigError(f"{given} has no metrics.jsonl; give the output_folder of a run, or the file itself.")
    points: dict[tuple[str, str], dict[int, float]] = {}
    for row in _rows(file):
        stage, update = str(row.get("stage", "train")), int(row["update"])
        for metric, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if metric not in BOOKKEEPING and number and math.isfinite(value):
                points.setdefault((stage, metric), {})[update] = float(value)
    if not points:
        raise ConfigError(f"{file} holds no numbers yet; the run has not logged anything.")
    series = {
        key: (np.array(sorted(values), dtype=np.int64), np.array([values[update] for update in sorted(values)]))
        for key, values in points.items()
    }
    return RunCurves(name or file.resolve().parent.name, series)


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text ({error.reason}); is this the metrics of a run?") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ConfigError(f"{file}, line {number} is no JSON object ({error}); remove that line.") from error
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            raise ConfigError(f"{file}, line {number} has no whole number 'update'; is this the metrics of a run?")
        rows.append(row)
    return rows


def chosen_metrics(runs: Sequence[RunCurves], metrics: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics to show: those asked for, or the first twelve that any run has.

    Raises
    ------
    ConfigError : a metric asked for is in no run.
    """
    union = {metric for run in runs for metric in run.metrics}
    there = tuple(name for name in FIRST if name in union) + tuple(sorted(union - set(FIRST)))
    if not metrics:
        return there[:MAX_PANELS]
    unknown = [name for name in metrics if name not in union]
    if unknown:
        raise ConfigError(f"no run logged {', '.join(unknown)}; there is {', '.join(there)}.")
    return tuple(metrics)


def draw_picture(
    runs: Sequence[RunCurves],
    output: Path | str,
    *,
    metrics: Sequence[str] | None = None,
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Draw one panel for each metric, one color for each run; validation as marked dashes.

    Arguments
    ---------
    runs : as `read_curves` gives them.
    output : the picture; its suffix (png, pdf, svg) decides the format.
    metrics : which panels, in this order; None takes all, twelve at most.
    references : a value by metric that is drawn as a dotted line, such as chance.

    Raises
    ------
    ConfigError : matplotlib is not installed, it cannot write such a picture, or a metric is in no run.
    """
    output = Path(output)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib; run `pip install matplotlib`.") from error
    shown = chosen_metrics(runs, metrics)
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix and output.suffix[1:].lower() not in formats:
        raise ConfigError(f"{output} cannot be drawn; end its name with one of .{', .'.join(sorted(formats))}.")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for panel, metric in zip(panels, shown, strict=False):
        _draw_panel(panel, runs, metric, (references or {}).get(metric))
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    if title:
        figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output


def _draw_panel(panel: Any, runs: Sequence[RunCurves], metric: str, reference: float | None) -> None:
    everything = []
    for place, run in enumerate(runs):
        color = f"C{place}"
        for stage in run.stages:
            if (stage, metric) not in run.series:
                continue
            updates, values = run.series[stage, metric]
            everything.append(values)
            label = f"{run.name} {stage}" if len(runs) > 1 else stage
            if stage == "train":
                if len(values) >= SMOOTH_FROM:
                    panel.plot(updates, values, color=color, alpha=0.25, linewidth=0.8)
                    updates, values = running_mean(updates, values)
                panel.plot(updates, values, color=color, label=label, linewidth=1.3)
            else:
                style = {"valid": ("--", "o"), "test": ("", "D")}[stage]
                face = "white" if stage == "valid" else color
                panel.plot(
                    updates, values, linestyle=style[0], marker=style[1], markersize=3.5, markerfacecolor=face,
                    color=color, label=label, linewidth=1.0,
                )  # fmt: skip
    if reference is not None:
        panel.axhline(reference, color="gray", linestyle=":", linewidth=1.0)
    values = np.concatenate(everything) if everything else np.array([])
    if metric.endswith(SPREAD) and len(values) and values.min() > 0 and values.max() > 100 * values.min():
        panel.set_yscale("log")
    panel.set_title(metric, fontsize=10)
    panel.set_xlabel("update", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)


def running_mean(updates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a fiftieth of the curve, each at the middle of its window.

    Example
    -------
    >>> updates, means = running_mean(np.arange(100), np.tile([1.0, 3.0], 50))
    >>> len(updates) == len(means) == 99, means[0]
    (True, np.float64(2.0))
    """
    window = max(2, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    start = (window - 1) // 2
    means = (sums[window:] - sums[:-window]) / window
    return updates[start : start + len(means)], means


def markdown_table(run: RunCurves, stage: str, *, metrics: Sequence[str] | None = None, num_rows: int = 12) -> str:
    """A table with one line for each of ``num_rows`` updates spread over the run, the first and the last among them."""
    shown = [name for name in chosen_metrics([run], metrics) if (stage, name) in run.series]
    updates = np.unique(np.concatenate([run.series[stage, name][0] for name in shown]))
    picked = updates[np.unique(np.linspace(0, len(updates) - 1, num_rows).round().astype(int))]
    lines = ["| update | " + " | ".join(shown) + " |", "|---:|" + "---:|" * len(shown)]
    for update in picked:
        cells = []
        for name in shown:
            at, values = run.series[stage, name]
            place = int(np.searchsorted(at, update))
            cells.append(f"{values[place]:.4g}" if place < len(at) and at[place] == update else "")
        lines.append(f"| {update} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(runs: Sequence[RunCurves], output: Path | str, *, metrics: Sequence[str] | None = None) -> Path:
    """All runs' tables, one for each stage, as a Markdown file."""
    parts = []
    for run in runs:
        for stage in run.stages:
            own = [name for name in chosen_metrics(runs, metrics) if (stage, name) in run.series]
            if own:
                parts.append(f"## {run.name}: {stage}\n\n{markdown_table(run, stage, metrics=own)}\n")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(parts), encoding="utf-8")
    return output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m toolkit curves``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs (NAME=FOLDER names one)")
    parser.add_argument("--output", default="curves.png", help="the picture: .png, .pdf or .svg")
    parser.add_argument("--metrics", nargs="+", help="which curves, in this order; default: all, twelve at most")
    parser.add_argument(
        "--reference", nargs="+", default=[], metavar="METRIC=VALUE", help="a dotted line, such as accuracy=0.0099"
    )
    parser.add_argument("--title", default="", help="above the picture")


def run_command(arguments: argparse.Namespace) -> int:
    """Do what ``python -m toolkit curves`` was asked."""
    references = {}
    for text in arguments.reference:
        metric, _, value = text.partition("=")
        try:
            references[metric] = float(value)
        except ValueError as error:
            raise ConfigError(f"--reference {text!r}: write METRIC=NUMBER, such as accuracy=0.0099.") from error
    runs = []
    for text in arguments.runs:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        runs.append(read_curves(folder, name=name or None))
    output = Path(arguments.output)
    print(draw_picture(runs, output, metrics=arguments.metrics, references=references, title=arguments.title))
    print(write_tables(runs, output.with_suffix(".md"), metrics=arguments.metrics))
    return 0


def main(argv: Sequence[str]) -> int:
    """The command line by itself: ``python -m toolkit.curves``."""
    parser = argparse.ArgumentParser(prog="python -m toolkit curves", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
