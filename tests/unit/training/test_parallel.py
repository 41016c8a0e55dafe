"""Shards of one process alone; several are compared in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.models.ctc import CTCModel
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.seeds import Randomness
from toolkit.training.compilation import compile_modules
from toolkit.training.devices import resolve_device
from toolkit.training.distributed import World
from toolkit.training.parallel import Replicas, Shards

SIZES = {"conv_layers": [(8, 10, 5), (8, 8, 4)], "dim": 16, "num_layers": 2, "ffn_dim": 32, "num_heads": 2,
         "pos_kernel": 4, "pos_groups": 2, "layerdrop": 0.0}  # fmt: skip


def model(**settings) -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict({"model": CTCModel(Wav2Vec2Encoder(**{**SIZES, **settings}), vocab_size=5)})


def loss_of(modules: nn.ModuleDict) -> torch.Tensor:
    waveforms = torch.randn(2, 1600, generator=torch.Generator().manual_seed(2))
    return modules["model"](waveforms, rng=Randomness(3)).log_probs.square().sum()


def gradients(modules: nn.ModuleDict) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in modules.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def sharded():
    """A sharded model and its `Shards`, made whole at the end."""
    made = []

    def make(**settings):
        modules = model(**settings)
        shards = Shards(modules, World(), resolve_device("cpu"))
        made.append(shards)
        shards.follow_frozen()
        return modules, shards

    yield make
    for shards in made:
        shards.abandon()


def test_blocks_are_given_back_after_use_and_gradients_are_sums(sharded):
    modules, _ = sharded()
    whole = model()
    blocks = modules["model"].blocks()
    loss_of(modules).backward()
    assert all(hasattr(parameter, "full_tensor") for parameter in blocks[1].parameters())
    loss_of(whole).backward()
    ours, theirs = gradients(modules), gradients(whole)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_what_no_micro_batch_used_has_no_gradient(sharded):
    modules, shards = sharded(layerdrop=0.99999)
    loss_of(modules).backward()
    used = {name for name, parameter in modules.named_parameters() if shards.has_gradient(parameter)}
    assert used and not any("layers" in name for name in used)
    shards.reduce([parameter for parameter in modules.parameters() if shards.has_gradient(parameter)])
    assert {name for name, parameter in modules.named_parameters() if parameter.grad is not None} == used
    shards.forget()
    assert not any(shards.has_gradient(parameter) for parameter in modules.parameters())


def test_frozen_parameters_thaw(sharded):
    modules, shards = sharded()
    parameters = dict(modules.named_parameters())
    head = [name for name in parameters if "head" in name]
    for name in head:
        parameters[name].requires_grad_(False)
    shards.follow_frozen()
    loss_of(modules).backward()
    assert not any(shards.has_gradient(parameters[name]) for name in head)
    for name in head:
        parameters[name].requires_grad_(True)
    shards.follow_frozen()
    loss_of(modules).backward()
    assert all(shards.has_gradient(parameters[name]) for name in head)


def test_finish_gives_back_what_there_was_and_it_can_be_sharded_again():
    modules, expected = model(), model()
    for _ in range(2):
        shards = Shards(modules, World(), resolve_device("cpu"))
        shards.follow_frozen()
        with shards.held():  # a rank without any batch
            pass
        with shards.held(), torch.no_grad():
            loss_of(modules)
        loss_of(modules).backward()
        assert isinstance(shards.finish(), Replicas)
        assert [type(part) for part in modules.modules()] == [type(part) for part in expected.modules()]
        theirs = expected.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in modules.state_dict().items())
        assert torch.equal(loss_of(modules), loss_of(expected))


@pytest.mark.parametrize("runs", [False, True])
def test_what_a_recipe_adds_to_a_sharded_model_stays(runs):
    """An attribute, and a hook that is called as often as without shards."""
    modules, calls = model(), []
    shards = Shards(modules, World(), resolve_device("cpu"))
    shards.follow_frozen()
    modules["model"].temperature = 2.0
    modules["model"].register_forward_hook(lambda *_: calls.append(1))
    if runs:
        loss_of(modules).backward()
    calls.clear()
    shards.finish()
    loss_of(modules)
    assert modules["model"].temperature == 2.0 and calls == [1]
    hooks = [hook for part in modules.modules() for hook in (*part._forward_hooks.values(),
                                                             *part._forward_pre_hooks.values())]  # fmt: skip
    assert not any("torch" in getattr(hook, "__module__", "") for hook in hooks)


def test_tied_weights_stay_tied():
    torch.manual_seed(1)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    shards = Shards(nn.ModuleDict({"model": tied}), World(), resolve_device("cpu"))
    shards.follow_frozen()
    tied(torch.ones(1, 3)).sum().backward()
    shards.finish()
    assert tied[0].weight is tied[1].weight and torch.equal(tied[0].weight, before)


def test_a_torch_that_cannot_is_told(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(ConfigError, match=r"install torch 2\.13 or later, or take --parallel ddp"):
        Shards(model(), World(), resolve_device("cpu"))


def test_blocks_are_compiled_one_by_one_inside_of_what_gathers_them(sharded):
    """By torch's own interpreter of graphs: what is compiled and what not does not hang on the code's backend."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    modules, _ = sharded(num_layers=3)
    # the convolutions and three layers; the transformer around the layers is no innermost block
    assert compile_modules(modules, by_block=True, backend=backend) == 4
    loss_of(modules).backward()
    assert graphs
    whole = model(num_layers=3)
    loss_of(whole).backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(modules)[name], gradient, rtol=1e-5, atol=1e-6)
