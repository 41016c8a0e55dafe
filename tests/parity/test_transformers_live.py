"""The toolkit beside transformers itself: random weights go through a saved folder, outputs must agree.

Activations within 1e-4, logits within 2e-4, losses within 1e-5 of their size; in bfloat16 within what the format
gives. ``PARITY_DIFFERENCES=1 pytest tests/parity`` prints the largest differences for docs/parity.md.

True widths (BASE's and LARGE's) with three layers: the arithmetic of a layer is the same in each, and twelve or
twenty-four would only take longer. ``PARITY_LAYERS=12`` sets another depth.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from toolkit.models.convert.huggingface import write_huggingface
from toolkit.models.convert.huggingface_config import architecture_of
from toolkit.models.convert.load import load_pretrained
from toolkit.models.convert.read import read_pretrained
from toolkit.models.convert.torchaudio import read_torchaudio
from toolkit.models.ctc import CTCModel, ctc_loss
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import save_model_folder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining
from toolkit.nn.fast.common import set_fast

LAYERS = int(os.environ.get("PARITY_LAYERS", 3))
SAMPLES = 16000
QUIET = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "num_hidden_layers": LAYERS,
}  # fmt: skip
LAYOUTS = {
    "BASE": {},
    "LARGE": {
        "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "conv_bias": True,
        "feat_extract_norm": "layer", "do_stable_layer_norm": True, "codevector_dim": 768, "proj_codevector_dim": 768,
    },
}  # fmt: skip
DIFFERENCES: dict[str, float] = {}


def note(name, ours, theirs):
    """Keep the largest difference under a name, for the table; returns it."""
    difference = float((torch.as_tensor(ours).double() - torch.as_tensor(theirs).double()).abs().max())
    DIFFERENCES[name] = max(difference, DIFFERENCES.get(name, 0.0))
    return difference


def stirred(model):
    """Norms and biases away from 1 and 0, so that a tensor in the wrong place shows."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def through_a_folder(model, folder, **files):
    """(transformers' model, ours from its saved folder)."""
    model.save_pretrained(folder)
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    ours, info = load_pretrained(folder)
    assert info.fresh == ()
    return model, ours


def waveforms(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.randn(length, generator=generator)
    return batch, torch.tensor(lengths)


def attention_mask(lengths):
    return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()


def on_real_frames(values, frames):
    return torch.cat([row[:n] for row, n in zip(values, frames.tolist(), strict=True)])


# Pretraining


@pytest.fixture(scope="module", params=LAYOUTS)
def pretraining(request, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**QUIET | LAYOUTS[request.param])
    model = stirred(transformers.Wav2Vec2ForPreTraining(config))
    with torch.no_grad():
        # As they are drawn all codes are near each other; apart, the logits have something to say.
        model.quantizer.codevectors.normal_()
    return request.param, *through_a_folder(model, tmp_path_factory.mktemp("pretraining"))


def masks_and_negatives(frames, num_negatives=100):
    """(mask, transformers' negatives, ours): theirs index all frames of the batch, ours an utterance's masked ones."""
    np.random.seed(4)
    mask = np.zeros((len(frames), max(frames)), dtype=bool)
    for row, count in enumerate(frames):
        for start in np.random.choice(count - 10, 4, replace=False):
            mask[row, start : start + 10] = True
    from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

    theirs = _sample_negative_indices(mask.shape, num_negatives, mask)
    ours = []
    for row in range(len(frames)):
        rank = np.cumsum(mask[row]) - 1
        ours.append(rank[theirs[row][mask[row]] - row * mask.shape[1]])
    return torch.from_numpy(mask), torch.from_numpy(theirs), np.concatenate(ours)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_pretraining_gives_the_same_losses(pretraining, training, padded, fast, monkeypatch):
    name, theirs, ours = pretraining
    set_fast(ours, fast)
    batch, lengths = waveforms(SAMPLES, SAMPLES - 4000 * padded)
    frames = theirs._get_feat_extract_output_lengths(lengths)
    mask, their_negatives, negatives = masks_and_negatives(frames.tolist())
    noise = -torch.empty(mask.numel(), 2, 320).exponential_(generator=torch.Generator().manual_seed(2)).log()

    def with_that_noise(logits, tau, hard):
        soft = ((logits + noise.reshape(logits.shape)) / tau).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", with_that_noise)
    theirs.train(training), ours.train(training)
    try:
        with torch.no_grad():
            expected = theirs(
                batch.clone(),
                attention_mask=attention_mask(lengths),
                mask_time_indices=mask,
                sampled_negative_indices=their_negatives,
            )
            hidden = theirs.wav2vec2(
                batch.clone(), attention_mask=attention_mask(lengths), mask_time_indices=mask
            ).last_hidden_state
            out = ours(
                batch,
                lengths if padded else None,
                time_mask=mask,
                negatives=negatives,
                gumbel_noise=noise[mask.flatten()] if training else None,
            )
            features = ours.encoder(batch, lengths if padded else None, time_mask=mask).features
    finally:
        theirs.eval(), ours.eval()
    assert note(f"{name} last hidden state", on_real_frames(features, frames), on_real_frames(hidden, frames)) < 1e-4
    masked = int(mask.sum())
    assert out.num_masked == masked
    targets = expected.projected_quantized_states
    candidates = targets.flatten(0, 1)[their_negatives.long()].permute(2, 0, 1, 3)
    logits = theirs.compute_contrastive_logits(targets[None], candidates, expected.projected_states, 0.1)
    logits = logits.permute(1, 2, 0)[mask]
    kept = out.logits.isfinite()  # negatives of the positive's own codes are out
    assert kept[:, 0].all() and kept.float().mean() > 0.9
    assert note(f"{name} contrastive logits", out.logits[kept], logits[kept]) < 2e-4
    assert abs(float(out.contrastive) / float(expected.contrastive_loss) - 1) < 1e-5
    note(f"{name} contrastive loss, relative", float(out.contrastive) / float(expected.contrastive_loss), 1.0)
    # In evaluation transformers' perplexity is that of the choices. Ours has fairseq's 1e-7 inside its logarithm.
    perplexity = out.prob_perplexity if training else out.code_perplexity
    diversity = (640 - float(perplexity.sum())) / 640 * masked
    note(f"{name} diversity loss, relative", diversity / float(expected.diversity_loss), 1.0)
    assert abs(diversity / float(expected.diversity_loss) - 1) < 1e-4
    if training:
        assert abs(float(out.loss_sum) / float(expected.loss) - 1) < 1e-5
        note(f"{name} whole loss, relative", float(out.loss_sum) / float(expected.loss), 1.0)
        assert float(out.diversity) == pytest.approx(0.1 * diversity, rel=1e-5)


def test_pretraining_gives_the_same_gradients(pretraining):
    name, theirs, ours = pretraining
    batch, lengths = waveforms(SAMPLES, SAMPLES)
    frames = theirs._get_feat_extract_output_lengths(lengths)
    mask, their_negatives, negatives = masks_and_negatives(frames.tolist())
    theirs(batch.clone(), mask_time_indices=mask, sampled_negative_indices=their_negatives).contrastive_loss.backward()
    out = ours(batch, time_mask=mask, negatives=negatives)
    (out.loss_sum - 0.1 * mask.sum() * (640 - ours_prob_perplexity(ours, out)) / 640).backward()
    base, inner = theirs.wav2vec2, ours.encoder
    for one, two in (
        (inner.transformer.layers[0].fc1, base.encoder.layers[0].feed_forward.intermediate_dense),
        (inner.transformer.layers[0].out, base.encoder.layers[0].attention.out_proj),
        (inner.feature_extractor.blocks[0], base.feature_extractor.conv_layers[0].conv),
        (inner.projection, base.feature_projection.projection),
        (ours.final_projection, theirs.project_hid),
        (ours.target_projection, theirs.project_q),
    ):
        largest = float(two.weight.grad.abs().max())
        gradients = one.weight.grad / largest, two.weight.grad / largest
        assert note(f"{name} gradients, of the largest entry", *gradients) < 1e-3
    mask_gradient = base.masked_spec_embed.grad
    assert note(f"{name} gradient of the mask vector", inner.mask_embedding.grad, mask_gradient) < 1e-3


def ours_prob_perplexity(ours, out):
    """With its gradient, to take the diversity term away: transformers' has none in evaluation."""
    rows = out.encoded.extractor_features.flatten(0, 1)[out.encoded.masked.positions]
    return ours.quantizer(rows).prob_perplexity.sum()


# CTC

VOCAB = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4} | {
    letter: 5 + place for place, letter in enumerate("ETAONIHSRDLUMWCFGYPBVK'XJQZ")
}
XLSR = {"|": 0} | {letter: 1 + place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz'")}
XLSR |= {"[UNK]": 28, "[PAD]": 29}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ctc_gives_the_same_logits_and_loss(layout, fast, tmp_path):
    torch.manual_seed(1)
    xlsr = layout == "LARGE"
    vocab = XLSR if xlsr else VOCAB
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"} if xlsr else {}
    config = transformers.Wav2Vec2Config(
        **QUIET | LAYOUTS[layout], vocab_size=len(vocab), pad_token_id=vocab.get("[PAD]", 0)
    )
    theirs, ours = through_a_folder(
        stirred(transformers.Wav2Vec2ForCTC(config)), tmp_path, vocab=vocab, tokenizer_config=special
    )
    set_fast(ours, fast)
    rows = read_pretrained(tmp_path).config.extra["huggingface"]["rows"]
    batch, lengths = waveforms(SAMPLES, SAMPLES - 5000)
    targets = torch.tensor([[7, 8, 8, 9], [12, 5, -100, -100]])
    with torch.no_grad():
        expected = theirs(batch.clone(), attention_mask=attention_mask(lengths), labels=targets)
        out = ours(batch, lengths)
    their_log_probs = expected.logits.log_softmax(-1)
    frames = out.frame_lengths
    kept = [place for place, row in enumerate(rows) if row is not None]
    mine = on_real_frames(out.log_probs[..., kept], frames)
    wanted = on_real_frames(their_log_probs[..., [rows[place] for place in kept]], frames)
    assert note(f"{layout} CTC log probabilities", mine, wanted) < 2e-4
    made_up = [place for place, row in enumerate(rows) if row is None]
    assert not out.log_probs[..., made_up].exp().any()
    place = {row: i for i, row in enumerate(rows)}
    tokens = targets.clone()
    for row, column in (targets >= 0).nonzero().tolist():
        tokens[row, column] = place[int(targets[row, column])]
    loss, _ = ctc_loss(out.log_probs, frames, tokens.clamp(min=0), torch.tensor([4, 2]))
    note(f"{layout} CTC loss, relative", float(loss) / float(expected.loss), 1.0)
    assert abs(float(loss) / float(expected.loss) - 1) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_stays_within_the_format(layout, tmp_path):
    """Both in bfloat16 products; 2 ** -8 is the format's step, and the outputs here are of size 1 to 4."""
    torch.manual_seed(1)
    config = transformers.Wav2Vec2Config(**QUIET | LAYOUTS[layout])
    theirs, ours = through_a_folder(stirred(transformers.Wav2Vec2Model(config)), tmp_path)
    batch, _ = waveforms(SAMPLES, SAMPLES)
    with torch.no_grad():
        exact = theirs(batch.clone()).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            expected = theirs(batch.clone()).last_hidden_state.float()
            out = ours(batch).features.float()
    size = float(exact.square().mean().sqrt())
    mine, wanted = (float((values - exact).square().mean().sqrt()) / size for values in (out, expected))
    DIFFERENCES[f"{layout} bfloat16: ours from float32, relative mean square root"] = mine
    DIFFERENCES[f"{layout} bfloat16: transformers' from float32, relative mean square root"] = wanted
    assert mine < 0.02 and mine < 2 * wanted


# data2vec


@pytest.mark.parametrize("fast", [True, False])
def test_data2vec_audio_gives_the_same_hidden_states(fast, tmp_path):
    torch.manual_seed(2)
    quiet = {key: value for key, value in QUIET.items() if key != "feat_quantizer_dropout"}
    config = transformers.Data2VecAudioConfig(**quiet)
    theirs, ours = through_a_folder(stirred(transformers.Data2VecAudioModel(config)), tmp_path)
    set_fast(ours, fast)
    batch, _ = waveforms(SAMPLES, SAMPLES)
    with torch.no_grad():
        expected = theirs(batch.clone(), output_hidden_states=True)
        out = ours(batch, layers=True)
    assert note("data2vec audio last hidden state", out.features, expected.last_hidden_state) < 1e-4
    for (mine, _), wanted in zip(out.layers, expected.hidden_states[1:], strict=True):
        assert note("data2vec audio layers", mine, wanted) < 1e-4


def test_data2vec_audio_with_padding(tmp_path):
    """In transformers (and fairseq) the padding is zero before the first positional convolution only, and what that
    one puts there reaches real frames through the next: so it does in a model from there. With norm_over_padding off a
    padded utterance gives what it gives alone, which is what transformers gives it alone."""
    torch.manual_seed(2)
    quiet = {key: value for key, value in QUIET.items() if key != "feat_quantizer_dropout"}
    theirs, ours = through_a_folder(
        stirred(transformers.Data2VecAudioModel(transformers.Data2VecAudioConfig(**quiet))), tmp_path
    )
    batch, lengths = waveforms(SAMPLES, SAMPLES - 5000)
    alone_each = Wav2Vec2Encoder(**ours.config | {"norm_over_padding": False}).eval()
    alone_each.load_state_dict(ours.state_dict())
    with torch.no_grad():
        together = theirs(batch.clone(), attention_mask=attention_mask(lengths)).last_hidden_state
        alone = theirs(batch[1:, : lengths[1]].clone()).last_hidden_state
        out, out_alone = ours(batch, lengths), alone_each(batch, lengths)
    frames = int(out.frame_lengths[1])
    assert note("data2vec audio, padded, to transformers padded", out.features[1, :frames], together[1, :frames]) < 1e-4
    assert note("data2vec audio, padded, to transformers alone", out_alone.features[1, :frames], alone[0]) < 1e-4
    assert float((together[1, :frames] - alone[0]).abs().max()) > 1e-3  # or the two would say nothing


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_data2vec_text_gives_the_same_hidden_states(fast, types, tmp_path):
    torch.manual_seed(3)
    config = transformers.Data2VecTextConfig(
        vocab_size=1000, num_hidden_layers=LAYERS, max_position_embeddings=514, layer_norm_eps=1e-5, type_vocab_size=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = stirred(transformers.Data2VecTextModel(config))
    if not types:
        torch.nn.init.zeros_(model.embeddings.token_type_embeddings.weight)
    theirs, ours = through_a_folder(model, tmp_path)
    set_fast(ours, fast)
    tokens = torch.randint(4, 1000, (3, 300), generator=torch.Generator().manual_seed(1))
    tokens[1, 200:] = 1
    tokens[2, 7:] = 1
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 1).long(), output_hidden_states=True)
        out = ours(tokens, layers=True)
    real = tokens != 1
    assert note("data2vec text last hidden state", out.features[real], expected.last_hidden_state[real]) < 1e-4
    for (mine, _), wanted in zip(out.layers, expected.hidden_states[1:], strict=True):
        assert note("data2vec text layers", mine[real], wanted[real]) < 1e-4


# Settings


@pytest.mark.parametrize(
    ("config", "model_type", "kind"),
    [
        ("Wav2Vec2Config", "wav2vec2", "wav2vec2_pretraining"),
        ("Wav2Vec2Config", "wav2vec2", "ctc"),
        ("Data2VecAudioConfig", "data2vec-audio", "ctc"),
        ("Data2VecTextConfig", "data2vec-text", "text_encoder"),
    ],
)
def test_a_key_that_is_missing_means_the_librarys_default(config, model_type, kind):
    text = {"layer_norm_eps": 1e-5} if kind == "text_encoder" else {}
    whole = json.loads(json.dumps(getattr(transformers, config)(**text).to_dict()))
    by_default, by_name = (
        architecture_of(values, model_type, kind, outputs=32, source="config.json") for values in (text, whole)
    )
    assert by_default == by_name


# What the toolkit writes


TINY = {
    "conv_layers": [(16, 10, 5), (16, 3, 2), (16, 2, 2)], "dim": 24, "num_layers": 2, "ffn_dim": 48, "num_heads": 2,
    "pos_kernel": 8, "pos_groups": 2,
}  # fmt: skip
LARGE = {"extractor_norm": "layer", "conv_bias": True, "pre_norm": True}
DATA2VEC = {"extractor_norm": "layer", "pos_depth": 2, "pos_kernel": 10}


def written(folder, model, kind, tokenizer=None):
    text = kind == "text_encoder"
    rate = {"sample_rate": 0 if text else 16000, "normalize": not text}
    save_model_folder(folder / "model", model, kind=kind, tokenizer=tokenizer, **rate)
    write_huggingface(read_pretrained(folder / "model"), folder / "hf")
    return folder / "hf"


def opened(cls, folder):
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("changes", [{}, LARGE, {"mask_prob": 0.0}, {**LARGE, "extractor_norm": "group"}])
def test_transformers_opens_what_we_write(changes, tmp_path):
    encoder = Wav2Vec2Encoder(**TINY | changes, norm_over_padding=True).eval()
    model = opened(transformers.Wav2Vec2Model, written(tmp_path, encoder, "wav2vec2_encoder"))
    batch, _ = waveforms(3000, 3000)
    with torch.no_grad():
        assert note("written encoder", encoder(batch).features, model(batch).last_hidden_state) < 1e-4
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf").do_normalize
    assert transformers.AutoModel.from_pretrained(tmp_path / "hf").config.toolkit["kind"] == "wav2vec2_encoder"


def test_transformers_opens_our_pretraining_model(tmp_path):
    model = Wav2Vec2Pretraining(Wav2Vec2Encoder(**TINY), final_dim=12, code_dim=8, num_codes=6, num_negatives=10)
    opened(transformers.Wav2Vec2ForPreTraining, written(tmp_path, model, "wav2vec2_pretraining"))


def test_transformers_opens_our_data2vec_models(tmp_path):
    from toolkit.models.text_encoder import TextEncoder

    encoder = Wav2Vec2Encoder(**TINY | DATA2VEC).eval()
    model = opened(transformers.Data2VecAudioModel, written(tmp_path / "audio", encoder, "wav2vec2_encoder"))
    batch, _ = waveforms(3000, 3000)
    with torch.no_grad():
        assert note("written encoder", encoder(batch).features, model(batch).last_hidden_state) < 1e-4
    text = TextEncoder(vocab_size=11, dim=16, num_layers=2, ffn_dim=32, num_heads=2, max_positions=9).eval()
    model = opened(transformers.Data2VecTextModel, written(tmp_path / "text", text, "text_encoder"))
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2]])
    with torch.no_grad():
        assert note("written encoder", text(tokens).features, model(tokens).last_hidden_state) < 1e-4


@pytest.mark.parametrize("case", ["keep", "upper"])
def test_its_processor_gives_our_ids(case, tmp_path):
    from toolkit.data.tokens import LetterTokenizer

    letters = LetterTokenizer(["|", "E", "T", "A", "'", "É", "madeupword0000"], case=case, unknown="unk")
    model = CTCModel(Wav2Vec2Encoder(**TINY), letters.vocab_size).eval()
    folder = written(tmp_path, model, "ctc", letters)
    opened(transformers.Wav2Vec2ForCTC, folder)
    for tokenizer in (
        transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder),
        transformers.Wav2Vec2Processor.from_pretrained(folder).tokenizer,
        transformers.AutoProcessor.from_pretrained(folder).tokenizer,
    ):
        for text in ("TEA AT TEA", "É'A", "A?T"):
            boundary = letters.encode("A")[-1]
            assert [*tokenizer(text).input_ids, boundary] == letters.encode(text)
        assert tokenizer.pad_token_id == letters.blank_id
        ids = [0, 6, 6, 0, 5, 7, 0, 4, 4, 7, 6, 0]
        collapsed = [6, 5, 7, 4, 7, 6]
        expected = letters.decode(collapsed)
        assert tokenizer.decode(ids) == (expected.lower() if case == "upper" else expected)


@pytest.mark.parametrize("layout", ["group", "layer"])
def test_a_torchaudio_file_opens_in_transformers(layout, tmp_path):
    tensors = load_file(Path(__file__).parents[1] / "fixtures" / "torchaudio" / f"{layout}.safetensors")
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    write_huggingface(read_torchaudio(state, Path("model.pt")), tmp_path / "hf")
    cls = transformers.Wav2Vec2ForCTC if layout == "group" else transformers.Wav2Vec2Model
    with torch.no_grad():
        out = opened(cls, tmp_path / "hf")(tensors["waveforms"])[0]
    assert note("torchaudio to transformers", out, tensors["output"]) < 1e-4
