"""The output folder of a run: what it holds, what of it a start may clear or go on from, the record of what was run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError, ConfigError, ToolkitError
from toolkit.training.checkpoint_format import CHECKSUMS_NAME, present_folders
from toolkit.training.folders import open_output_folder, write_atomic
from toolkit.training.guard import REPORT_NAME
from toolkit.training.hparams import OUTPUT_NAME, HparamsPlan
from toolkit.training.options import RunOptions
from toolkit.training.yaml_tree import plain_or_none, read_tree

DEBUG_MARK = "debug_run"
"""Marks an output folder whose results come from --debug, so that a real run does not go on from them."""

MODEL_NAME = "model"
"""The model folder in an output folder."""

RESULTS = (
    "save", MODEL_NAME, "tensorboard", "metrics.jsonl", "summary.json", "test_hypotheses.jsonl",
    "test_predictions.jsonl", REPORT_NAME,
)  # fmt: skip
"""What a run leaves in its output folder, beside logs and what was prepared; the report of a crash, last, is no run."""


def open_run_folder(
    folder: Path,
    options: RunOptions,
    plan: HparamsPlan,
    script: str | Path | None,
    held: contextlib.ExitStack,
) -> bool:
    """Lock the output folder, clear it of a debug run, and keep there what was run (main process).

    Arguments
    ---------
    folder : made where it is not there.
    options, plan, script : what is to be run.
    held : takes the lock.

    Raises
    ------
    ConfigError : the folder cannot be written, another run uses it, or what it holds would be overwritten.
    CheckpointError : there is nothing to evaluate.

    Returns
    -------
    False where the record waits until the checkpoint that is there was resumed: a run that is refused, because the
    folder is another's, must not put its settings in the place of that one's.
    """
    held.enter_context(open_output_folder(folder))
    mark = folder / DEBUG_MARK
    if options.test_only:
        _check_evaluation(folder, plan.values.get("pretrained"))
    elif options.debug and not mark.exists() and any(_has_content(folder / name) for name in RESULTS[:-1]):
        raise ConfigError(
            f"{folder} holds a run, which --debug would overwrite; give the debug run another --output_folder."
        )
    if mark.exists() and not options.test_only:
        for name in RESULTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        mark.unlink()
    if options.debug and not options.test_only:
        mark.write_text("The results in this folder come from --debug; a real run deletes them.\n")
    if options.test_only and (has_checkpoints(folder) or holds_model(folder)):
        return True
    if has_checkpoints(folder):
        return False
    keep_record(folder, plan, script)
    return True


def keep_record(folder: Path, plan: HparamsPlan, script: str | Path | None) -> None:
    """Write the settings, a copy of the script, and the packages."""
    plan.save(folder)
    if script is not None and Path(script).exists():
        copy = folder / Path(script).name
        if not (copy.exists() and copy.samefile(script)):  # --output_folder . beside the script
            shutil.copyfile(script, copy)
    write_atomic(folder / "env.log", describe_environment())


def has_checkpoints(folder: Path) -> bool:
    """Whether the run in the output folder ``folder`` has finished writing a checkpoint, sound or not."""
    return any((path / CHECKSUMS_NAME).exists() for _, path in present_folders(folder / "save"))


def holds_model(folder: Path) -> bool:
    """Whether the output folder ``folder`` has the ``model/`` of a run."""
    return (folder / MODEL_NAME / "config.json").exists()


def _check_evaluation(folder: Path, pretrained: Any) -> None:
    """Whether it is plain what ``test_only`` shall evaluate: the run in ``folder``, or ``pretrained``."""
    if not (has_checkpoints(folder) or holds_model(folder)):
        if not pretrained:
            raise nothing_to_evaluate(folder)
        return
    # A fine-tuning run is evaluated by its own command, which names what it began with.
    own = (_setting_of_run(folder, "pretrained"), folder / MODEL_NAME)
    if pretrained and not any(_is_same_path(pretrained, path) for path in own):
        raise ConfigError(
            f"{folder} holds a run of its own, and --pretrained names {pretrained}; leave out --pretrained to evaluate "
            "that run, or give another --output_folder to evaluate the pretrained model."
        )


def _setting_of_run(folder: Path, key: str) -> Any:
    """A setting of the run in ``folder`` by its record; None where there is none."""
    try:
        return plain_or_none(read_tree(folder / OUTPUT_NAME).root.get(key))
    except ToolkitError:
        return None


def _is_same_path(first: Any, second: Any) -> bool:
    return bool(second) and Path(str(first)).expanduser().resolve() == Path(str(second)).expanduser().resolve()


def _has_content(path: Path) -> bool:
    """Whether a folder holds anything, or a file is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


def nothing_to_evaluate(folder: Path) -> CheckpointError:
    """The error of an evaluation without weights."""
    return CheckpointError(
        f"there is nothing to evaluate: {folder / 'save'} holds no sound checkpoint and no pretrained model was given; "
        "train first, or name the folder of a run with --output_folder."
    )


def describe_environment() -> str:
    """Python, machine and packages, for ``env.log``."""
    packages = sorted(
        {f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}, key=str.lower
    )
    return "\n".join([f"python {platform.python_version()}", platform.platform(), *packages]) + "\n"
