"""compare.py on recordings of other sizes than the fixtures': made here, by our plain formulas, of random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.compare import main
from tests.parity.test_compare import FIXTURES
from toolkit.models.convert.common import export_tensors
from toolkit.models.convert.fairseq_names import names_table
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining
from toolkit.nn.fast.common import set_fast

SIZES = {
    "one_group": {
        "conv_feature_layers": "[(12, 10, 5), (12, 3, 2), (12, 3, 2), (12, 4, 4)]",
        "encoder_layers": 1,
        "encoder_embed_dim": 20,
        "encoder_ffn_embed_dim": 24,
        "encoder_attention_heads": 5,
        "conv_pos": 7,
        "conv_pos_groups": 2,
        "final_dim": 6,
        "latent_dim": 9,
        "latent_groups": 1,
        "latent_vars": 5,
        "num_negatives": 3,
        "logit_temp": 0.2,
    },
    "no_projection": {
        "conv_feature_layers": "[(24, 10, 5), (24, 8, 4)]",
        "extractor_mode": "layer_norm",
        "conv_bias": True,
        "encoder_layers": 4,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 16,
        "encoder_attention_heads": 3,
        "layer_norm_first": True,
        "final_dim": 8,
        "latent_groups": 4,
        "latent_vars": 3,
        "num_negatives": 7,
        "feature_grad_mult": 1.0,
    },
}


def build(config):
    """Our model by the original's settings."""
    encoder = Wav2Vec2Encoder(
        conv_layers=json.loads(config["conv_feature_layers"].replace("(", "[").replace(")", "]")),
        extractor_norm={"default": "group", "layer_norm": "layer"}[config["extractor_mode"]],
        conv_bias=config["conv_bias"],
        norm_over_padding=True,
        dim=config["encoder_embed_dim"],
        num_layers=config["encoder_layers"],
        ffn_dim=config["encoder_ffn_embed_dim"],
        num_heads=config["encoder_attention_heads"],
        pre_norm=config["layer_norm_first"],
        pos_kernel=config["conv_pos"],
        pos_groups=config["conv_pos_groups"],
        feature_grad_mult=config["feature_grad_mult"],
    )
    return Wav2Vec2Pretraining(
        encoder,
        final_dim=config["final_dim"],
        num_groups=config["latent_groups"],
        num_codes=config["latent_vars"],
        code_dim=config["latent_dim"] or None,
        temperature=config["latent_temp"],
        num_negatives=config["num_negatives"],
        logit_temperature=config["logit_temp"],
        diversity_weight=0.1,
        penalty_weight=10.0,
    )


def write(folder, meta, tensors, weights):
    """The three files of a recording."""
    folder.mkdir()
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta))
    settings = {
        "model": meta["model_config"],
        "task": {"_name": "audio_pretraining", "normalize": False},
        "criterion": {"_name": "wav2vec", "loss_weights": [0.1, 10.0]},
    }
    torch.save({"args": None, "cfg": settings, "model": weights}, folder / "checkpoint.pt")


def make(folder, changes, lengths):
    """A recording of a random model: its inputs, its draws, a few results."""
    meta = json.loads((FIXTURES / "w2v2_pretrain_groupnorm" / "meta.json").read_text())
    config = meta["model_config"] | changes
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    scalars = {"loss_weights": [0.1, 10.0], "num_updates": 7}
    model = set_fast(build(config).train(), False)
    batch, samples = len(lengths), max(lengths)
    waveforms = torch.randn(batch, samples, generator=generator)
    for row, length in enumerate(lengths):
        waveforms[row, length:] = 0
    lengths = torch.tensor(lengths)
    frames = int(model.encoder.frame_lengths(torch.tensor([samples])))
    mask = torch.zeros(batch, frames, dtype=torch.bool)
    masked = 6
    for row, count in enumerate(model.encoder.frame_lengths(lengths).tolist()):
        mask[row, torch.randperm(count, generator=generator)[:masked]] = True
    own = torch.arange(masked)[:, None].expand(-1, config["num_negatives"]).reshape(-1)
    raw = torch.randint(masked - 1, (batch, len(own)), generator=generator)
    shifted = raw + (raw >= own).long()
    noise = torch.randn(batch * masked * config["latent_groups"], config["latent_vars"], generator=generator)
    out = model(
        waveforms,
        lengths,
        update=7,
        time_mask=mask,
        negatives=shifted.view(batch * masked, -1),
        gumbel_noise=noise.unflatten(0, (-1, config["latent_groups"])),
    )
    out.loss_sum.backward()
    encoded = model.encoder(waveforms, lengths, time_mask=mask, layers=True)
    table = names_table("wav2vec2_pretraining", model.config)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    padding = torch.arange(samples) >= lengths[:, None]
    tensors = {
        "in.source": waveforms,
        "rand.mask_indices": mask,
        "rand.gumbel_noise": noise,
        "rand.neg_raw": raw,
        "rand.neg_idxs": shifted + masked * torch.arange(batch)[:, None],
        "out.logits": out.logits.view(batch, masked, -1).permute(2, 0, 1),
        "mid.features_ln": encoded.extractor_features,
    }
    tensors |= {f"mid.layer{i}": layer.transpose(0, 1) for i, (layer, _) in enumerate(encoded.layers)}
    original = export_tensors(table, gradients)
    tensors |= {"grad." + name: value for name, value in original.items() if not name.endswith("k_proj.bias")}
    if padding.any():
        tensors["in.padding_mask"] = padding
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    meta = {
        "model_config": config,
        "scalars": scalars
        | {"total_loss": float(out.loss_sum.detach()), "correct": int(out.correct), "frames": frames}
        | {"masked_frames_per_utterance": [masked] * batch, "code_perplexity": float(out.code_perplexity.sum())},
        "tensors": {name: {"shape": list(value.shape)} for name, value in tensors.items()},
    }
    weights = export_tensors(table, {name: p.detach() for name, p in model.named_parameters()})
    write(folder, meta, tensors, weights)
    return len(tensors)


@pytest.mark.parametrize("lengths", [[2400] * 2, [3001, 1900, 2222, 1800]], ids=["full", "padded"])
@pytest.mark.parametrize("sizes", SIZES)
def test_other_sizes(sizes, lengths, tmp_path, capsys):
    count = make(tmp_path / "case", SIZES[sizes], lengths)
    assert count > 25
    code = main([str(tmp_path / "case")])
    text = capsys.readouterr()
    assert code == 0, text.out + text.err
    assert " 0 outside, 0 not compared" in text.out
