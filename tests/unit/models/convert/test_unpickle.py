"""Pickled checkpoints are read without being run: what is known comes out, everything else is refused by name."""

import argparse
import builtins
import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from toolkit.errors import CheckpointError
from toolkit.models.convert import unpickle
from toolkit.models.convert.unpickle import MAGIC, StandIn, read_pickle

FIXTURES = Path(__file__).parents[3] / "fixtures" / "fairseq_models"
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(contents, path, zipped=True):
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path):
    """The whole sentence, with FILE for the path."""
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    words = str(caught.value)
    assert "\n" not in words and words.endswith(".")
    return words.replace(str(path), "FILE")


class Calls:
    """An object whose pickle calls ``function`` with ``arguments`` when a careless reader loads it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Builds:
    """An object whose pickle makes an instance of a class and hands it a state."""

    def __init__(self, made, state):
        self.made, self.state = made, state

    def __reduce__(self):
        return self.made, (), self.state


def module_of(monkeypatch, name, **members):
    """A module of another program, there only while the file is written."""
    for depth in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:depth])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    for own, member in members.items():
        member.__module__, member.__qualname__, member.__name__ = name, own, own
        setattr(sys.modules[name], own, member)


@FORMS
def test_containers_numbers_and_tensors(tmp_path, zipped):
    shared = torch.arange(6.0)
    contents = {
        "model": collections.OrderedDict(a=shared, b=shared.view(2, 3).t(), c=torch.tensor(1.5, dtype=torch.float16)),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "list": [1, 2.5, None, True, "ä", (1, 2), {3}, 10**30],
        "empty": collections.defaultdict(dict),
        "args": argparse.Namespace(arch="x", inner=argparse.Namespace(a=[1])),
    }
    read = read_pickle(save(contents, tmp_path / "x.pt", zipped))
    assert all(torch.equal(read["model"][name], contents["model"][name]) for name in "abc")
    assert read["model"]["c"].dtype == torch.float16
    assert torch.equal(read["parameter"], contents["parameter"])
    assert read["list"] == contents["list"]
    assert read["empty"] == {} and type(read["empty"]) is dict
    assert read["args"] == contents["args"]


@FORMS
def test_a_filled_defaultdict_is_a_dict(tmp_path, zipped):
    made = collections.defaultdict(list)
    made["a"].append(1)
    assert read_pickle(save({"x": made}, tmp_path / "x.pt", zipped)) == {"x": {"a": [1]}}


def test_a_later_file_is_mapped_and_stays_what_it_was(tmp_path):
    """Tensors are not held twice: they lie in the file until they are used, and writing to them changes no file."""
    path = save({"w": torch.arange(1000.0)}, tmp_path / "x.pt")
    before = path.read_bytes()
    read = read_pickle(path)["w"]
    size = read.untyped_storage().nbytes()
    assert size >= 4000
    read.zero_()
    assert path.read_bytes() == before
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert torch.equal(read_pickle(packed)["w"], torch.arange(1000.0))


@FORMS
def test_stand_ins_keep_what_they_are_given(tmp_path, monkeypatch, zipped):
    class Dictionary:
        def __init__(self):
            self.symbols = ["<s>"]
            self.hits = 0

        def __setstate__(self, state):
            raise AssertionError("the other program's code ran")

    class Choice:
        def __reduce__(self):
            return type(self), ("simple",)

    module_of(monkeypatch, "fairseq.data.dictionary", Dictionary=Dictionary)
    module_of(monkeypatch, "fairseq.dataclass.constants", Choice=Choice)
    path = save({"dict": Dictionary(), "choice": Choice(), "kind": dict}, tmp_path / "x.pt", zipped)
    for name in [name for name in sys.modules if name.startswith("fairseq")]:
        monkeypatch.delitem(sys.modules, name)
    read = read_pickle(path)
    assert isinstance(read["dict"], StandIn) and read["dict"].name == "fairseq.data.dictionary.Dictionary"
    assert read["dict"].state == {"symbols": ["<s>"], "hits": 0}
    assert read["choice"].args == ("simple",)
    assert issubclass(read["kind"], StandIn) and read["kind"].name == "builtins.dict"


def test_the_originals_settings_need_no_omegaconf():
    config = read_pickle(FIXTURES / "w2v2_pretrain_layernorm" / "checkpoint.pt")["cfg"]
    assert config.name == "omegaconf.dictconfig.DictConfig" and "model" in config.state["_content"]


MARK = "open(__import__('os').environ['MARK'], 'w').close()"


def attacks(marker):
    """What strangers have put into checkpoints: (name that is refused, object)."""
    command = f"touch {marker}"
    return {
        "os.system": ("os.system", Calls(os.system, command)),
        "eval": ("builtins.eval", Calls(builtins.eval, MARK)),
        "exec": ("builtins.exec", Calls(builtins.exec, MARK)),
        "getattr": ("builtins.getattr", Calls(getattr, "text", "upper")),
        "open": ("io.open", Calls(io.open, str(marker), "w")),
        "import": ("builtins.__import__", Calls(builtins.__import__, "antigravity")),
        "module": ("runpy.run_path", Calls(__import__("runpy").run_path, str(marker))),
        "torch.load": ("torch.serialization.load", Calls(torch.load, str(marker))),
        "torch.save": ("torch.serialization.save", Calls(torch.save, {}, str(marker))),
        "torch.hub": ("torch.hub.load", Calls(torch.hub.load, "x/y", "z")),
        "partial": ("functools.partial", Calls(__import__("functools").partial, os.system, command)),
    }


@FORMS
@pytest.mark.parametrize("place", ["top", "state dict", "stand-in's state", "namespace"])
@pytest.mark.parametrize("attack", attacks(""))
def test_nothing_of_a_malicious_file_runs(tmp_path, monkeypatch, attack, place, zipped):
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARK", str(marker))
    name, poison = attacks(marker)[attack]

    class DictConfig:
        pass

    module_of(monkeypatch, "omegaconf.dictconfig", DictConfig=DictConfig)
    contents = {
        "top": poison,
        "state dict": {"model": collections.OrderedDict(w=torch.zeros(2), x=poison)},
        "stand-in's state": {"cfg": Builds(DictConfig, {"_content": {"a": poison}})},
        "namespace": {"args": argparse.Namespace(arch="wav2vec2", evil=poison)},
    }[place]
    path = save(contents, tmp_path / "x.pt", zipped)
    words = refused(path)
    assert not marker.exists()
    assert words.startswith("FILE: the file asks for ") and (name in words or f"posix.{attack[3:]}" in words), words
    assert words.endswith("save its weights alone with the program that made it.")


def test_the_attacks_are_real(tmp_path, monkeypatch):
    """The same files do run where they are loaded as any pickle is: else the test above would show nothing."""
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARK", str(marker))
    for attack in ("os.system", "eval", "exec", "open", "torch.save"):
        path = save(attacks(marker)[attack][1], tmp_path / "x.pt")
        torch.load(path, weights_only=False)
        assert marker.exists(), attack
        marker.unlink()


def test_what_is_overlooked_at_first_is_refused_by_torch(tmp_path, monkeypatch):
    """The names are looked at twice: nothing hangs on the first look."""
    monkeypatch.setattr(unpickle, "_names_in", lambda path: (set(), False))
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARK", str(marker))
    for attack, (name, poison) in attacks(marker).items():
        words = refused(save({"model": poison}, tmp_path / "x.pt"))
        assert words.startswith("FILE: the file asks for ") and not marker.exists(), attack
        assert name.split(".")[-1] in words


def test_another_protocol_is_named(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt", pickle_protocol=4)
    assert refused(tmp_path / "x.pt") == (
        "FILE: the file is damaged, cut short or of an unusual form (pickle protocol 4; torch.save takes 2 unless "
        "it is told otherwise); copy or save it again."
    )


@FORMS
def test_states_that_try_something(tmp_path, monkeypatch, zipped):
    """A state may replace nothing of a stand-in's or a Namespace's workings."""

    class AnyNode:
        pass

    module_of(monkeypatch, "omegaconf.nodes", AnyNode=AnyNode)
    for state in (
        {"__class__": "x", "__reduce__": "y"},
        (None, {"__class__": dict, "state": 1}),
        [1, 2],
        "text",
    ):
        node = read_pickle(save({"cfg": Builds(AnyNode, state)}, tmp_path / "x.pt", zipped))["cfg"]
        assert isinstance(node, StandIn) and type(node).__name__ == "AnyNode"
    args = read_pickle(
        save({"args": Builds(argparse.Namespace, {"__class__": "x", "a": 1})}, tmp_path / "x.pt", zipped)
    )["args"]
    assert type(args) is argparse.Namespace and args.a == 1


@FORMS
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files(tmp_path, share, zipped):
    path = save({"model": {"w": torch.arange(3000.0)}}, tmp_path / "x.pt", zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    words = refused(path)
    assert words.startswith("FILE: the file is damaged") and words.endswith(
        ("copy or download it again.", "copy or save it again.")
    ), words


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.pt"
    assert refused(path) == "FILE: the file cannot be read (No such file or directory)."
    assert refused(tmp_path) == "FILE: this is a folder; give the file of the checkpoint in it."
    for content, words in {
        b"": "FILE: the file is empty; copy or download it again.",
        b"<html>404": "FILE: this is no file of torch.save, it begins with b'<html>40'; give a checkpoint (.pt, .bin, "
        ".ckpt).",
        pickle.dumps({"a": 1}): "FILE: this is no file of torch.save, it begins with b'\\x80\\x04\\x95\\n\\x00\\x00"
        "\\x00\\x00'; give a checkpoint (.pt, .bin, .ckpt).",
        b"PK\x03\x04nonsense": "FILE: the file is damaged, cut short or of an unusual form (File is not a zip file); "
        "copy or save it again.",
    }.items():
        path.write_bytes(content)
        assert refused(path) == words
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refused(path) == "FILE: this zip archive holds no data.pkl; give a file of torch.save."
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"program/{name}", "")
    assert refused(path) == (
        "FILE: this is a TorchScript program, which would have to be run; give the checkpoint that it was made from."
    )


@pytest.mark.parametrize("seed", range(40))
def test_damaged_pickles_give_a_sentence(tmp_path, seed):
    """Bytes changed at random: the file is read or refused, and nothing else ever happens."""
    generator = torch.Generator().manual_seed(seed)
    path = save({"model": {"w": torch.arange(4.0)}, "args": argparse.Namespace(a=1)}, tmp_path / "x.pt", seed % 2 == 0)
    data = bytearray(path.read_bytes())
    start = data.index(b"model") - 20 if seed % 2 == 0 else len(MAGIC)
    for place in torch.randint(start, start + 150, (3,), generator=generator).tolist():
        data[place % len(data)] = int(torch.randint(0, 256, (), generator=generator))
    path.write_bytes(data)
    try:
        read_pickle(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
