"""compare.py on recordings of data2vec: that it fails where it should, and on other sizes and settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.compare import main
from tests.parity.test_compare import FIXTURES, change_meta, change_tensors, outcome
from toolkit.models.convert.common import Converted, PretrainedInfo, export_tensors
from toolkit.models.convert.fairseq import write_fairseq
from toolkit.models.convert.fairseq_names import TEACHER, TEACHERS, names_table
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import ModelConfig
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.fast.common import set_fast

KINDS = ("data2vec_audio", "data2vec_text")
STUDENT = "student_initial.safetensors"


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A copy that may be spoiled."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param, copy_function=shutil.copyfile))


def change_checkpoint(folder, change):
    contents = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(contents)
    torch.save(contents, folder / "checkpoint.pt")


def change_student(folder, change):
    tensors = load_file(folder / STUDENT)
    change(tensors)
    save_file(tensors, folder / STUDENT)


def test_a_teacher_in_the_checkpoint_that_did_not_make_these_moves(folder, capsys):
    """The numbers are of the moves made here; the file's own teacher has to be where they lead."""

    def change(contents):
        teacher = next(value for value in contents["model"].values() if isinstance(value, dict))
        teacher["layers.1.fc2.weight"] *= 1 + 1e-4

    change_checkpoint(folder, change)
    text = outcome(folder, capsys)
    assert "teacher of checkpoint.pt" in text and "1 outside, 0 not compared" in text


def test_a_student_in_the_checkpoint_that_was_not_changed_by_the_rule(folder, capsys):
    name = "final_proj.bias" if folder.name == "data2vec_audio" else "encoder.regression_head.2.bias"

    def change(contents):
        contents["model"][name] += 1e-5

    change_checkpoint(folder, change)
    text = outcome(folder, capsys)
    assert "student of checkpoint.pt" in text and "1 outside, 0 not compared" in text


def test_another_beginning(folder, capsys):
    """A change of one in ten thousand in the first student is seen in the teacher, and behind it everywhere."""

    def change(tensors):
        name = next(name for name in tensors if name.endswith("layers.1.fc2.weight"))
        tensors[name] = tensors[name] * (1 + 1e-4)

    change_student(folder, change)
    text = outcome(folder, capsys)
    assert "teacher of checkpoint.pt" in text and "student of checkpoint.pt" in text and "OUTSIDE" in text


def test_one_move_too_few_or_another_ramp(folder, capsys):
    def change(contents):
        contents["cfg"]["model"]["ema_anneal_end_step"] = 11

    change_checkpoint(folder, change)
    text = outcome(folder, capsys)
    for name in ("scalars.decay_used.1", "scalars.decay_schedule.4", "scalars.ema_decay_logged_x1000"):
        assert f"  {name} " in text
    assert "  ema3.layers.0.self_attn.k_proj.weight" in text and "  ema0." not in text


@pytest.mark.parametrize("key", ["layer_norm_targets", "instance_norm_targets"])
def test_other_norms(key, folder, capsys):
    def change(contents):
        contents["cfg"]["model"][key] = True

    change_checkpoint(folder, change)
    text = outcome(folder, capsys)
    assert "  mid.target " in text and "  scalars.loss_sum " in text and "  mid.pred " not in text


def test_a_recorded_name_that_nothing_is_said_of(folder, capsys):
    change_tensors(folder, lambda tensors: tensors.update({"ema4c.all": tensors["out.loss"].clone()}))
    change_meta(folder, lambda meta: meta["scalars"].update(other_var=0.5))
    text = outcome(folder, capsys)
    assert text.count("NOT COMPARED") == 2 and "2 not compared" in text


def test_the_student_and_the_rule_have_to_be_there(folder, capsys):
    change_student(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    assert "is missing or of another shape; copy the file again." in outcome(folder, capsys)
    (folder / STUDENT).write_bytes(b"no tensors")
    assert f"{STUDENT}: this is no whole safetensors file" in outcome(folder, capsys)
    (folder / STUDENT).unlink()
    text = outcome(folder, capsys)
    assert text.endswith(f"{STUDENT} is missing, and the moves of the teacher cannot be made without it.\n")
    change_meta(folder, lambda meta: meta.pop("student_change_rule"))
    assert "no rule by which the student changes between the moves of its teacher" in outcome(folder, capsys)


def test_a_file_without_its_teacher_is_no_case(folder, capsys):
    def change(contents):
        contents["model"] = {key: value for key, value in contents["model"].items() if not isinstance(value, dict)}

    change_checkpoint(folder, change)
    kind = {"data2vec_audio": "Wav2Vec2Encoder", "data2vec_text": "TextEncoder"}[folder.name]
    assert f"meta.json says {folder.name}, but the file holds a {kind}." in outcome(folder, capsys)


# Other sizes and settings, recorded here by our plain formulas


def speech(*, layers=2, pos_depth=2, **changes):
    encoder = Wav2Vec2Encoder(
        conv_layers=[[12, 10, 5], [12, 3, 2], [12, 4, 4]], extractor_norm="layer", norm_over_padding=True, dim=20,
        num_layers=layers, ffn_dim=24, num_heads=5, pos_kernel=14, pos_groups=2, pos_depth=pos_depth, min_masks=1,
        feature_grad_mult=0.5,
    )  # fmt: skip
    return Data2VecAudio(encoder, ema_timing="fairseq", **changes)


def writing(*, layers=2, **changes):
    encoder = TextEncoder(vocab_size=30, dim=20, num_layers=layers, ffn_dim=24, num_heads=5, max_positions=40)
    return Data2VecText(encoder, mask_id=29, ema_timing="fairseq", teacher_input="fairseq", **changes)


MODELS = {
    "all layers, two norms": lambda: speech(
        top_layers=2, layer_norms=["instance", "layer"], target_norms=["layer", "instance"], ema_decay=[0.5, 0.8, 3]
    ),
    "one of four layers, smooth": lambda: speech(
        layers=4, pos_depth=5, top_layers=1, layer_norms=["layer"], loss_beta=0.5, loss_scale=2.0,
        ema_decay=[0.9, 0.9, 1], ema_layers_only=False,
    ),
    "text, a single product": lambda: writing(head_layers=1, top_layers=1, loss_scale=None, ema_decay=[0.5, 0.8, 3]),
    "text, all layers": lambda: writing(
        layers=3, top_layers=3, layer_norms=[], target_norms=["layer"], loss_beta=0.0, ema_layers_only=False
    ),
}  # fmt: skip


def inputs_of(model):
    """(recorded tensors, arguments of the model)."""
    generator = torch.Generator().manual_seed(5)
    if isinstance(model, Data2VecAudio):
        lengths = torch.tensor([1500, 2222, 1900])
        waveforms = torch.randn(3, 2222, generator=generator)
        padding = torch.arange(2222) >= lengths[:, None]
        waveforms[padding] = 0
        frames = int(model.encoder.frame_lengths(torch.tensor([2222])))
        mask = torch.zeros(3, frames, dtype=torch.bool)
        mask[:, 3:8] = True
        mask[1, 20:24] = True
        tensors = {"in.source": waveforms, "in.padding_mask": padding, "rand.mask_indices": mask}
        return tensors, {"waveforms": waveforms, "lengths": lengths, "time_mask": mask}
    tokens = torch.randint(4, 29, (3, 12), generator=generator)
    tokens[1, 9:] = 1
    chosen = (torch.rand(3, 12, generator=generator) < 0.4) & (tokens != 1)
    source = tokens.masked_fill(chosen, 29)
    target = tokens.masked_fill(~chosen, 1)
    tensors = {"in.src_tokens": source, "in.target_tokens": target, "in.full_tokens": tokens}
    return tensors, {"source": source, "tokens": tokens, "chosen": chosen}


def stir(model):
    """No parameter at its default, nothing dropped, by the plain formulas."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    set_fast(model.train(), False)
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "dropout_input", "layerdrop"):
            if hasattr(module, name):
                setattr(module, name, 0.0)


def record(folder, model, kind):
    """The files of a recording with two moves and the one more that an accumulated micro-batch makes."""
    folder.mkdir()
    stir(model)
    student = model.encoder.transformer if kind == "data2vec_audio" else model.encoder
    model.teacher.copy_from(student)
    tensors, arguments = inputs_of(model)
    table = names_table(kind, model.config)

    def named(tensors):
        return {name: value.detach().clone() for name, value in export_tensors(table, dict(tensors)).items()}

    def teacher(prefix):
        own = named((name, value) for name, value in model.state_dict().items() if name.startswith(TEACHER))
        return {prefix + name.removeprefix(TEACHERS[kind]): value for name, value in own.items()}

    first = named((name, value) for name, value in model.state_dict().items() if not name.startswith(TEACHER))
    save_file(first, folder / STUDENT)
    tensors |= teacher("ema0.")
    for move in (1, 2):
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(1 + 0.02 * move)
        if move == 1:
            model.teacher.move(student, update=1)
            tensors |= teacher("ema1.")
    out = model(**arguments, update=2)
    tensors |= teacher("ema2.")
    out.loss_sum.backward()
    gradients = named((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    tensors |= {f"grad.{name}": value for name, value in gradients.items() if not name.endswith("k_proj.bias")}
    tensors |= {"mid.target": out.targets, "mid.pred": out.predictions, "out.loss": out.loss_sum}
    converted = Converted(
        ModelConfig(kind, model.config, 16000 if kind == "data2vec_audio" else 0, False, None, {}),
        {name: value.clone() for name, value in model.state_dict().items()},
        PretrainedInfo(kind, "toolkit", 16000, False),
    )
    write_fairseq(converted, folder / "checkpoint.pt")
    model(**arguments, update=2)
    tensors |= teacher("ema2b.")
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, folder / "tensors.safetensors")
    ramp = model.teacher.decay
    meta = {
        "model_config": torch.load(folder / "checkpoint.pt", weights_only=True)["cfg"]["model"],
        "student_change_rule": "before EMA step k (k=1,2) every student parameter is multiplied by 1+0.02*k",
        "scalars": {
            "loss_sum": float(out.loss_sum.detach()), "sample_size": out.num_masked, "target_var":
            float(out.target_deviation), "decay_used": {"0": None, "1": ramp.at(1), "2": ramp.at(2)},
            "ema_decay_logged_x1000": 1000 * ramp.at(2),
        },
        "tensors": {name: {"shape": list(value.shape)} for name, value in tensors.items()},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return len(tensors)


@pytest.mark.parametrize("case", MODELS)
def test_other_sizes_and_settings(case, tmp_path, capsys):
    torch.manual_seed(2)
    kind = "data2vec_text" if case.startswith("text") else "data2vec_audio"
    assert record(tmp_path / "case", MODELS[case](), kind) > 80
    code = main([str(tmp_path / "case")])
    captured = capsys.readouterr()
    assert code == 0, captured.out[-3000:] + captured.err
    assert " 0 outside, 0 not compared" in captured.out
