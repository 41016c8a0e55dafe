"""The toolkit's own command: ``python -m toolkit devices | inspect PATH | convert IN OUT --to FORM | ...``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from toolkit import curves
from toolkit.data import manifest_command, shards_command
from toolkit.data.indexed_text import IndexedText
from toolkit.data.manifest import read_manifest
from toolkit.data.text_dictionary import DICT_FILE, TextDictionary
from toolkit.errors import CheckpointError, ConfigError, run_main
from toolkit.models.convert.common import Converted, PretrainedInfo, describe_difference
from toolkit.models.convert.load import accepted, build_converted
from toolkit.models.convert.read import KNOWN, read_pretrained
from toolkit.models.convert.speechbrain import is_speechbrain
from toolkit.models.convert.write import WRITERS, write_pretrained
from toolkit.models.model_files import TEXT_KINDS, read_model_config
from toolkit.training import device_report
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.checkpoint_format import CHECKSUMS_NAME, problem_of, read_state
from toolkit.training.hparams import help_text

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MANIFEST_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".tsv")


def show_path(arguments: argparse.Namespace) -> int:
    """Print what a model of any kind, a checkpoint, a run's output folder, a manifest, a YAML, prepared text or a
    tensor file is."""
    path = Path(arguments.path)
    if not path.exists():
        raise ConfigError(f"there is no {path}; check the path.")
    for fits, describe in DESCRIPTIONS:
        if fits(path):
            print("\n".join(describe(path)))
            return 0
    raise ConfigError(
        f"{path} is none of these: a model, a checkpoint or the output folder of a run, a manifest "
        f"({', '.join(MANIFEST_SUFFIXES)}), a recipe's YAML, prepared text (.idx) or a .safetensors file."
    )


def convert_model(arguments: argparse.Namespace) -> int:
    """Read a model of any known kind and write it in another form."""
    converted = read_pretrained(arguments.source)
    print("\n".join(_describe_converted(Path(arguments.source), converted)))
    converted = accepted(converted, arguments.source, arguments.allow_missing, arguments.allow_unexpected)
    build_converted(converted, arguments.source)  # so that shapes are checked too, and errors name the source
    left_out = write_pretrained(converted, arguments.target, to=arguments.to)
    print("\n".join(left_out), end="\n" if left_out else "")
    print(f"written: {arguments.target} ({arguments.to})")
    return 0


def show_recipes(arguments: argparse.Namespace) -> int:
    """Print the recipes and templates beside the package, with the command that starts each."""
    root = Path(__file__).resolve().parent.parent
    lines: list[str] = []
    for script in sorted([*root.glob("recipes/**/train.py"), *root.glob("templates/*/train.py")]):
        lines.append(str(script.parent.relative_to(root)))
        for file in sorted([*script.parent.glob("hparams/*.yaml"), *script.parent.glob("*.yaml")]):
            lines.append(f"  python {script.relative_to(root)} {file.relative_to(root)}")
            lines.append(f"      {_first_comment(file)}")
    if not lines:
        raise ConfigError(f"there are no recipes beside the package ({root}); work in a clone of the repository.")
    print("\n".join([*lines, "", "`--help` behind a command prints its keys."]))
    return 0


def _first_comment(file: Path) -> str:
    comments = (line.lstrip("# ").strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    return next((comment for comment in comments if comment), "")


# -------------------------------------------------------------------- what `inspect` says of each kind


def _describe_model(path: Path) -> list[str]:
    return _describe_converted(path, read_pretrained(path))


def _describe_converted(path: Path, converted: Converted) -> list[str]:
    info, config = converted.info, converted.config
    sizes = [tensor.numel() for tensor in converted.tensors.values()]
    lines = [
        f"{path}: a model of kind {info.kind} ({info.source})",
        f"  input      {_describe_input(info)}",
        f"  labels     {' '.join(info.labels) if info.labels else 'none'}",
        f"  settings   {json.dumps(config.architecture, ensure_ascii=False)}",
        f"  tensors    {len(sizes)}, {sum(sizes):,} values",
        *(f"  note       {note}" for note in info.notes),
    ]
    difference = describe_difference(converted)
    return [*lines, difference] if difference else lines


def _describe_input(info: PretrainedInfo) -> str:
    if info.kind in TEXT_KINDS:
        return "tokens of text"
    return f"waveforms of {info.sample_rate} Hz, {'normalized' if info.normalize else 'as they are'}"


def _describe_checkpoint(path: Path) -> list[str]:
    problem = problem_of(path, thorough=True)
    if problem is not None:
        raise CheckpointError(f"the checkpoint {path} is not valid: {problem}.")
    state = read_state(path)
    written = datetime.fromtimestamp(float(state.get("time", 0))).isoformat(sep=" ", timespec="seconds")
    lines = [
        f"{path}: a checkpoint after {state['update']} updates, written {written}, all checksums right",
        f"  metrics    {json.dumps(state.get('metrics', {}))}",
        f"  state      {json.dumps(state.get('state', {}), ensure_ascii=False)[:400]}",
        f"  manifests  {', '.join(state.get('manifests', {})) or 'none'}",
    ]
    for file in sorted(path.glob("*.safetensors")):
        lines += _tensor_lines(file)
    return lines


def _describe_run(path: Path) -> list[str]:
    lines = [f"{path}: the output folder of a run"]
    infos = Checkpointer(path / "save", log=lambda sentence: lines.append(f"  {sentence}")).list()
    for info in infos:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in info.metrics.items())
        lines.append(f"  checkpoint {info.path.name}  {metrics}")
    if (path / "model" / "config.json").is_file():
        lines.append(f"  model      {path / 'model'} ({read_model_config(path / 'model').kind})")
    if (path / "summary.json").is_file():
        summary = _read_summary(path / "summary.json")
        lines += [f"  {name:10} {json.dumps(value, ensure_ascii=False)}" for name, value in summary.items()]
    return lines


def _read_summary(file: Path) -> dict[str, Any]:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise CheckpointError(f"{file} is damaged ({error}); delete it and run with --test_only True.") from error
    if not isinstance(summary, dict):
        raise CheckpointError(f"{file} is damaged (no JSON object); delete it and run with --test_only True.")
    return summary


def _describe_manifest(path: Path) -> list[str]:
    manifest = read_manifest(path)
    durations = manifest.durations
    lines = [
        f"{path}: a manifest of {len(manifest)} utterances, {manifest.hours:.2f} hours",
        f"  duration   {durations.min():.2f} to {durations.max():.2f} s, mean {durations.mean():.2f} s",
        f"  columns    {', '.join(manifest.columns)}",
        f"  first row  {json.dumps(manifest.row(0), ensure_ascii=False, default=str)}",
        f"  identity   {manifest.fingerprint()}",
    ]
    return lines


def _describe_text(path: Path) -> list[str]:
    """A prepared folder, or one of its texts by its .idx or .bin."""
    folder = path if path.is_dir() else path.parent
    indexes = sorted(folder.glob("*.idx")) if path.is_dir() else [path.with_suffix(".idx")]
    lines = [f"{path}: text in fairseq's binary form"]
    dictionary = TextDictionary.from_file(folder / DICT_FILE) if (folder / DICT_FILE).is_file() else None
    if dictionary is None:
        lines.append(f"  no {DICT_FILE} beside it")
    else:
        first = ", ".join(dictionary.symbols[4:9])
        lines.append(f"  {DICT_FILE:10} {len(dictionary):,} entries (with 4 special ones), the first {first}")
    for index in indexes:
        text = IndexedText(index.with_suffix(""))
        if dictionary is not None:
            text.check_ids(len(dictionary), DICT_FILE)
        lines.append(f"  {index.stem:10} {len(text):,} lines, {text.num_tokens:,} tokens, stored as {text.dtype.name}")
    return lines


def _is_text(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.idx"))
    return path.suffix in (".idx", ".bin") and path.with_suffix(".idx").is_file()


def _describe_tensors(path: Path) -> list[str]:
    return [f"{path}: tensors", *_tensor_lines(path, shown=40)]


def _tensor_lines(path: Path, *, shown: int = 0) -> list[str]:
    """How many tensors and values a file holds, and the first ``shown`` of them."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
    values = sum(math.prod(shape) for shape, _ in shapes.values())
    lines = [f"  {path.name}: {len(shapes)} tensors, {values:,} values, {path.stat().st_size / 2**20:.1f} MiB"]
    lines += [f"    {name}  {shape} {kind}" for name, (shape, kind) in list(shapes.items())[:shown]]
    return lines + ([f"    ... and {len(shapes) - shown} more"] if 0 < shown < len(shapes) else [])


def _describe_yaml(path: Path) -> list[str]:
    return [help_text(path).rstrip()]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("summary.json", "metrics.jsonl", "save", "hyperparams.yaml"))


DESCRIPTIONS: tuple[tuple[Callable[[Path], bool], Callable[[Path], list[str]]], ...] = (
    (lambda path: (path / CHECKSUMS_NAME).is_file() or path.name.startswith("step_"), _describe_checkpoint),
    (lambda path: (path / "config.json").is_file(), _describe_model),
    (lambda path: path.is_dir() and is_speechbrain(path), _describe_model),
    (_is_text, _describe_text),
    (lambda path: path.is_dir() and _is_run(path), _describe_run),
    (lambda path: path.is_file() and path.suffix.lower() in PICKLED_SUFFIXES, _describe_model),
    (lambda path: path.suffix == ".safetensors", _describe_tensors),
    (lambda path: path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES, _describe_manifest),
    (lambda path: path.is_file() and path.suffix in (".yaml", ".yml"), _describe_yaml),
)


class _Parser(argparse.ArgumentParser):
    """Wrong usage as one sentence, like every other error."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m toolkit``."""
    parser = _Parser(prog="python -m toolkit", description="Look at devices, files and runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    devices = commands.add_parser("devices", help="which devices are here, how fast, and what the others need")
    device_report.add_arguments(devices)
    devices.set_defaults(run=device_report.run_command)
    inspect = commands.add_parser("inspect", help="what a model, checkpoint, run, manifest, YAML or prepared text is")
    inspect.add_argument("path")
    inspect.set_defaults(run=show_path)
    convert = commands.add_parser("convert", help="write a model of any known kind in another form")
    convert.add_argument("source", metavar="IN", help=f"one of: {KNOWN}")
    convert.add_argument("target", metavar="OUT", help="a new folder; for fairseq a new .pt file")
    convert.add_argument("--to", required=True, choices=sorted(WRITERS), help="the form to write")
    for side, words in (("missing", "the model's tensors that the file may lack"), ("unexpected", "the file's extra")):
        convert.add_argument(f"--allow_{side}", nargs="+", default=[], metavar="PATTERN", help=f"{words} (head.*)")
    convert.set_defaults(run=convert_model)
    manifest = commands.add_parser("manifest", help="write a manifest as another kind, fairseq's among them")
    manifest_command.add_arguments(manifest)
    manifest.set_defaults(run=manifest_command.run_command)
    shards = commands.add_parser("shards", help="pack a manifest's audio into tar shards, or check them")
    shards_command.add_arguments(shards)
    shards.set_defaults(run=shards_command.run_command)
    drawing = commands.add_parser("curves", help="draw a run's metrics.jsonl as a picture and a table")
    curves.add_arguments(drawing)
    drawing.set_defaults(run=curves.run_command)
    recipes = commands.add_parser("recipes", help="the recipes and templates, with their commands")
    recipes.set_defaults(run=show_recipes)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = build_parser().parse_args(list(argv))
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
