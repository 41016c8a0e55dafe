"""Gumbel product quantizer (wav2vec 2.0, section 2): a discrete code per group for each masked frame.

Letters: S masked frames, G groups, V codes per group, E channels per code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.nn.sizes import check_sizes

PERPLEXITY_EPSILON = 1e-7
"""Inside the logarithm of the perplexity, as in fairseq."""


@dataclass(frozen=True)
class Quantized:
    """What the quantizer says about S frames.

    vectors : (S, output_dim) float32, the chosen codes of all groups side by side.
    codes : (S, G) int64, the chosen indices.
    code_perplexity : (G,) how many codes are in use, by the choices without noise; 1 .. V, no gradient.
    prob_perplexity : (G,) the same by the mean of the probabilities; the diversity loss pulls at this one.
    """

    vectors: Tensor
    codes: Tensor
    code_perplexity: Tensor
    prob_perplexity: Tensor


class PickCode(torch.autograd.Function):
    """Forward takes rows of the code book by index, backward is that of the straight-through estimator.

    Equal to :func:`pick_code_plain`, without multiplying by one-hot vectors on the way forward.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, noise: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        probs = torch.softmax((logits + noise) / temperature, dim=-1)
        codes = probs.argmax(-1)
        ctx.save_for_backward(probs, codes, codebook)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(codes)
        return take_codes(codes, codebook), codes

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, Tensor, None]:
        probs, codes, codebook = ctx.saved_tensors
        grad = grad.transpose(0, 1)  # (S, G, E) -> (G, S, E)
        # A product with the one-hot choices instead of index_add_: on accelerators that one adds in any order.
        chosen = one_hot(codes.T, codebook.shape[1], grad.dtype)
        grad_codebook = chosen.transpose(1, 2) @ grad
        # d loss / d probs = grad . code, for all codes, as if the choice had been the probabilities themselves
        grad_probs = (grad @ codebook.transpose(1, 2)).transpose(0, 1)
        inner = (grad_probs * probs).sum(-1, keepdim=True)
        return (grad_probs - inner) * probs / ctx.temperature, None, grad_codebook, None


def one_hot(codes: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    """codes (...) int64 -> (..., num_codes); torch's own looks at the values first, which waits for some devices."""
    return torch.zeros(*codes.shape, num_codes, dtype=dtype, device=codes.device).scatter_(-1, codes[..., None], 1)


def take_codes(codes: Tensor, codebook: Tensor) -> Tensor:
    """Rows of the code book: codes (S, G) int64, codebook (G, V, E) -> (S, G, E)."""
    return codebook[torch.arange(codebook.shape[0], device=codes.device), codes]


def pick_code(logits: Tensor, noise: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Choose a code per group by the Gumbel-softmax, straight through.

    Arguments
    ---------
    logits : (S, G, V) float32.
    noise : (S, G, V) standard Gumbel noise.
    codebook : (G, V, E).
    temperature : of the softmax.

    Returns
    -------
    vectors (S, G, E) and codes (S, G) int64. Gradients reach logits and codebook, not the noise.
    """
    return PickCode.apply(logits, noise, codebook, temperature)


def pick_code_plain(logits: Tensor, noise: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula of :func:`pick_code` written out, for tests."""
    probs = torch.softmax((logits + noise) / temperature, dim=-1)
    codes = probs.argmax(-1)
    hard = one_hot(codes, logits.shape[-1], probs.dtype) - probs.detach() + probs
    return torch.einsum("sgv,gve->sge", hard, codebook), codes


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    # torch.rand gives multiples of 2**-24 below 1, 0 among them, whose noise would be minus infinity.
    return -torch.log(-torch.log(uniform.clamp_(min=2.0**-25)))


def perplexity(probs: Tensor) -> Tensor:
    """exp of the entropy: probs (..., V) -> (...)."""
    return torch.exp(-(probs * torch.log(probs + PERPLEXITY_EPSILON)).sum(-1))


def _mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """(S, G, V) -> (G, V), over the rows that count."""
    if weights is None:
        return rows.mean(0)
    return (rows * weights[:, None, None]).sum(0) / weights.sum().clamp(min=1)


def checked_temperature(temperature: Sequence[float]) -> tuple[float, float, float]:
    """The quantizer's (start, end, decay) as numbers; raises ModelError."""
    advice = "expected (start > 0, end > 0, decay in 0..1), as (2.0, 0.5, 0.999995)."
    try:
        start, end, decay = (float(value) for value in temperature)
    except (TypeError, ValueError) as error:
        raise ModelError(f"temperature is {temperature!r}, {advice}") from error
    if not (0 < start < math.inf and 0 < end < math.inf and 0 < decay <= 1):
        raise ModelError(f"temperature is {tuple(temperature)}, {advice}")
    return start, end, decay


class GumbelQuantizer(nn.Module):
    """Maps frames to one of V codes in each of G groups.

    Arguments
    ---------
    input_dim : channels of the frames.
    output_dim : channels of all groups' codes together.
    num_groups, num_codes : G and V.
    temperature : (start, end, decay); after n updates it is ``max(start * decay**n, end)``.

    Raises
    ------
    ModelError : a size is no positive whole number, output_dim is no multiple of num_groups, or the temperatures are
        not three positive numbers.

    Example
    -------
    >>> quantizer = GumbelQuantizer(input_dim=8, output_dim=6, num_groups=2, num_codes=5)
    >>> out = quantizer(torch.randn(7, 8))
    >>> out.vectors.shape, out.codes.shape
    (torch.Size([7, 6]), torch.Size([7, 2]))
    """

    def __init__(
        self,
        *,
        input_dim: int,
        output_dim: int = 256,
        num_groups: int = 2,
        num_codes: int = 320,
        temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995),
    ) -> None:
        super().__init__()
        check_sizes(input_dim=input_dim, output_dim=output_dim, num_groups=num_groups, num_codes=num_codes)
        if output_dim % num_groups:
            raise ModelError(
                f"the codes' width {output_dim} must be a multiple of the number of groups {num_groups}; change one."
            )
        temperature = checked_temperature(temperature)
        self.fast = True  # False: plain formulas only, see toolkit.nn.fast.common.set_fast
        self.num_groups, self.num_codes = num_groups, num_codes
        self.temperature = temperature
        self.projection = nn.Linear(input_dim, num_groups * num_codes)
        self.codebook = nn.Parameter(torch.empty(num_groups, num_codes, output_dim // num_groups))
        nn.init.normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        nn.init.uniform_(self.codebook)

    def temperature_at(self, update: int) -> float:
        """The temperature of the forward after ``update`` finished updates."""
        start, end, decay = self.temperature
        return max(start * decay**update, end)

    def forward(
        self, frames: Tensor, *, update: int = 0, noise: Tensor | None = None, weights: Tensor | None = None
    ) -> Quantized:
        """Quantize S frames.

        Arguments
        ---------
        frames : (S, input_dim) float32.
        update : finished updates, for the temperature.
        noise : (S, G, V) standard Gumbel noise; None takes the most probable codes (evaluation).
        weights : (S,) 1 for a frame that counts in the perplexities, 0 for one that does not; None: all count.
        """
        # (S, G * V) -> (S, G, V)
        logits = self.projection(frames).view(-1, self.num_groups, self.num_codes)
        likeliest = logits.argmax(-1)
        if noise is None:
            codes = likeliest
            vectors = take_codes(codes, self.codebook)
        else:
            pick = pick_code if self.fast else pick_code_plain
            vectors, codes = pick(logits, noise, self.codebook, self.temperature_at(update))
        with torch.no_grad():
            usage = _mean(one_hot(likeliest, self.num_codes, logits.dtype), weights)
        return Quantized(
            vectors=vectors.flatten(1),
            codes=codes,
            code_perplexity=perplexity(usage),
            prob_perplexity=perplexity(_mean(torch.softmax(logits, dim=-1), weights)),
        )
