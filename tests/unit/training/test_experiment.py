"""Starting a recipe: what is refused before anything is built, and what is kept (whole runs: test_brain_runs.py)."""

import os
import signal

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.training.experiment import start
from toolkit.training.limits import ECHO_SECONDS, LeaveSignal, Requeue

YAML = """
# What the test writes to.
output_folder: {folder}
seed: 3
device: cpu
max_updates: 2
fast_allocator: False
fast_products: False
# Its model.
model: !new:torch.nn.Linear
    in_features: 2
    out_features: 2
"""


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(YAML.format(folder=tmp_path / "run"))
    return path


def test_start_builds_the_yaml_and_keeps_what_was_run(yaml_file, tmp_path):
    with start([str(yaml_file), "--max_updates", "5"], script=__file__) as experiment:
        assert experiment.options.max_updates == 5 and experiment.hparams["seed"] == 3
        assert experiment.world.is_main and experiment.output_folder == tmp_path / "run"
        assert experiment.prepare(lambda number: number + 1, 4) == 5
        first = experiment.hparams["model"].weight.clone()
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"hyperparams.yaml", "env.log", "log.txt", "test_experiment.py"} <= kept
    assert "small.yaml --max_updates 5: writing to" in (tmp_path / "run" / "log.txt").read_text()
    # The seed decides the initial weights, whatever was drawn before.
    torch.manual_seed(77)
    with start([str(yaml_file)]) as experiment:
        assert torch.equal(experiment.hparams["model"].weight, first)
    with start([str(yaml_file), "--seed", "4"]) as experiment:
        assert not torch.equal(experiment.hparams["model"].weight, first)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(yaml_file):
    with start([str(yaml_file)]):
        with pytest.raises(ConfigError, match="another run is writing to"):
            start([str(yaml_file)])
    # A start that failed, or has ended, leaves no lock.
    with start([str(yaml_file)]):
        pass


def test_a_start_that_fails_gives_the_folder_back(yaml_file, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml_file.read_text().replace("in_features: 2", "in_features: -2"))
    with pytest.raises(ConfigError):
        start([str(broken)])
    with start([str(yaml_file)]):
        pass


def test_the_scripts_own_folder_may_take_the_results(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("# mine\n")
    (tmp_path / "small.yaml").write_text(YAML.format(folder=tmp_path))
    with start([str(tmp_path / "small.yaml")], script=script):
        assert script.read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--compile_backend", "nonsense"], "'nonsense' is not known to torch here; name one of .*inductor"),
        (["--compile_mode", "nonsense"], "'nonsense' is none of default, "),
        (["--threads", "1000000000000"], "--threads must be 4096 or less"),
        (["--distributed_timeout_minutes", "1e13"], "--distributed_timeout_minutes must be 525600 or less"),
    ],
)
def test_values_that_torch_would_stumble_over_are_refused_at_once(yaml_file, words, told):
    with pytest.raises(ConfigError, match=told):
        start([str(yaml_file), "--compile", "True", *words])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_where_nothing_is_trained_it_leaves_at_once_with_the_code_for_schedulers(
    yaml_file, number, capfd
):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(Requeue) as caught:
        with start([str(yaml_file)]) as experiment:
            experiment.prepare(os.kill, os.getpid(), number)
    assert caught.value.code == 75
    assert "told to stop: no training is going on here that could be saved; run the same" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    with start([str(yaml_file)]):  # the lock was given back
        pass


def test_the_echo_of_a_signal_does_not_break_off_what_is_put_away(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("toolkit.training.limits.time.monotonic", lambda: clock[0])
    with LeaveSignal():
        with pytest.raises(Requeue):
            os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += ECHO_SECONDS - 0.1
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 0.2
        with pytest.raises(Requeue):
            os.kill(os.getpid(), signal.SIGTERM)


def test_help_is_printed_from_the_yaml(yaml_file, capsys):
    with pytest.raises(SystemExit) as ended:
        start([str(yaml_file), "--help"])
    assert ended.value.code == 0 and "What the test writes to." in capsys.readouterr().out


def test_without_a_file_or_a_folder_nothing_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"no YAML file was given; write `python train\.py hparams/NAME\.yaml"):
        start(["--seed", "3"])
    bare = tmp_path / "bare.yaml"
    bare.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="has no output_folder; add the key, or give --output_folder"):
        start([str(bare)])
