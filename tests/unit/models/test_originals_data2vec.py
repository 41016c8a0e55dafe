"""data2vec encoders recorded from the original implementation: the student's pass, masked and padded."""

import pytest
import torch

from tests.unit.models.originals import original, recorded
from toolkit.nn.fast.common import set_fast


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
