"""Parameter groups and the choice of the optimizer's implementation."""

import functools

import pytest
import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.training.optim import (
    LossScale,
    ParameterGroup,
    build_optimizer,
    set_frozen,
    set_learning_rates,
    takes_divisor,
    trained_parameters,
)


def modules():
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), "head": nn.Linear(3, 1)})


def test_the_first_fitting_group_takes_a_parameter():
    tree = modules()
    groups = [
        ParameterGroup(match="head", lr_factor=10.0),
        ParameterGroup(match=["*.bias", "encoder.1"], weight_decay=0.0),
    ]
    optimizer = build_optimizer(tree, functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5), groups)
    names = {id(parameter): name for name, parameter in tree.named_parameters()}
    found = {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    assert found == {
        "head": ["head.weight", "head.bias"],
        "*.bias,encoder.1": ["encoder.0.bias", "encoder.1.weight", "encoder.1.bias"],
        "rest": ["encoder.0.weight"],
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5]
    assert [group["base_lr"] for group in optimizer.param_groups] == [1.0, 0.1, 0.1]
    assert set_learning_rates(optimizer, 0.5) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05, 0.05]


def test_a_module_name_is_no_prefix_of_another_name():
    group = ParameterGroup(match="enc")
    assert not group.fits("encoder.weight", torch.zeros(2, 2)) and group.fits("enc.weight", torch.zeros(2, 2))


def test_what_the_user_froze_stays_out():
    tree = modules()
    tree["encoder"].requires_grad_(False)
    optimizer = build_optimizer(tree, torch.optim.AdamW)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert set_frozen(optimizer, 0) == [] and not tree["encoder"][0].weight.requires_grad
    tree["head"].requires_grad_(False)
    with pytest.raises(ConfigError, match="the modules have no trainable parameter; check what is frozen"):
        build_optimizer(tree, torch.optim.AdamW)


def test_a_group_that_fits_nothing_is_named():
    with pytest.raises(ConfigError, match=r"the parameter group 'decoder' fits no trainable .*encoder.0.weight"):
        build_optimizer(modules(), torch.optim.AdamW, [ParameterGroup(match="decoder")])


@pytest.mark.parametrize("values", [{"lr_factor": -1.0}, {"weight_decay": -0.1}, {"freeze_updates": -1}])
def test_negative_settings_are_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} of the parameter group"):
        ParameterGroup(match="head", **values)


def test_freezing_is_a_function_of_the_update():
    optimizer = build_optimizer(modules(), torch.optim.AdamW, [ParameterGroup(match="encoder", freeze_updates=5)])
    assert set_frozen(optimizer, 4) == ["encoder"] and len(trained_parameters(optimizer)) == 2
    assert set_frozen(optimizer, 5) == [] and len(trained_parameters(optimizer)) == 6
    assert set_frozen(optimizer, 0) == ["encoder"] and len(trained_parameters(optimizer)) == 2


def test_fused_unless_there_is_none_or_the_user_chose():
    tree = modules()
    assert takes_divisor(build_optimizer(tree, functools.partial(torch.optim.AdamW, lr=0.1)))
    assert not takes_divisor(build_optimizer(tree, functools.partial(torch.optim.AdamW, foreach=True)))
    assert not takes_divisor(build_optimizer(tree, torch.optim.RMSprop))


def test_the_loss_scale_doubles_after_its_window_and_comes_back_from_a_state():
    scale = LossScale(torch.device("cpu"), initial=4.0, window=2)
    values = []
    for overflow in (0.0, 0.0, 0.0, 1.0, 0.0, 0.0):
        scale.advance(torch.tensor(overflow))
        values.append(float(scale.value))
    assert values == [4.0, 8.0, 8.0, 4.0, 4.0, 8.0]
    again = LossScale(torch.device("cpu"))
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict()
    lowest = LossScale(torch.device("cpu"), initial=1.0, minimum=0.5)
    lowest.advance(torch.tensor(1.0))
    lowest.advance(torch.tensor(1.0))
    assert float(lowest.value) == 0.5 and bool(lowest.exhausted())


def test_settings_that_an_optimizer_stumbles_over_are_one_sentence():
    for settings in ({"betas": [0.9]}, {"lr": -1.0}, {"momentum": 0.9}):
        with pytest.raises(ConfigError, match="opt_class: AdamW cannot be made with these settings"):
            build_optimizer(modules(), functools.partial(torch.optim.AdamW, **settings))
