"""The question that a model asks torch.autocast."""

import torch

from toolkit.nn.precision import compute_dtype, explicit_precision


def test_autocast_is_the_switch():
    assert compute_dtype("cpu") == torch.float32
    assert compute_dtype("cpu", torch.float64) == torch.float64
    with torch.autocast("cpu", dtype=torch.float16):
        assert compute_dtype("cpu", torch.float64) == torch.float16
        with explicit_precision("cpu"):
            assert compute_dtype("cpu") == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
