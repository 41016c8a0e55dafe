"""The encoder of text: the recorded numbers of the original, transformers' model, packing, padding, dropout."""

import pytest
import torch
import transformers

from tests.unit.models.originals import original_tensors, recorded
from toolkit.errors import CheckpointError, ModelError
from toolkit.models.build import build_model
from toolkit.models.convert import load_encoder, load_pretrained
from toolkit.models.model_files import read_model_config, save_model_folder
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.fast import set_fast
from toolkit.seeds import Randomness

SETTINGS = {"vocab_size": 30, "dim": 16, "num_layers": 3, "ffn_dim": 24, "num_heads": 2, "max_positions": 12}
DOUBLE = torch.float64
RNG = Randomness(5).child("update", 3, 0)
BOTH_LAYOUTS = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])

# What the original calls each tensor, and transformers; {} is the layer.
FAIRSEQ = {
    "token_embedding": ("embed_tokens",),
    "position_embedding": ("embed_positions",),
    "embedding_norm": ("layernorm_embedding",),
    "layers.{}.qkv": tuple(f"layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "layers.{}.out": ("layers.{}.self_attn.out_proj",),
    "layers.{}.attention_norm": ("layers.{}.self_attn_layer_norm",),
    "layers.{}.fc1": ("layers.{}.fc1",),
    "layers.{}.fc2": ("layers.{}.fc2",),
    "layers.{}.final_norm": ("layers.{}.final_layer_norm",),
}
HUGGING_FACE = {
    "token_embedding": ("embeddings.word_embeddings",),
    "position_embedding": ("embeddings.position_embeddings",),
    "token_type_embedding": ("embeddings.token_type_embeddings",),
    "embedding_norm": ("embeddings.LayerNorm",),
    "layers.{}.qkv": tuple(f"encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")),
    "layers.{}.out": ("encoder.layer.{}.attention.output.dense",),
    "layers.{}.attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
    "layers.{}.fc1": ("encoder.layer.{}.intermediate.dense",),
    "layers.{}.fc2": ("encoder.layer.{}.output.dense",),
    "layers.{}.final_norm": ("encoder.layer.{}.output.LayerNorm",),
}


def fill(model, table, weights):
    """Foreign weights into ours: each of the model's tensors must be there."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, kind = name.rsplit(".", 1)
            layer = stem.split(".")[1] if stem.startswith("layers.") else ""
            theirs = table[stem.replace(f".{layer}.", ".{}.") if layer else stem]
            value = torch.cat([weights[f"{part.format(layer)}.{kind}"] for part in theirs])
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
    return model


def build(dtype=DOUBLE, *, packed=True, **options):
    torch.manual_seed(0)
    model = TextEncoder(**SETTINGS | options).to(dtype)
    model.short_length = 0 if packed else 1000
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero biases and unit norms, so that each matters
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sentences(*lengths, longest=None):
    """Random tokens (no padding among them), padded on the right with 1."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.full((len(lengths), longest or max(lengths)), 1)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(4, 30, (length,), generator=generator)
    return tokens


def gradients(model, tokens, **options):
    out = model(tokens, rng=RNG, **options).features
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=DOUBLE)).view(out.shape)).sum()
    return out, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@BOTH_LAYOUTS
@pytest.mark.parametrize("use_fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(
    ("case", "tokens", "who"),
    [
        ("mid.student", "in.src_tokens", "encoder.sentence_encoder."),
        # the teacher as released sees the masked tokens alone: padding between tokens, and positions close ranks
        ("mid.teacher", "in.target_tokens", "encoder._ema."),
        ("full.mid.teacher", "in.full_tokens", "encoder._ema."),
    ],
    ids=["student", "teacher", "teacher of all tokens"],
)
def test_recorded_run_of_the_original(case, tokens, who, use_fast, packed):
    meta, tensors = recorded("data2vec_text")
    weights = original_tensors("data2vec_text")
    config = meta["model_config"]["transformer"]["encoder"]
    settings = {
        "vocab_size": len(meta["symbols"]), "dim": config["embed_dim"], "num_layers": config["layers"],
        "ffn_dim": config["ffn_embed_dim"], "num_heads": config["attention_heads"],
        "max_positions": meta["model_config"]["max_positions"],
    }  # fmt: skip
    mine = {name.removeprefix(who): value for name, value in weights.items() if name.startswith(who)}
    model = set_fast(fill(TextEncoder(**settings), FAIRSEQ, mine), use_fast).eval()
    model.short_length = 0 if packed else 1000
    tokens = tensors[tokens]
    real = tokens != 1
    out = model(tokens, layers=True)
    assert torch.equal(out.padding, ~real) and len(out.layers) == config["layers"]
    compared = 0
    for layer, pair in enumerate(out.layers):
        for name, ours in zip((f"{case}_layer{layer}", f"{case}_ffn{layer}"), pair, strict=True):
            if name in tensors:
                wanted = tensors[name].transpose(0, 1)  # length first
                assert float((ours - wanted)[real].detach().abs().max()) < 1e-5, name
                compared += 1
    assert compared >= config["layers"]
    assert torch.equal(out.features, out.layers[-1][0])
    if f"{case}_emb" in tensors:
        embeddings = fill(TextEncoder(**settings | {"num_layers": 0}), FAIRSEQ, mine).eval()(tokens)
        assert float((embeddings.features - tensors[f"{case}_emb"].transpose(0, 1))[real].detach().abs().max()) < 1e-5
    if f"{case}_out" in tensors:
        assert float((out.features - tensors[f"{case}_out"])[real].detach().abs().max()) < 1e-5


@BOTH_LAYOUTS
def test_hidden_states_of_transformers(packed):
    config = transformers.Data2VecTextConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=14, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Data2VecTextModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    weights = dict(theirs.state_dict())
    ours = fill(build(torch.float32, packed=packed, token_types=1), HUGGING_FACE, weights).eval()
    tokens = sentences(12, 7, 1, 10)
    real = tokens != 1
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=real.long(), output_hidden_states=True)
        out = ours(tokens, layers=True)
    assert len(wanted.hidden_states) == 1 + len(out.layers)
    for hidden, (output, _) in zip(wanted.hidden_states[1:], out.layers, strict=True):
        assert float((hidden - output)[real].detach().abs().max()) < 1e-5
    assert float((wanted.last_hidden_state - out.features)[real].detach().abs().max()) < 1e-5


@BOTH_LAYOUTS
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 12)])
@pytest.mark.parametrize("options", [{}, {"activation_dropout": 0.2, "layerdrop": 0.3}])
def test_fast_equals_plain_with_dropout(lengths, options, packed):
    model, tokens = build(packed=packed, **options), sentences(*lengths)
    (ours, own_grads), (plain, grads) = gradients(model, tokens), gradients(set_fast(model, False), tokens)
    assert torch.allclose(ours, plain)
    for a, b in zip(own_grads, grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(ours, model(tokens).features), "something was dropped"


def test_packed_equals_padded():
    tokens = sentences(12, 5, 8)
    options = {"dropout": 0.0, "attention_dropout": 0.0}
    (ours, own_grads), (padded, grads) = (gradients(build(packed=p, **options), tokens) for p in (True, False))
    assert torch.allclose(ours, padded)
    for a, b in zip(own_grads, grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@BOTH_LAYOUTS
def test_each_sentence_gets_what_it_gets_alone(packed):
    model = build(packed=packed).eval()
    tokens = sentences(12, 5, 8)
    together = model(tokens, layers=True)
    for row, length in enumerate((12, 5, 8)):
        alone = model(tokens[row : row + 1, :length], layers=True)
        assert torch.allclose(together.features[row, :length], alone.features[0])
        assert not together.features[row, length:].any()
        for pair, single in zip(together.layers, alone.layers, strict=True):
            for a, b in zip(pair, single, strict=True):
                assert torch.allclose(a[row, :length], b[0]) and not a[row, length:].any()


@BOTH_LAYOUTS
def test_padding_may_stand_anywhere(packed):
    model = build(packed=packed).eval()
    right = torch.tensor([[5, 6, 7, 1, 1], [8, 9, 1, 1, 1], [1, 1, 1, 1, 1]])
    mixed = torch.tensor([[1, 5, 1, 6, 7], [8, 1, 1, 1, 9], [1, 1, 1, 1, 1]])
    wanted, ours = model(right).features, model(mixed).features
    assert torch.allclose(ours[mixed != 1], wanted[right != 1])
    assert not ours[mixed == 1].any() and torch.isfinite(ours).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, mixed)[1])


@BOTH_LAYOUTS
def test_padding_learns_nothing(packed):
    model = build(packed=packed)
    _, grads = gradients(model, sentences(12, 5))
    for name in ("token_embedding.weight", "position_embedding.weight"):
        gradient = dict(zip(dict(model.named_parameters()), grads, strict=True))[name]
        assert gradient.any() and not gradient[1].any()


@BOTH_LAYOUTS
@pytest.mark.parametrize("options", [{}, {"num_layers": 0}, {"gradient_checkpointing": True}])
def test_wanted_positions_are_those_of_the_whole(options, packed):
    model = build(packed=packed, **options).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 1, 10, 1], [11, 12, 1, 1]])
    positions = torch.tensor([1, 3, 6, 9])
    whole = model(tokens)
    part = model(tokens, positions=positions)
    assert torch.allclose(part.features, whole.features.flatten(0, 1)[positions])
    with_layers = model(tokens, positions=positions, layers=True)
    assert torch.allclose(with_layers.features, part.features) and len(with_layers.layers) == len(model.layers)


@BOTH_LAYOUTS
def test_checkpointing_draws_the_same_dropout(packed):
    tokens, options = sentences(9, 6), {"activation_dropout": 0.2, "layerdrop": 0.3, "packed": packed}
    usual, again = (
        gradients(build(gradient_checkpointing=flag, **options), tokens)[1] for flag in (False, True)
    )
    for a, b in zip(usual, again, strict=True):
        assert torch.equal(a, b)


@BOTH_LAYOUTS
def test_bfloat16_is_near_float32(packed):
    model = build(torch.float32, packed=packed, dropout=0.0, attention_dropout=0.0)
    tokens = sentences(12, 7)
    expected, wanted = gradients(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = gradients(model, tokens)
    assert out.dtype == torch.bfloat16
    assert float(((out.float() - expected).norm() / expected.norm()).detach()) < 0.03
    for gradient, reference in zip(grads, wanted, strict=True):
        assert gradient.dtype == torch.float32
        if reference.norm() > 1:
            assert float((gradient - reference).norm() / reference.norm()) < 0.1


def test_evaluation_mode_drops_nothing():
    model, tokens = build(), sentences(9)
    assert torch.equal(model(tokens, rng=RNG).features, model(tokens, rng=RNG).features)
    assert not torch.equal(model(tokens, rng=RNG).features, model(tokens).features)
    assert torch.equal(model.eval()(tokens, rng=RNG).features, model(tokens).features)


def test_embeddings_are_dropped_too():
    model, tokens = build(num_layers=0, dropout=0.5), torch.full((1, 12), 5)
    out, whole = model(tokens, rng=RNG).features, model.eval()(tokens).features
    dropped = out == 0
    assert 0.3 < float(dropped.double().mean()) < 0.7
    assert torch.allclose(out[~dropped], 2 * whole[~dropped])


def test_initialization_is_that_of_bert():
    model = TextEncoder(vocab_size=500, dim=64, num_layers=1, ffn_dim=64, num_heads=4, max_positions=300, padding_id=3)
    assert model.position_embedding.weight.shape == (304, 64)
    for embedding in (model.token_embedding, model.position_embedding):
        weight = embedding.weight.detach()
        assert abs(float(weight.std()) - 0.02) < 0.0005 and not weight[3].any()
    names = {"token_embedding.weight", "position_embedding.weight", "embedding_norm.weight", "embedding_norm.bias"}
    parts = ("qkv", "out", "attention_norm", "fc1", "fc2", "final_norm")
    names |= {f"layers.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert model.state_dict().keys() == names


def test_a_loaded_model_is_the_saved_one(tmp_path):
    model = build(torch.float32).eval()
    save_model_folder(tmp_path / "m", model, kind="text_encoder", sample_rate=0, normalize=False)
    loaded = load_pretrained(tmp_path / "m")[0]
    assert loaded.config == model.config and read_model_config(tmp_path / "m").sample_rate == 0
    loaded.short_length = 0
    tokens = sentences(9, 4)
    assert torch.equal(loaded(tokens).features, model(tokens).features)
    with pytest.raises(CheckpointError, match="this is a model of text, of kind 'text_encoder'; give one of speech"):
        load_encoder(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"sample_rate": 0', '"sample_rate": 16000'))
    with pytest.raises(CheckpointError, match="sample_rate is 16000, expected 0, for it is of text"):
        read_model_config(tmp_path / "m")
    with pytest.raises(CheckpointError, match="make no model of kind 'text_encoder'"):
        build_model("text_encoder", {"vocab_size": 5, "conv_layers": []}, source="here")


def test_the_last_layers_can_start_anew():
    model = build()
    before = model.layers[2].fc1.weight.clone()
    model.reset_layers(1)
    assert not torch.equal(model.layers[2].fc1.weight, before) and not model.layers[2].fc1.bias.any()
    with pytest.raises(ModelError, match="4 layers cannot be reset; the encoder has 3"):
        model.reset_layers(4)


def test_input_is_checked():
    model = build()
    with pytest.raises(ModelError, match="a row holds 13 tokens, but the model has 12 positions; cut the text"):
        model(sentences(4, 13))
    assert model(sentences(4, 12, longest=20)).features.shape == (2, 20, 16), "padding takes no positions"
    with pytest.raises(ModelError, match="the token id 30 is outside the model's vocabulary of 30"):
        model(torch.tensor([[5, 30]]))
    with pytest.raises(ModelError, match="the token id -1 is outside"):
        model(torch.tensor([[5, -1]]))
    with pytest.raises(ModelError, match=r"the tokens are \(2,\) of int32; expected \(batch, length\) int64"):
        model(torch.tensor([5, 6], dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 3}, "no multiple of its num_heads 3"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"padding_id": 30}, "padding_id is 30, expected one of the 30 token ids"),
        ({"layerdrop": 1.0}, r"layerdrop is 1\.0"),
        ({"max_positions": 1.5}, r"max_positions is 1\.5"),
    ],
)
def test_settings_are_checked(changes, sentence):
    with pytest.raises(ModelError, match=sentence):
        build(**changes)
