"""The teacher: its ramp, its moves against the closed form, what is copied, and that nothing trains it."""

import copy

import pytest
import torch
from torch import nn

from toolkit.errors import ModelError
from toolkit.nn.ema import DecayRamp, Teacher


def student_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_ten_moves_are_the_closed_form():
    ramp = DecayRamp(0.9, 0.99, 6)
    student = student_of().bfloat16()
    teacher = Teacher(student, ramp, copied=["1.*"])
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    states = [copy.deepcopy(student.state_dict())]
    for update in range(1, 11):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert teacher.move(student, update=update) == ramp.at(update)
        states.append(copy.deepcopy(student.state_dict()))
    for name, own in teacher.module.named_parameters():
        # teacher_n = prod d_k * s_0 + sum_k (1 - d_k) * prod_{j > k} d_j * s_k
        weights = [1.0]
        for update in range(1, 11):
            weights = [w * ramp.at(update) for w in weights] + [1 - ramp.at(update)]
        expected = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        expected = states[-1][name].double() if name.startswith("1.") else expected
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-6)


def test_it_is_saved_with_the_model_but_never_trained():
    model = nn.ModuleDict({"student": student_of()})
    model["teacher"] = Teacher(model["student"], DecayRamp(0.9, 0.9, 1))
    model.train()
    assert not model["teacher"].training and not model["teacher"].module[0].training and model["student"].training
    out = model["teacher"](torch.ones(2, 3))
    assert not out.requires_grad and not any(p.requires_grad for p in model["teacher"].parameters())
    again = nn.ModuleDict({"student": student_of(1)})
    again["teacher"] = Teacher(again["student"], DecayRamp(0.9, 0.9, 1))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again["teacher"](torch.ones(2, 3)), out)


def test_copy_from_takes_all():
    student, other = student_of(), student_of(3)
    teacher = Teacher(student, DecayRamp(0.9, 0.9, 1))
    teacher.copy_from(other)
    for own, theirs in zip(teacher.module.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, theirs) and own.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize(
    "values", [None, (0.9,), (0.99, 0.9, 10), (0.9, 1.1, 10), (-0.1, 0.9, 10), ("a", 1, 2), (float("nan"), 0.9, 3)]
)
def test_no_ramp(values):
    with pytest.raises(ModelError, match=r"ema_decay is .*expected"):
        DecayRamp.checked(values)


def test_steps_and_names_that_cannot_be():
    with pytest.raises(ModelError, match="ema_decay_steps is 0"):
        DecayRamp.checked((0.9, 0.99, 0))
    with pytest.raises(ModelError, match="no parameter of the student fits 'positional"):
        Teacher(student_of(), DecayRamp(0.9, 0.9, 1), copied=["positional.*"])
    assert DecayRamp.checked([1, 1, 1]).at(7) == 1.0
