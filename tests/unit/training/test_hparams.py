"""YAML to objects: overrides, checks, sentences."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from toolkit.errors import ConfigError, ModelError
from toolkit.training.hparams import help_text, load_hparams, plan_hparams
from toolkit.training.options import RunOptions
from toolkit.training.values import CommandLineText

RECIPE = """\
# Train something.

# Seed of everything.
seed: 1234
# Where the corpus lies, for example /corpora/X.
data_folder: !PLACEHOLDER
output_folder: !PLACEHOLDER  # where results go
save_folder: !ref <output_folder>/save
train_splits: [train-a]

# ---------- model
# Peak learning rate.
lr: 5e-4
num_layers: 12
note: "(x)"
shape: (1, 2)
layer: !new:torch.nn.Linear
    # Width of the input.
    in_features: !ref <num_layers> * 2
    out_features: 3
opt_class: !name:torch.optim.AdamW
    lr: !ref <lr>
modules:
    layer: !ref <layer>
precision: auto
__hidden: 1
"""


def write(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def typed(**words):
    """Overrides as the command line gives them."""
    given = {name.replace("__", "."): CommandLineText(text) for name, text in words.items()}
    return {"data_folder": CommandLineText("/d"), "output_folder": CommandLineText("/o"), **given}


def sentence(path, overrides=None, options=None):
    with pytest.raises(ConfigError) as caught:
        load_hparams(path, overrides, options=options)
    return str(caught.value).replace(str(path), "FILE").replace(str(path.parent), "FOLDER")


def test_objects_references_and_hidden_keys(tmp_path):
    hparams = load_hparams(write(tmp_path, RECIPE), typed())
    assert hparams["save_folder"] == "/o/save"
    assert hparams["modules"]["layer"] is hparams["layer"]
    assert hparams["layer"].in_features == 24
    assert hparams["opt_class"].keywords == {"lr": 5e-4}
    assert hparams["shape"] == (1, 2) and hparams["note"] == "(x)"
    assert "__hidden" not in hparams


def test_overrides_reach_references_and_arguments(tmp_path):
    given = typed(lr="1e-3", num_layers="4", layer__out_features="5", layer__bias="false", note="(y)",
                  opt_class__betas="(0.8, 0.9)", train_splits="[a, b=c:d]")  # fmt: skip
    hparams = load_hparams(write(tmp_path, RECIPE), given, options={"precision": "fp32"})
    layer = hparams["layer"]
    assert (layer.in_features, layer.out_features, layer.bias) == (8, 5, None)
    assert hparams["opt_class"].keywords == {"lr": 1e-3, "betas": (0.8, 0.9)}
    assert hparams["train_splits"] == ["a", "b=c:d"]
    assert hparams["note"] == "(y)" and hparams["precision"] == "fp32"


def test_the_same_yaml_reads_the_same_in_a_fresh_process(tmp_path):
    """hyperpyyaml changes ruamel's rules at its first load; ours are there before."""
    path = write(tmp_path, 'a: "(x)"\nb: (1, 2)\n')
    code = f"from toolkit.training.hparams import load_hparams as l; print(l({str(path)!r}), l({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'a': '(x)', 'b': (1, 2)} {'a': '(x)', 'b': (1, 2)}\n"


def test_nested_mappings_as_overrides(tmp_path):
    given = {**typed(), "layer": {"out_features": 7}}
    assert load_hparams(write(tmp_path, RECIPE), given)["layer"].out_features == 7
    given = typed(layer="{out_features: 8}")
    assert load_hparams(write(tmp_path, RECIPE), given)["layer"].out_features == 8


def test_a_number_given_for_a_path_stays_text(tmp_path):
    hparams = load_hparams(write(tmp_path, RECIPE), typed(data_folder="0012", output_folder="7"))
    assert hparams["data_folder"] == "0012" and hparams["save_folder"] == "7/save"


def test_no_tag_of_the_command_line_runs(tmp_path):
    made = tmp_path / "made"
    given = typed(note=f"!apply:os.mkdir ['{made}']", lr="!apply:os.getpid []")
    with pytest.raises(ConfigError, match="--lr must be a number, but"):
        load_hparams(write(tmp_path, RECIPE), given)
    del given["lr"]
    assert load_hparams(write(tmp_path, RECIPE), given)["note"].startswith("!apply")
    given = {**typed(), "note": f"!apply:os.mkdir ['{made}']"}
    load_hparams(write(tmp_path, RECIPE), given)
    assert not made.exists()


def test_a_value_may_look_like_a_reference(tmp_path):
    path = write(tmp_path, "a: x\nb: 1\n")
    assert load_hparams(path, {"a": CommandLineText("<b>")})["a"] == "<b>"


def test_all_placeholders_at_once_with_their_comments(tmp_path):
    assert sentence(write(tmp_path, RECIPE)) == (
        "FILE needs 2 values that only you know; add to the command line:\n"
        "  --data_folder VALUE    Where the corpus lies, for example /corpora/X.\n"
        "  --output_folder VALUE    where results go"
    )
    assert "needs a value that" in sentence(write(tmp_path, RECIPE), {"data_folder": "/d"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("num_layer", "3", "FILE has no key 'num_layer', and no run option has that name; did you mean --num_layers?"),
        ("out_features", "3", "FILE has no key 'out_features', and no run option has that name; did you mean "
         "--layer.out_features?"),
        ("presicion", "bf16", "FILE has no key 'presicion', and no run option has that name; did you mean "
         "--precision?"),
        ("layer.out_feature", "3", "FILE: 'layer' has no key 'out_feature'; did you mean --layer.out_features?"),
        ("layer.biass", "False", "FILE: 'layer' has no key 'biass'; did you mean --layer.bias?"),
        ("opt_class.weight_decy", "0", "FILE: 'opt_class' has no key 'weight_decy'; did you mean "
         "--opt_class.weight_decay?"),
        ("modules.layr.bias", "0", "FILE: there is no key 'modules.layr' to set 'modules.layr.bias' in; did you mean "
         "--modules.layer?"),
        ("modules.layer.bias", "0", "FILE, line 24, key 'modules.layer' refers to 'layer'; set the value there: "
         "--layer.NAME."),
        ("lr.x", "3", "FILE, line 13, key 'lr' holds one value and has no keys of its own."),
        ("lr", "fast", "--lr must be a number, but is the text 'fast' (FILE, line 13, key 'lr')."),
        ("train_splits", "a", "--train_splits must be a list such as [a, b], but is the text 'a' (write [a]) "
         "(FILE, line 9, key 'train_splits')."),
        ("layer", "3", "--layer must be a mapping such as {a: 1}, but is 3 (FILE, line 17, key 'layer' builds "
         "an object; set its arguments as --layer.NAME)."),
        ("layer.out_features", "2.5", "--layer.out_features must be a whole number, but is 2.5 (FILE, line 20, key "
         "'layer.out_features')."),
        ("layer.bias", "3", "--layer.bias must be True or False, but is 3 (FILE, line 17, key 'layer.bias')."),
        ("num_layers", "1.3", "--num_layers must be a whole number, but is 1.3 (FILE, line 14, key 'num_layers')."),
        ("lr", ".inf", "FILE, line 13, key 'lr' must be a finite number, but is inf; write another value."),
        ("lr", "1e999", "FILE, line 13, key 'lr' must be a finite number, but is inf; write another value."),
        ("opt_class.betas", "[.nan, 0.9]", "FILE, line 21, key 'opt_class.betas' must be a finite number, but is "
         "nan; write another value."),
        ("grad_accumulation_factor", "2", "--grad_accumulation_factor does not exist here: accumulation follows from "
         "--effective_batch and --batch_seconds."),
    ],
)  # fmt: skip
def test_wrong_overrides_in_words(tmp_path, name, text, words):
    assert sentence(write(tmp_path, RECIPE), {**typed(), name: CommandLineText(text)}) == words


def test_several_wrong_overrides_are_told_together(tmp_path):
    words = sentence(write(tmp_path, RECIPE), {**typed(), "lrr": "1", "layer.biass": "2"})
    assert words.startswith("2 values cannot be set:\n") and "--lr?" in words and "--layer.bias?" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x: 1\ny: !new:torch.nn.Linea\n", "FILE, line 2, key 'y': torch.nn has no 'Linea'; did you mean "
         "torch.nn.Linear?"),
        ("y: !new:torchh.nn.Linear\n", "FILE, line 1, key 'y': there is no module 'torchh' (asked for by "
         "'torchh.nn.Linear'); is it installed, and the name right?"),
        ("a: !ref <b>\nb: !ref <a>/x\n", "FILE, line 1, key 'a' refers to itself: a -> b -> a; give one of them "
         "a value."),
        ("a:\n  b: !ref <a>\n", "FILE, line 2, key 'a.b' refers to itself: a.b -> a -> a.b; give one of them a value."),
        ("a: !ref <lr>\nlrr: 1\n", "FILE, line 1, key 'a' refers to <lr>, and there is no such key; did you mean lrr?"),
        ("a: 1\nb: 2\na: 3\n", "FILE, line 3: the key 'a' stands there a second time; delete or rename one of "
         "the two."),
        ("n: 1\nx: !new:torch.nn.MultiheadAttention\n  embed_dim: 7\n  num_heads: 2\n", "FILE, line 2, key 'x' "
         "(!new:torch.nn.MultiheadAttention) could not be built: embed_dim must be divisible by num_heads "
         "(AssertionError)."),
        ("m:\n  i: !new:torch.nn.Linear\n    in_features: 3\n    out_feature: 3\n", "2 mistakes:\n  FILE, line 4, key "
         "'m.i.out_feature': !new:torch.nn.Linear takes no argument 'out_feature'; did you mean out_features?\n  FILE, "
         "line 2, key 'm.i': !new:torch.nn.Linear also needs out_features."),
        ("a: [1, 2\nb: 3\n", "FILE, line 2, column 2: this is no YAML: expected ',' or ']', but got ':'."),
        ("a:\n\t- 1\n", "FILE, line 2, column 1: this is no YAML: found character '\\t' that cannot start any token."),
        ("- 1\n", "FILE: the file holds no `key: value` lines."),
        ("", "FILE: the file holds no `key: value` lines."),
        ("1: 2\n", "FILE, line 1, key '1' must be text; put it into quotes or rename it."),
        ("precision: None\n", "FILE, line 1, key 'precision' must be one of auto, fp32, bf16, fp16, but is the text "
         "'None'."),
        ("a: !include:other.yaml\n", "FILE, line 1, key 'a' includes 'other.yaml', but there is no file "
         "FOLDER/other.yaml."),
        ("a: 1\nb: !newn:torch.nn.Linear\n", "FILE, line 2, key 'b': there is no tag '!newn:torch.nn.Linear'; did you "
         "mean !new?"),
        ("x: !apply:os.path.jion [a, b]\n", "FILE, line 1, key 'x': os.path has no 'jion'; did you mean os.path.join?"),
        ("x: !name:torch.optim.AdamW\n  weight_decy: 3\n", "FILE, line 2, key 'x.weight_decy': !name:torch.optim.AdamW "
         "takes no argument 'weight_decy'; did you mean weight_decay?"),
        ("x: !new:torch.nn.Linear\n  in_features: a\n  out_features: 2\n", "FILE, line 2, key 'x.in_features' must be "
         "a whole number, but is the text 'a' (!new:torch.nn.Linear)."),
        ("x: 1\ny: !ref <x>/0\n", "FILE: a reference or an included file cannot be resolved: division by zero."),
    ],
)  # fmt: skip
def test_defects_of_a_yaml_in_words(tmp_path, text, words):
    assert sentence(write(tmp_path, text)) == words


@pytest.mark.parametrize(
    ("kind", "words", "error"),
    [
        ("value", "size must be odd (ValueError).", ConfigError),
        ("key", "could not be built: 'size' (KeyError).", ConfigError),
        ("model", "recipe.yaml, line 2, key 'inner.x' (!new:", ModelError),
    ],
)
def test_a_constructor_that_raises_is_placed(tmp_path, monkeypatch, kind, words, error):
    (tmp_path / "refusing.py").write_text(
        "from toolkit.errors import ModelError\n"
        "class Refuses:\n"
        "    def __init__(self, kind: str):\n"
        "        raise {'value': ValueError('size must be odd'), 'key': KeyError('size'),\n"
        "               'model': ModelError('size must be even.')}[kind]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, f"inner:\n  x: !new:refusing.Refuses\n    kind: {kind}\n")
    with pytest.raises(error) as caught:
        load_hparams(path)
    assert words in str(caught.value) and "line 2, key 'inner.x'" in str(caught.value)


def test_a_failed_build_leaves_the_yaml_library_as_it_was(tmp_path):
    import yaml

    before = yaml.constructor.BaseConstructor.construct_object.__defaults__
    path = write(tmp_path, "x: !new:torch.nn.MultiheadAttention\n  embed_dim: 7\n  num_heads: 2\n")
    with pytest.raises(ConfigError):
        load_hparams(path)
    assert yaml.constructor.BaseConstructor.construct_object.__defaults__ == before


def test_a_module_whose_own_import_fails_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = sentence(write(tmp_path, "x: !new:broken_module.Thing\n"))
    assert words == (
        "FILE, line 1, key 'x': importing broken_module failed (ModuleNotFoundError: No module named "
        "'nothing_of_that_name') while looking for 'broken_module.Thing'"
    )


def test_missing_files_name_what_is_near(tmp_path):
    write(tmp_path, "a: 1\n", "train.yaml")
    words = sentence(tmp_path / "trian.yaml")
    assert words.startswith("the YAML file FILE does not exist; did you mean ") and "train.yaml?" in words
    assert "is a folder" in sentence(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"a: \xff\xfe\n")
    assert "is no text in UTF-8" in sentence(tmp_path / "b.yaml")


def test_nothing_is_built_while_planning(tmp_path):
    made = tmp_path / "made"
    plan = plan_hparams(write(tmp_path, f"x: !apply:os.mkdir ['{made}']\nmax_updates: 1e2\nlr: 3\n"))
    assert not made.exists()
    assert RunOptions.from_values(plan.values).max_updates == 100
    plan.build()
    assert made.exists()


def test_whole_numbers_written_as_floats(tmp_path):
    path = write(tmp_path, "n: 1e2\nx: !new:torch.nn.Linear\n  in_features: !ref <n>\n  out_features: 2\n")
    assert load_hparams(path)["x"].in_features == 100


def test_what_counts_stays_whole_and_the_rest_may_be_broken(tmp_path):
    path = write(tmp_path, "freeze_updates: 0\ncrop_seconds: 20\nlr: 1\n")
    words = sentence(path, {"freeze_updates": CommandLineText("1.5")})
    assert words == "--freeze_updates must be a whole number, but is 1.5 (FILE, line 1, key 'freeze_updates')."
    given = {"freeze_updates": "1e3", "crop_seconds": "1.5", "lr": "0.5"}
    values = load_hparams(path, {name: CommandLineText(text) for name, text in given.items()})
    assert values == {"freeze_updates": 1000, "crop_seconds": 1.5, "lr": 0.5}
    assert isinstance(values["freeze_updates"], int)


def test_numbers_of_the_yaml_itself_are_finite(tmp_path):
    path = write(tmp_path, "lr: 1.0\nschedule:\n  warmup: .nan\n")
    words = sentence(path)
    assert words == "FILE, line 3, key 'schedule.warmup' must be a finite number, but is nan; write another value."


def test_the_resolved_copy_loads_again_and_gives_the_same(tmp_path):
    path = write(tmp_path, RECIPE)
    plan = plan_hparams(path, typed(lr="1e-3", layer__bias="False", opt_class__betas="(0.8, 0.9)"))
    saved = plan.save(tmp_path / "run")
    again = plan_hparams(saved)
    assert saved.name == "hyperparams.yaml"
    assert again.values == plan.values and again.settings() == plan.settings()
    first, second = plan.build(), again.build()
    assert first["layer"].bias is None and second["layer"].bias is None
    assert first["opt_class"].keywords == second["opt_class"].keywords
    assert again.save(tmp_path / "run2").read_text() == saved.read_text()


def test_settings_leave_out_places_and_limits(tmp_path):
    settings = plan_hparams(write(tmp_path, RECIPE + "num_workers: 3\n"), typed()).settings()
    assert settings["layer.in_features"] == 24 and settings["opt_class"] == "!name:torch.optim.AdamW"
    assert not {"data_folder", "output_folder", "save_folder", "num_workers"} & set(settings)


def test_included_files(tmp_path):
    write(tmp_path, "# Width.\nwidth: !PLACEHOLDER\ndepth: 2\n", "inner.yaml")
    path = write(tmp_path, "inner: !include:inner.yaml\nlr: 1.0\n")
    assert "--inner.width VALUE    Width." in sentence(path)
    assert load_hparams(path, {"inner.width": CommandLineText("3")})["inner"] == {"width": 3, "depth": 2}
    words = sentence(path, {"inner.depht": CommandLineText("3"), "inner.width": "1"})
    assert words == "FOLDER/inner.yaml: there is no key 'depht'; did you mean --inner.depth?"


def test_a_file_on_top_of_another(tmp_path):
    write(tmp_path, RECIPE, "base.yaml")
    top = write(tmp_path, "based_on: base.yaml\nlr: 1e-5\nkeep_last: 7\nlayer:\n  out_features: 9\n", "top.yaml")
    plan = plan_hparams(top, typed())
    assert plan.values["lr"] == 1e-5 and RunOptions.from_values(plan.values).keep_last == 7
    assert plan.build()["layer"].out_features == 9
    assert plan_hparams(top, typed(lr="1e-6")).values["lr"] == 1e-6
    assert "--lr 1e-05" in help_text(top)


def test_help_lists_keys_in_file_order_with_comments(tmp_path):
    text = help_text(write(tmp_path, RECIPE))
    order = [text.index(f"--{name} ") for name in ("seed", "data_folder", "output_folder", "lr", "num_layers", "layer",
             "layer.in_features", "opt_class", "device", "max_updates")]  # fmt: skip
    assert order == sorted(order)
    assert "  --data_folder VALUE (must be given)\n        Where the corpus lies, for example /corpora/X.\n" in text
    assert "    --layer.in_features !ref <num_layers> * 2\n          Width of the input.\n" in text
    assert "        Peak learning rate.\n" in text and "------" not in text and "__hidden" not in text
    assert text.count("--precision ") == 1 and text == help_text(write(tmp_path, RECIPE))


def test_help_without_a_yaml_lists_the_options():
    assert "--max_grad_norm null\n" in help_text(None)
