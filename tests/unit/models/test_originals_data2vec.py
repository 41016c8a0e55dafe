"""data2vec recorded from the original implementation: the student's pass, the step, its gradients, the teacher's moves.

tests/parity/compare.py compares everything that is recorded; here the parts stand by themselves, with tighter limits.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.models.originals import FOLDER, assert_gradients, by_original_names, original, recorded
from toolkit.models.convert.common import import_tensors
from toolkit.models.convert.fairseq_names import TEACHER, TEACHERS, names_table
from toolkit.nn.fast.common import set_fast

CASES = ("data2vec_audio", "data2vec_text")
UPDATE = 3
"""Of the recorded step."""


@pytest.mark.parametrize("fast", [True, False])
def test_audio(fast):
    _, tensors = recorded("data2vec_audio")
    encoder = set_fast(original("data2vec_audio").encoder, fast)
    assert encoder.config["always_project"]  # its features have the transformer's width already
    with torch.no_grad():
        out = encoder(tensors["in.source"], tensors["in.lengths"], time_mask=tensors["rand.mask_indices"], layers=True)
    real = ~tensors["mid.frame_padding_mask"]
    assert out.frame_lengths.tolist() == real.sum(1).tolist()

    def close(ours, theirs):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-4)

    close(out.projected, tensors["mid.encoder_in"])
    for i, (layer, _) in enumerate(out.layers):
        close(layer, tensors[f"mid.student_layer{i}"].transpose(0, 1))
    close(out.features, tensors["mid.student_out"])


def test_text():
    _, tensors = recorded("data2vec_text")
    encoder = original("data2vec_text").encoder
    tokens = tensors["in.src_tokens"]
    with torch.no_grad():
        out = encoder(tokens, layers=True)
    real = tokens != 1
    torch.testing.assert_close(out.features[real], tensors["mid.student_out"][real], rtol=0, atol=1e-4)
    for i, (layer, _) in enumerate(out.layers):
        theirs = tensors[f"mid.student_layer{i}"].transpose(0, 1)
        torch.testing.assert_close(layer[real], theirs[real], rtol=0, atol=1e-4)


def stepped(case, fast, teacher_input="fairseq"):
    """The step in the state of the checkpoint, which is that after the last move: (meta, tensors, model, output)."""
    meta, tensors = recorded(case)
    model = set_fast(original(case), fast)
    model.ema_timing = "step"
    if case == "data2vec_audio":
        inputs = tensors["in.source"], tensors["in.lengths"]
        return meta, tensors, model, model(*inputs, time_mask=tensors["rand.mask_indices"], update=UPDATE)
    assert model.mask_id == meta["mask_idx"]
    model.teacher_input = teacher_input
    return meta, tensors, model, model(tensors["in.src_tokens"], tensors["in.full_tokens"], update=UPDATE)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_step(case, fast):
    meta, tensors, model, out = stepped(case, fast)
    scalars = meta["scalars"]
    torch.testing.assert_close(out.targets, tensors["mid.target"], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.predictions, tensors["mid.pred"], rtol=0, atol=2e-5)
    assert float(out.loss_sum.detach()) == pytest.approx(scalars["loss_sum"], rel=1e-6)
    assert out.num_masked == scalars["sample_size"]
    assert 1000 * out.decay == pytest.approx(scalars["ema_decay_logged_x1000"], rel=1e-12)
    if case == "data2vec_audio":
        assert float(out.target_deviation) == pytest.approx(scalars["target_var"], rel=1e-6)
        assert float(out.prediction_deviation) == pytest.approx(scalars["pred_var"], rel=1e-6)
    out.loss_sum.backward()
    assert_gradients(case, model, tensors)
    ours = by_original_names(case, model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    norms = {name: norm for name, norm in scalars["grad_norms_all"].items() if not name.endswith("k_proj.bias")}
    assert {name: float(ours[name].norm()) for name in norms} == pytest.approx(norms, rel=1e-5)
    # every parameter that the original trains, and no other
    assert ours.keys() == scalars["grad_norms_all"].keys()


@pytest.mark.parametrize("fast", [True, False])
def test_step_of_text_with_the_papers_teacher(fast):
    meta, tensors, _, out = stepped("data2vec_text", fast, teacher_input="paper")
    torch.testing.assert_close(out.targets, tensors["full.mid.target"], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.predictions, tensors["full.mid.pred"], rtol=0, atol=2e-5)
    assert float(out.loss_sum.detach()) == pytest.approx(meta["scalars"]["full.loss_sum"], rel=1e-6)


def at_the_beginning(case):
    """The student that the first teacher was made of, and a teacher of it."""
    model = original(case)
    weights = load_file(FOLDER / case / "student_initial.safetensors")
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(TEACHER)}
    shapes = {name: value.shape for name, value in own.items()}
    tensors, missing, _ = import_tensors(names_table(case, model.config), weights, shapes)
    assert not missing
    model.load_state_dict(tensors, strict=False)
    student = model.encoder.transformer if case == "data2vec_audio" else model.encoder
    model.teacher.copy_from(student)
    return model, student


def named(case, model, module):
    """Copies of the tensors of a teacher, or of its student, by the names that the original gives a teacher's."""
    tensors = {TEACHER + name: value.clone() for name, value in module.state_dict().items()}
    return {
        name.removeprefix(TEACHERS[case]): value for name, value in by_original_names(case, model, tensors).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_moves_of_the_teacher(case):
    meta, tensors = recorded(case)
    model, student = at_the_beginning(case)
    compared = []

    def compare(prefix):
        ours = named(case, model, model.teacher.module)
        assert ours.keys() == set(meta["teacher_keys"]) - {"version"}
        for name in (name for name in tensors if name.startswith(prefix)):
            torch.testing.assert_close(ours[name.removeprefix(prefix)], tensors[name], rtol=0, atol=5e-7, msg=name)
            compared.append(name)

    compare("ema0.")
    for move in (1, 2, 3):
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(1 + 0.01 * move)
        decay = model.teacher.move(student, update=move)
        assert decay == pytest.approx(meta["scalars"]["decay_used"][str(move)], rel=1e-12)
        compare(f"ema{move}.")
    ours, theirs = (named(case, model, module) for module in (model.teacher.module, student))
    same = {name for name, value in ours.items() if torch.equal(value, theirs[name])}
    assert same == set(meta["keys_copied_not_averaged"])
    model.teacher.move(student, update=3)
    compare("ema3b.")
    assert set(compared) == {name for name in tensors if name.startswith("ema")}


@pytest.mark.parametrize("case", CASES)
def test_decay_schedule(case):
    meta, _ = recorded(case)
    ramp = original(case).teacher.decay
    assert {n: ramp.at(int(n)) for n in meta["scalars"]["decay_schedule"]} == pytest.approx(
        meta["scalars"]["decay_schedule"], rel=1e-12
    )
