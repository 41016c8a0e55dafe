"""Compares a checkpoint's numbers with those that the original implementation recorded from it.

Run: python tests/parity/compare.py FOLDER... [--plain] [--precision bf16] [--compile] [--device cuda]

A folder holds checkpoint.pt, tensors.safetensors (inputs ``in.*``, random choices ``rand.*``, results) and meta.json
(scalars, tolerances), see tests/fixtures/fairseq_models/README.md. Everything recorded is compared, or the command
fails: exit code 0 means that each name was compared and is within its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

from tests.parity.case_ctc import compare_ctc  # noqa: E402
from tests.parity.case_data2vec import compare_audio, compare_text  # noqa: E402
from tests.parity.case_pretraining import compare_pretraining  # noqa: E402
from tests.parity.recording import CHECKPOINT, META, Recording, RecordingError, Tolerance, read_recording  # noqa: E402
from tests.parity.report import Measured, Row, compare_all, summary, table  # noqa: E402
from tests.parity.running import Setup  # noqa: E402
from toolkit.errors import ToolkitError  # noqa: E402
from toolkit.models.convert import load_pretrained  # noqa: E402
from toolkit.models.ctc import CTCModel  # noqa: E402
from toolkit.models.data2vec import Data2VecAudio, Data2VecText  # noqa: E402
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining  # noqa: E402
from toolkit.training.devices import resolve_device  # noqa: E402

KINDS: dict[str, tuple[type[nn.Module], Callable[[Recording, nn.Module, Setup], Measured]]] = {
    "wav2vec2": (Wav2Vec2Pretraining, compare_pretraining),
    "wav2vec_ctc": (CTCModel, compare_ctc),
    "data2vec_audio": (Data2VecAudio, compare_audio),
    "data2vec_text": (Data2VecText, compare_text),
}
"""By the model's name in the recorded settings: the model it must load as, and the case."""

BF16 = {
    "activations": "rtol 5e-2 of max",
    "logits": "rtol 5e-2 of max",
    "gradients": "rtol 2e-1 of max",
    "loss": "rtol 2e-2",
    "ema": "atol 1e-6",
    "schedule": "rtol 1e-12",
}
"""bfloat16 keeps 8 bits of a number, 4e-3 of it; what adds up over the layers is stated here, not in meta.json."""


def kind_of(recording: Recording) -> str:
    """The model's name in the recorded settings."""
    meta = recording.meta
    settings = meta.get("ctc_model_config") or meta.get("model_config")
    kind = settings.get("_name") if isinstance(settings, dict) else None
    if kind not in KINDS:
        raise RecordingError(
            f"{recording.folder / META}: the model is {kind!r}, which is no kind of case known here; known are "
            f"{', '.join(KINDS)}."
        )
    return kind


def compare_folder(folder: str, setup: Setup, only_outside: bool = False) -> bool:
    """Compare one folder and print its table; True if everything was compared and is within its tolerance."""
    recording = read_recording(folder)
    kind = kind_of(recording)
    path = recording.folder / CHECKPOINT
    model, info = load_pretrained(path, device=setup.device.torch_device)
    expected, compare = KINDS[kind]
    if not isinstance(model, expected):
        raise RecordingError(f"{path}: {META} says {kind}, but the file holds a {type(model).__name__}.")
    print(
        f"{folder}: {kind}, {info.source}, {setup.device.name}, {setup.precision}"
        f"{', plain' if setup.plain else ''}{', compiled' if setup.compiled else ''}"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        measured = compare(recording, model, setup)
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, ToolkitError):
            raise
        words = str(error).strip().splitlines()[0]
        raise RecordingError(
            f"{folder}: the model does not run on the recorded inputs ({type(error).__name__}: {words}); are the files "
            "of one recording?"
        ) from error
    rows = compare_all(recording, measured, _tolerances(recording, setup))
    rows += [_other_file(other, before) for other in sorted(recording.folder.glob("checkpoint_*.pt"))]
    shown = [row for row in rows if not row.passed] if only_outside else rows
    if shown:
        print(table(shown))
    print(f"  {summary(rows)}")
    return all(row.passed for row in rows)


def _tolerances(recording: Recording, setup: Setup) -> Mapping[str, Tolerance]:
    if setup.precision == "fp32":
        return recording.tolerances
    return {kind: Tolerance.parse(text) for kind, text in BF16.items()}


def _other_file(path: Path, expected: Mapping[str, torch.Tensor]) -> Row:
    """A second file of the same weights, of another generation: every tensor equal, bit for bit."""
    found = load_pretrained(path)[0].state_dict()
    names = found.keys() | expected.keys()
    different = [n for n in names if n not in found or n not in expected or not found[n].equal(expected[n].cpu())]
    verdict = f"OTHER WEIGHTS ({len(different)} tensors)" if different else "ok"
    return Row(f"weights of {path.name}", float(len(different)), None, "equal", verdict, not different)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="holds checkpoint.pt, tensors.safetensors, ...")
    parser.add_argument("--plain", action="store_true", help="run the plain formulas in place of the fast forms")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the products")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="compile the model, as a recipe's --compile does")
    parser.add_argument("--only-outside", action="store_true", help="print only the rows that fail")
    options = parser.parse_args(arguments)
    passed = True
    try:
        device = resolve_device(options.device)
        setup = Setup(device, device.resolve_precision(options.precision), options.plain, options.compile)
    except ToolkitError as error:
        print(error, file=sys.stderr)
        return 1
    for folder in options.folders:
        try:
            passed &= compare_folder(folder, setup, options.only_outside)
        except ToolkitError as error:
            print(error, file=sys.stderr)
            passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
