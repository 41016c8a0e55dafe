"""The classifier of text: its arithmetic, its dropout, its folder, and the encoder that it takes over."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.errors import CheckpointError, ModelError
from toolkit.models.build import build_model
from toolkit.models.convert.load import build_text_encoder, load_pretrained
from toolkit.models.convert.read import read_pretrained
from toolkit.models.convert.write import write_pretrained
from toolkit.models.ctc import CTCModel
from toolkit.models.data2vec import Data2VecText
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import read_model_config, save_model_folder
from toolkit.models.text_classifier import TextClassifier, classification_loss
from toolkit.models.text_encoder import TextEncoder
from toolkit.seeds import Randomness

SETTINGS = {"vocab_size": 30, "dim": 16, "num_layers": 2, "ffn_dim": 24, "num_heads": 2, "max_positions": 12}
TOKENS = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1], [0, 9, 10, 2, 1]])


def classifier(num_classes=3, **keys):
    torch.manual_seed(0)
    return TextClassifier(TextEncoder(**SETTINGS), num_classes, **keys)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_logits_are_those_of_the_first_tokens_features(packed):
    model = classifier().eval()
    model.encoder.short_length = 0 if packed else 1000
    with torch.no_grad():
        first = model.encoder(TOKENS).features[:, 0]
        inner = torch.tanh(first @ model.dense.weight.T + model.dense.bias)
        expected = inner @ model.head.weight.T + model.head.bias
        assert model(TOKENS).shape == (3, 3)
        torch.testing.assert_close(model(TOKENS), expected)
        # alone as in the batch
        torch.testing.assert_close(model(TOKENS[1:2, :3]), expected[1:2])


def test_the_loss_is_a_sum_over_texts_and_all_weights_learn():
    model, labels = classifier(), torch.tensor([0, 2, 2])
    logits = model(TOKENS)
    loss, count = classification_loss(logits, labels)
    expected = -torch.log_softmax(logits, 1)[torch.arange(3), labels].sum()
    assert count == 3 and loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_both_layers_of_the_head_drop_in_training_alone():
    model, rng = classifier(dropout=0.5), Randomness(3).child("update", 0, 0)
    # The encoder as a constant, so that all that differs is the head's.
    model.encoder.forward = lambda tokens, **_: type("E", (), {"features": torch.ones(len(tokens), 16)})()
    model.train()
    assert torch.equal(model(TOKENS, rng=rng), model(TOKENS, rng=rng))
    assert not torch.equal(model(TOKENS, rng=rng), model(TOKENS, rng=Randomness(4).child("update", 0, 0)))
    assert torch.equal(model(TOKENS), model.eval()(TOKENS, rng=rng))
    model.train()
    with torch.no_grad():
        model.dense.weight.zero_()
        model.dense.bias.fill_(1.0)
    rows = model(TOKENS.repeat(20, 1), rng=rng)
    assert len(rows.unique(dim=0)) > 20, "no dropout before the last layer"
    with torch.no_grad():
        model.dense.weight.fill_(0.05)
        model.head.weight.fill_(1.0)
    inner = []
    model.head.register_forward_pre_hook(lambda _, inputs: inner.append(inputs[0][inputs[0] > 0]))
    model(TOKENS.repeat(20, 1), rng=rng)
    assert len(inner[0].unique()) > 3, "no dropout before the dense layer"


def test_settings_that_make_no_classifier_and_a_row_of_padding():
    with pytest.raises(ModelError, match=r"^num_classes is 1; expected at least 2\.$"):
        classifier(1)
    with pytest.raises(ModelError, match=r"^dropout is 1\.5; expected a drop probability from 0 to below 1\.$"):
        classifier(dropout=1.5)
    with pytest.raises(ModelError, match=r"^a row begins with padding; put a text's tokens first, <s> before them\.$"):
        classifier()(torch.tensor([[0, 5, 2], [1, 1, 1]]))


def test_a_folder_gives_the_same_model_and_keeps_the_labels(tmp_path):
    model = classifier(dropout=0.2).eval()
    extra = {"labels": ["a", "b", "c"]}
    save_model_folder(
        tmp_path / "m", model, kind="text_classifier", sample_rate=0, normalize=False, extra=extra
    )
    assert read_model_config(tmp_path / "m").extra == extra
    again, info = load_pretrained(tmp_path / "m")
    assert isinstance(again, TextClassifier) and again.config == model.config and info.kind == "text_classifier"
    assert torch.equal(again(TOKENS), model(TOKENS)) and info.labels == ("a", "b", "c")
    with pytest.raises(CheckpointError, match="make no model of kind 'text_classifier'"):
        build_model("text_classifier", model.config | {"classes": 3}, source="here")


@pytest.mark.parametrize("kind", ["text_encoder", "data2vec_text", "text_classifier"])
def test_the_encoder_of_every_kind_of_text_model(kind, tmp_path):
    torch.manual_seed(1)
    encoder = TextEncoder(**SETTINGS)
    whole = {
        "text_encoder": lambda: encoder,
        "data2vec_text": lambda: Data2VecText(encoder, mask_id=29, top_layers=1),
        "text_classifier": lambda: TextClassifier(encoder, 2),
    }[kind]()
    save_model_folder(tmp_path / "m", whole, kind=kind, sample_rate=0, normalize=False)
    found = build_text_encoder(read_pretrained(tmp_path / "m"), tmp_path / "m", dropout=0.3)
    assert found.dropout == 0.3 and found.config["dropout"] == 0.3
    assert torch.equal(found.eval()(TOKENS).features, encoder.eval()(TOKENS).features)


@pytest.mark.parametrize(("form", "words"), [("huggingface", "Hugging Face folder"), ("fairseq", "fairseq checkpoint")])
def test_what_other_programs_cannot_hold_is_told(form, words, tmp_path):
    save_model_folder(tmp_path / "m", classifier(), kind="text_classifier", sample_rate=0, normalize=False)
    with pytest.raises(CheckpointError) as error:
        write_pretrained(read_pretrained(tmp_path / "m"), tmp_path / "out.pt", to=form)
    assert str(error.value) == f"a model of kind 'text_classifier' cannot be written as a {words}; its encoder can."
    assert not (tmp_path / "out.pt").exists()


def test_a_model_of_speech_has_no_text_encoder(tmp_path):
    speech = Wav2Vec2Encoder(
        conv_layers=[(8, 10, 5)], dim=8, num_layers=1, ffn_dim=8, num_heads=2, pos_kernel=4, pos_groups=2
    )
    save_model_folder(tmp_path / "m", CTCModel(speech, 5), kind="ctc", sample_rate=16000, normalize=False)
    with pytest.raises(CheckpointError) as error:
        build_text_encoder(read_pretrained(tmp_path / "m"), tmp_path / "m")
    assert str(error.value) == f"{tmp_path / 'm'}: this is a model of speech, of kind 'ctc'; give one of text."


def test_it_learns_which_token_a_text_holds():
    torch.manual_seed(2)
    model = TextClassifier(TextEncoder(**SETTINGS, dropout=0.0, attention_dropout=0.0), 2, dropout=0.0)
    tokens = torch.randint(6, 30, (64, 10))
    labels = torch.arange(64) % 2
    tokens[torch.arange(64), torch.randint(1, 9, (64,))] = 4 + labels
    tokens[:, 0], tokens[:, -1] = 0, 2
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    assert (model(tokens).argmax(1) == labels).float().mean() > 0.95
