"""How to run: typed run options, and the command line that sets them and a YAML's keys."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import ConfigError
from toolkit.training.values import CommandLineText, WrongType, coerce

RETIRED = {
    "data_parallel_backend": "several devices are used by starting with `torchrun --nproc_per_node=N train.py ...`",
    "data_parallel_count": "several devices are used by starting with `torchrun --nproc_per_node=N train.py ...`",
    "auto_mix_prec": "use --precision fp16",
    "bfloat16_mix_prec": "use --precision bf16",
    "grad_accumulation_factor": "accumulation follows from --effective_batch and --batch_seconds",
    "optimizer_step_limit": "use --max_updates",
    "ckpt_interval_steps": "use --ckpt_interval_updates",
    "debug_epochs": "use --debug_updates",
    "skip_nonfinite_grads": "a step that is not finite is always skipped; see --nonfinite_patience",
    "remove_vector_weight_decay": "set weight decay by parameter group in the YAML",
    "profile_training": "use --profile",
    "jit": "use --compile",
    "jit_module_keys": "use --compile",
}
"""Names that other toolkits' users type, and what to do instead here."""

IGNORED = ("distributed_launch", "find_unused_parameters")
"""Flags of other toolkits that are accepted and need nothing here."""


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class RunOptions:
    """How to run. Each may stand in the YAML under the same name too; the command line wins.

    Raises
    ------
    ConfigError : a value outside its range.

    Example
    -------
    >>> RunOptions.from_values({"precision": "bf16", "lr": 0.1}, {"precision": "fp32"}).precision
    'fp32'
    """

    device: str = _option("auto", "auto, cpu, cuda, cuda:1, npu, hpu, xpu or mps; see `python -m toolkit devices`.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        "auto", "Number format of the large products; auto takes bf16 where the device has it."
    )
    seed: int = _option(1234, "Seed of order, crops, masks, dropout and initial values.")
    max_updates: int | None = _option(None, "End after so many optimizer updates; null: no such limit.")
    max_minutes: float | None = _option(None, "End after so many minutes of training; null: no such limit.")
    num_workers: int = _option(0, "Processes per rank that read and decode audio; 0: none.")
    compile: bool = _option(False, "Compile the model with torch.compile (for accelerators; no gain on a CPU).")
    compile_blocks: bool = _option(True, "Compile layer by layer, a graph for each shape; always so with fsdp2.")
    compile_backend: str | None = _option(None, "Backend of torch.compile (hpu_backend, ...); null: torch's own.")
    compile_mode: str = _option("default", "Mode given to torch.compile.")
    threads: int | None = _option(None, "Threads for products on the CPU; null: torch's own choice.")
    fast_allocator: bool = _option(True, "CPU: keep freed memory in the process (glibc), up to twice as fast.")
    fast_products: bool = _option(True, "CPU: float32 products by oneDNN where they are checked to be exact.")
    max_grad_norm: float | None = _option(None, "Clip the gradient to this norm over all groups; null: off.")
    nonfinite_patience: int = _option(10, "End after so many updates in a row whose loss or gradient is not finite.")
    max_bad_share: float = _option(0.01, "Speech: share of utterances with unreadable audio that is tolerated (0..1).")
    log_interval: int = _option(50, "Updates between two rows of the log.")
    valid_interval_updates: int | None = _option(None, "Updates between two validations; null: at each epoch's end.")
    ckpt_interval_minutes: float | None = _option(15.0, "Minutes between two checkpoints; null: off.")
    ckpt_interval_updates: int | None = _option(None, "Updates between two checkpoints; null: off.")
    async_save: bool = _option(
        True, "Write checkpoints beside training, from a copy in host memory (as large as they are); False: it waits."
    )
    keep_last: int = _option(2, "How many of the newest checkpoints to keep.")
    keep_best: int = _option(1, "How many of the best checkpoints to keep.")
    debug: bool = _option(False, "A few steps of everything: train, valid, checkpoint, resume, test.")
    debug_updates: int = _option(4, "Updates of a debug run.")
    debug_batches: int = _option(2, "Batches of each validation and test of a debug run.")
    test_only: bool = _option(False, "No training: only the evaluation of what the output folder holds.")
    noprogressbar: bool = _option(False, "No progress bar, plain lines instead.")
    tensorboard: bool = _option(False, "Write curves for TensorBoard as well.")
    profile: bool = _option(False, "Profile two updates: table (largest costs first) and trace in output_folder.")
    parallel: Literal["ddp", "fsdp2"] = _option(
        "ddp", "How several processes share the model: ddp = whole on each, fsdp2 = in shards (less memory)."
    )
    distributed_backend: str | None = _option(None, "Collectives library; null: the device's own (gloo, nccl, ...).")
    distributed_timeout_minutes: float = _option(30.0, "How long processes wait for each other.")
    local_rank: int | None = _option(None, "Set by launchers: number of this process on its machine.")

    def __post_init__(self) -> None:
        lowest = {
            "max_updates": 0, "max_minutes": 0, "num_workers": 0, "threads": 1, "nonfinite_patience": 1,
            "max_bad_share": 0, "log_interval": 1, "valid_interval_updates": 1, "ckpt_interval_updates": 1,
            "keep_last": 1, "keep_best": 0, "debug_updates": 1, "debug_batches": 1, "local_rank": 0, "seed": 0,
        }  # fmt: skip
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ConfigError(f"--{name} must be {low} or more, but is {value}.")
        for name in ("max_grad_norm", "ckpt_interval_minutes", "distributed_timeout_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} must be above 0, but is {value}" + (
                    "; write null to switch it off." if name != "distributed_timeout_minutes" else "."))
        for name, high in {"threads": 4096, "distributed_timeout_minutes": 525_600}.items():  # a year
            value = getattr(self, name)
            if value is not None and value > high:
                raise ConfigError(f"--{name} must be {high} or less, but is {value}.")
        if self.max_bad_share > 1:
            raise ConfigError(f"--max_bad_share is a share between 0 and 1, but is {self.max_bad_share}.")

    @classmethod
    def from_values(cls, *sources: Mapping[str, Any]) -> RunOptions:
        """The options found in ``sources``, the later winning; other keys are passed over.

        Raises
        ------
        ConfigError : a value of a wrong type or outside its range, naming the option.
        """
        kinds = option_types()
        values: dict[str, Any] = {}
        for source in sources:
            for name in kinds.keys() & source.keys():
                values[name] = coerce_option(name, source[name])
        return cls(**values)

    @property
    def max_eval_steps(self) -> int | None:
        """Batches of each validation and test on a rank; None = all."""
        return self.debug_batches if self.debug else None

    def as_dict(self) -> dict[str, Any]:
        """Name to value, in the order of declaration."""
        return dataclasses.asdict(self)


def option_types() -> dict[str, Any]:
    """Name of each run option to its annotation."""
    return typing.get_type_hints(RunOptions)


def coerce_option(name: str, value: Any, *, where: str | None = None) -> Any:
    """``value`` typed as the option ``name`` asks, or a ConfigError that names it (and ``where`` it was given)."""
    try:
        typed = coerce(value, option_types()[name])
    except WrongType as error:
        raise ConfigError(f"{where or '--' + name} {error}.") from error
    if isinstance(typed, float) and not math.isfinite(typed):
        raise ConfigError(f"{where or '--' + name} must be a finite number, but is {typed}; write another value.")
    return typed


def options_help() -> list[tuple[str, Any, str]]:
    """(name, default, help) of each run option, in the order of declaration."""
    return [(item.name, item.default, item.metadata["help"]) for item in dataclasses.fields(RunOptions)]


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart; iterates as (hparams_file, options, overrides).

    ``options`` are typed run options, ``overrides`` YAML keys (dotted where nested) to `CommandLineText`, which
    ``plan_hparams`` types by the YAML. ``help``: the user asked for the help text.
    """

    hparams_file: Path | None
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    help: bool = False

    def __iter__(self) -> Iterator[Any]:
        return iter((self.hparams_file, self.options, self.overrides))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Take a command line apart: ``x.yaml --key value --key=value --outer.inner value --flag``.

    A ``--name`` of `RunOptions` sets how to run; every other one overrides a YAML key. Values keep any ``=`` and
    ``:``; a name without a value means True
    (of two that can only be True or False, ``--debug x.yaml`` has none). The last of a repeated name counts.

    Raises
    ------
    ConfigError : a value of a wrong type, a second file, or a word that belongs to no name.

    Example
    -------
    >>> file, options, overrides = parse_arguments(["x.yaml", "--precision=bf16", "--url", "http://a?b=c"])
    >>> str(file), options, overrides
    ('x.yaml', {'precision': 'bf16'}, {'url': 'http://a?b=c'})
    """
    words = list(argv)
    files: list[str] = []
    options: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    wants_help = False
    kinds = option_types()
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
        elif word.startswith("--") and len(word) > 2:
            name, value = _name_and_value(word[2:], words, kinds)
            if name in kinds:
                options[name] = coerce_option(name, value)
            elif name not in IGNORED:
                overrides[name] = value
        elif word.startswith("-"):
            raise ConfigError(f"the command line has {word!r}, but names begin with two dashes: --key value.")
        else:
            files.append(word)
    if len(files) > 1:
        raise ConfigError(
            f"the command line has {files[1]!r} after the YAML file {files[0]!r}; write values as --key value."
        )
    return Arguments(Path(files[0]) if files else None, options, overrides, wants_help)


def _name_and_value(word: str, rest: list[str], kinds: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and value of ``--word``, the value being after the first ``=`` or the next word; True without one."""
    name, equals, text = word.partition("=")
    if not name:
        raise ConfigError(f"the command line has '--{word}', where a name is missing: write --key value.")
    if name.replace("-", "_") in (*kinds, *IGNORED):
        name = name.replace("-", "_")
    if equals:
        return name, CommandLineText(text)
    if not rest or rest[0].startswith("--") or (kinds.get(name) is bool and _is_file_or_name(rest[0])):
        return name, True
    if name in IGNORED and rest[0].lower() not in ("true", "false"):
        return name, True
    return name, CommandLineText(rest.pop(0))


def _is_file_or_name(word: str) -> bool:
    """Whether a word behind a flag is the YAML file, or a name with one dash (told as such), and no value of it."""
    if word.lower() in ("true", "false"):
        return False
    return word.startswith("-") or word.lower().endswith((".yaml", ".yml")) or Path(word).is_file()
