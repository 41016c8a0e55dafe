"""What only a machine remembers: every recipe is listed and run, every YAML key is used and explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipes.recipe_rows import ROOT, read_rows
from toolkit.training.hparams import plan_hparams
from toolkit.training.options import option_types
from toolkit.training.presets import BASED_ON, chain_of, follow_presets, plain_values

FOLDERS = (ROOT / "recipes", ROOT / "templates")
YAMLS = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))
TRAINING = [path for path in YAMLS if path.parent.name != "presets"]
TRAINING_KEYS = (
    "data_folder output_folder seed max_updates max_minutes effective_batch precision device compile "
    "num_workers train_splits valid_splits test_splits"
).split()
ROWS = read_rows()
KEY = re.compile(r"^( *)(?:- )?([A-Za-z_][\w-]*):(?: |$)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def script_of(yaml: Path) -> Path:
    """train.py beside the YAML, or above its hparams folder."""
    return next(folder / "train.py" for folder in yaml.parents if (folder / "train.py").is_file())


def keys_in(path: Path) -> list[tuple[int, str, bool]]:
    """(line, key, whether a comment stands right above it) for every key of a YAML, nested ones too."""
    found, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        key = KEY.match(line)
        if key:
            found.append((number + 1, key.group(2), number > 0 and lines[number - 1].lstrip().startswith("#")))
    return found


def top_level_keys(path: Path) -> list[str]:
    return re.findall(r"^([A-Za-z_]\w*):", path.read_text(encoding="utf-8"), re.MULTILINE)


def plan(path: Path, **more: object):
    """The YAML with its placeholders filled, checked but not built."""
    text = path.read_text(encoding="utf-8") + "".join(base.read_text(encoding="utf-8") for base in chain_of(path)[1:])
    given = {line.split(":")[0]: "x" for line in text.splitlines() if "!PLACEHOLDER" in line}
    return plan_hparams(*follow_presets(path, {**given, **more}))


def test_there_is_something_to_check() -> None:
    assert len(TRAINING) >= 16 and len(ROWS) >= 18
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_script_yaml_and_readme_is_listed() -> None:
    listed = {path for row in ROWS for path in (row.script, row.hparams, row.readme, row.prepare)}
    modules = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    scripts = [path for path in modules if "__main__" in path.read_text(encoding="utf-8")]
    readmes = [path for folder in FOLDERS for path in folder.rglob("README.md")]
    missing = [name_of(path) for path in (*scripts, *TRAINING, *readmes) if path not in listed]
    assert not missing, f"in no row of tests/recipes/*.csv: {missing}"


def test_every_preset_is_run() -> None:
    presets = {(path.parents[1], path.stem) for path in YAMLS if path.parent.name == "presets"}
    run = {(row.hparams.parent, name) for row in ROWS for name in re.findall(r"--preset (\w+)", row.flags)}
    assert presets == run


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_listed_file_exists(row) -> None:
    for path in (row.script, row.hparams, row.readme, row.prepare):
        assert path is None or path.is_file(), f"{row.name}: {path}"
    assert not row.needs or row.needs in {other.name for other in ROWS}
    assert row.checks


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_key_has_its_comment(path: Path) -> None:
    bare = [f"line {line}: {key}" for line, key, commented in keys_in(path) if not commented and key != BASED_ON]
    assert not bare, f"{name_of(path)}: no comment above {bare}"
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_every_key_is_used(path: Path) -> None:
    """A top-level key is read by the script (or what it gives its settings to), a run option, or used in the YAML."""
    script = script_of(path).read_text(encoding="utf-8")
    # Those that are given a script's settings.
    for module in ("toolkit.recognition", "toolkit.pretraining", "toolkit.classification", "toolkit.data.parts",
                   "recipes.LibriSpeech.splits"):  # fmt: skip
        if f"from {module} import" in script:
            script += (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    texts = "".join(file.read_text(encoding="utf-8") for file in chain_of(path))
    unused = [
        key
        for key in top_level_keys(path)
        if key != BASED_ON
        and key not in option_types()
        and key != "output_folder"  # the experiment's own
        and not (key == "pretrained" and "experiment.model_source()" in script)
        and f'"{key}"' not in script
        and not (key.endswith("_splits") and '_splits"]' in script)
        and f"<{key}>" not in texts
    ]
    assert not unused, f"{name_of(path)}: {unused} do nothing"


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_training_keys_are_all_there_and_overridable(path: Path) -> None:
    values = plan(path).values
    budget = "batch_tokens" if "WikiText" in path.parts else "batch_seconds"
    lacking = [key for key in (*TRAINING_KEYS, budget) if key not in values]
    assert not lacking
    assert "pretrained" in values
    assert plan(path, max_updates=7, lr=0.5).values["lr"] == 0.5


@pytest.mark.parametrize("path", [path for path in TRAINING if len(chain_of(path)) > 1], ids=name_of)
def test_short_yamls_say_only_what_changes(path: Path) -> None:
    base = plan(chain_of(path)[1])
    before = base.settings() | base.values
    own = {key: value for key, value in plain_values(path).items() if key != BASED_ON}
    same = [key for key, value in own.items() if before.get(key) == value]
    assert not same, f"{name_of(path)}: {same} say what the base says already"


PUBLISHED = {  # fairseq 3d262bb2: updates, peak rate, mask, channel mask, layerdrop, frozen updates, seconds an update
    "base_10m": (13000, 5e-5, 0.65, 0.25, 0.1, 10000, 1600),
    "base_1h": (13000, 5e-5, 0.65, 0.25, 0.1, 10000, 1600),
    "base_10h": (20000, 5e-5, 0.65, 0.5, 0.05, 10000, 1600),
    "base_100h": (80000, 3e-5, 0.65, 0.5, 0.1, 0, 1600),
    "base_960h": (320000, 1e-4, 0.5, 0.1, 0.1, 0, 1600),
    "large_10m": (13000, 1e-4, 0.65, 0.25, 0.1, 10000, 1600),
    "large_1h": (13000, 3e-4, 0.75, 0.25, 0.1, 10000, 1600),
    "large_10h": (20000, 1e-4, 0.75, 0.25, 0.1, 10000, 1600),
    "large_100h": (80000, 3e-5, 0.5, 0.5, 0.1, 10000, 1600),
    "large_960h": (320000, 3e-5, 0.5, 0.25, 0.1, 10000, 1920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fine_tuning_settings(name: str) -> None:
    values = plan(ROOT / "recipes" / "LibriSpeech" / "ASR" / "hparams" / f"{name}.yaml").values
    training = values["encoder_training"]
    found = (values["max_updates"], values["lr"], training["mask_prob"], training["mask_channel_prob"],
             training["layerdrop"], values["freeze_updates"], values["effective_batch"])
    assert found == PUBLISHED[name]
    assert values["normalize"] is name.startswith("large")
    assert training["activation_dropout"] == 0.1 and training["dropout"] == training["feature_grad_mult"] == 0
