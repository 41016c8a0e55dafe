"""The Gumbel product quantizer against its formula and against known values."""

import math

import pytest
import torch

from toolkit.errors import ModelError
from toolkit.nn.quantizer import GumbelQuantizer, gumbel_noise, perplexity, pick_code, pick_code_plain
from toolkit.seeds import Randomness


def test_temperature_is_a_function_of_the_update():
    quantizer = GumbelQuantizer(input_dim=4, output_dim=4, num_codes=3, temperature=(2.0, 0.5, 0.999995))
    assert quantizer.temperature_at(0) == 2.0
    assert quantizer.temperature_at(20000) == pytest.approx(1.809674383650573, rel=1e-12)
    assert quantizer.temperature_at(277258) > 0.5 and quantizer.temperature_at(277259) == 0.5


def test_fast_backward_equals_the_straight_through_formula():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 2, 7, dtype=torch.float64, generator=generator).requires_grad_()
    codebook = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator).requires_grad_()
    noise = torch.randn(40, 2, 7, dtype=torch.float64, generator=generator)
    weights = torch.randn(40, 2, 3, dtype=torch.float64, generator=generator)
    results = []
    for form in (pick_code, pick_code_plain):
        vectors, codes = form(logits, noise, codebook, 0.7)
        results.append((vectors, codes, *torch.autograd.grad((vectors * weights).sum(), (logits, codebook))))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_noise_decides_in_training_and_not_in_evaluation():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(input_dim=8, output_dim=6, num_groups=2, num_codes=5)
    frames = torch.randn(9, 8)
    noise = torch.zeros(9, 2, 5)
    noise[:, 0, 4] = noise[:, 1, 2] = 1e4
    out = quantizer(frames, noise=noise)
    assert out.codes.tolist() == [[4, 2]] * 9
    expected = torch.cat([quantizer.codebook[0, 4], quantizer.codebook[1, 2]]).expand(9, -1)
    assert torch.equal(out.vectors, expected)
    # The choices by which usage is measured are those without noise.
    silent = quantizer(frames)
    assert torch.equal(silent.codes, quantizer.projection(frames).view(9, 2, 5).argmax(-1))
    assert torch.equal(silent.code_perplexity, out.code_perplexity)


def test_perplexities_count_codes_in_use():
    quantizer = GumbelQuantizer(input_dim=4, output_dim=4, num_groups=2, num_codes=4)
    with torch.no_grad():
        quantizer.projection.weight.zero_()
        # group 0 follows the input, group 1 always says code 3
        quantizer.projection.weight[:4] = 50 * torch.eye(4)
        quantizer.projection.bias[7] = 50
    out = quantizer(torch.eye(4))
    torch.testing.assert_close(out.code_perplexity, torch.tensor([4.0, 1.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.prob_perplexity, torch.tensor([4.0, 1.0]), rtol=1e-5, atol=0)
    assert not out.code_perplexity.requires_grad and out.prob_perplexity.requires_grad


def test_perplexity_of_a_known_distribution():
    assert float(perplexity(torch.tensor([0.5, 0.25, 0.25, 0.0]))) == pytest.approx(2**1.5, rel=1e-5)


def test_noise_is_gumbel_and_finite():
    noise = gumbel_noise((200000,), Randomness(1).torch("cpu", "gumbel"))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert torch.equal(noise, gumbel_noise((200000,), Randomness(1).torch("cpu", "gumbel")))


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 1 - 2.0**-24])
def test_noise_is_finite_at_the_ends_of_the_generator(uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform))
    assert gumbel_noise((3,), torch.Generator()).isfinite().all()


def test_initial_weights():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(input_dim=64, output_dim=64, num_codes=100)
    assert float(quantizer.projection.weight.detach().std()) == pytest.approx(1, abs=0.03)
    assert not quantizer.projection.bias.any()
    codebook = quantizer.codebook.detach()
    assert 0 <= float(codebook.min()) < 0.01 and 0.99 < float(codebook.max()) <= 1


def test_refusals():
    with pytest.raises(ModelError) as error:
        GumbelQuantizer(input_dim=4, output_dim=7, num_groups=2)
    assert str(error.value) == "the codes' width 7 must be a multiple of the number of groups 2; change one."
    with pytest.raises(ModelError) as error:
        GumbelQuantizer(input_dim=4, output_dim=4, temperature=(2.0, 0.0, 0.9))
    assert str(error.value) == (
        "temperature is (2.0, 0.0, 0.9), expected (start > 0, end > 0, decay in 0..1), as (2.0, 0.5, 0.999995)."
    )


@pytest.mark.parametrize("name", ["input_dim", "output_dim", "num_groups", "num_codes"])
@pytest.mark.parametrize("value", [0, -2, 2.5, "2", None, True])
def test_sizes_are_positive_whole_numbers(name, value):
    with pytest.raises(ModelError) as error:
        GumbelQuantizer(**{"input_dim": 4, "output_dim": 4, name: value})
    assert str(error.value) == f"{name} is {value!r}, expected a whole number, 1 or more."


@pytest.mark.parametrize("value", [[1], [2, 1, 0.9, 0.9], 3, ["a", 1, 1], None, [math.inf, 1, 1], [1, 1, math.nan]])
def test_temperature_is_three_positive_numbers(value):
    with pytest.raises(ModelError, match=r"temperature is .*, expected \(start > 0, end > 0, decay in 0\.\.1\), as"):
        GumbelQuantizer(input_dim=4, output_dim=4, temperature=value)
