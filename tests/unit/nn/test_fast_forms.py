"""Each fast form against its plain formula, and its gradient against finite differences, in float64."""

import itertools

import pytest
import torch

from toolkit.nn import fast
from toolkit.nn.fast.bits import LARGE_DRAW
from toolkit.seeds import Randomness

DOUBLE = torch.float64


def tensor(*shape, seed=0, grad=True, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=DOUBLE) * scale).requires_grad_(grad)


def bits(key=0):
    return fast.DropoutBits(Randomness(7).child("test", key))


def check(form, *inputs):
    """``form(*inputs, fast=...)``: equal results and gradients with and without the fast form, and gradcheck."""
    results = []
    for use_fast in (True, False):
        out = form(*inputs, fast=use_fast)
        weight = torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).view(out.shape)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        results.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
        with torch.no_grad():
            assert torch.allclose(form(*inputs, fast=use_fast), out, atol=1e-12), "no_grad differs"
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: form(*x, fast=True), inputs, fast_mode=True)


# ---------------------------------------------------------------- bits and rows


def test_bits_repeat_for_the_same_place_and_differ_for_another():
    assert torch.equal(bits(1).keep(0.3, 50, 7), bits(1).keep(0.3, 50, 7))
    assert not torch.equal(bits(1).keep(0.3, 50, 7), bits(2).keep(0.3, 50, 7))
    one = bits(1)
    assert not torch.equal(one.keep(0.3, 50, 7), one.keep(0.3, 50, 7)), "the stream must go on"


def test_large_draws_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(bits(3).keep(0.1, 2, LARGE_DRAW + 3))
    torch.set_num_threads(before)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0][0], masks[0][1]), "the two halves must differ"


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(p):
    n = 400_000
    kept = float(bits().keep(p, n).sum(dtype=torch.int64)) / n
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 1 / 32768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
def test_dropout_scales_what_it_keeps(dtype):
    x = torch.randn(1000, dtype=dtype).requires_grad_()
    out = fast.dropout(x, 0.25, bits())
    kept = bits().keep(0.25, 1000) == 1
    assert torch.equal(out == 0, ~kept | (x == 0))
    assert torch.allclose(out[kept], x[kept] / 0.75, rtol=1e-2 if dtype != DOUBLE else 1e-12)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient, kept.to(dtype) / 0.75, rtol=1e-2)
    assert fast.dropout(x, 0.25, None) is x


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3], [1, 5], [0, 2]])
def test_packing(lengths):
    x = tensor(2, 5, 3)
    rows = fast.pack_rows(x, lengths)
    assert torch.equal(rows, torch.cat([x[b, :n] for b, n in enumerate(lengths)]))
    back = fast.unpack_rows(rows, lengths, 5)
    assert torch.equal(back, fast.zero_padding(x, lengths))
    assert torch.autograd.gradcheck(lambda x: fast.unpack_rows(fast.pack_rows(x, lengths) ** 2, lengths, 5), x)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("lengths", [[6, 6], [7, 2, 1], [1], [3, 0, 2]])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention(lengths, p):
    form = fast.attention
    check(lambda qkv, fast: form(qkv, lengths, 2, p=p, bits=bits(), fast=fast), tensor(sum(lengths), 3 * 2 * 4))


@pytest.mark.parametrize(("asking", "lengths"), [([3, 2], [6, 2]), ([0, 2, 1], [2, 3, 1]), ([1], [5])])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_of_some_queries(asking, lengths, p):
    """More rows of keys, values and queries than the utterances have, too."""
    form = fast.attention
    options = {"queries": None, "query_lengths": asking, "p": p}
    check(
        lambda kv, q, fast: form(kv, lengths, 2, **options | {"queries": q, "bits": bits()}, fast=fast),
        tensor(sum(lengths) + 2, 2 * 2 * 4),
        tensor(sum(asking) + 1, 2 * 4, seed=1),
    )


def test_attention_leaves_its_input_alone():
    """A single frame's rows are already laid out by head: working on them in place would change the input."""
    qkv = tensor(1, 24)
    before = qkv.detach().clone()
    fast.attention(qkv, [1], 2).sum().backward()
    assert torch.equal(qkv, before)


def test_attention_is_that_of_torch():
    qkv = tensor(6, 24)
    q, k, v = (t.view(6, 2, 4).transpose(0, 1) for t in qkv.chunk(3, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(6, 8)
    assert torch.allclose(fast.attention(qkv, [6], 2, p=0.5, bits=None), expected)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 1]])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_batched_attention(lengths, p):
    padding = fast.padding_mask(torch.tensor(lengths), 5) if min(lengths) < 5 else None
    form = fast.batched_attention
    check(lambda qkv, fast: form(qkv, padding, 3, 2, p=p, bits=bits(), fast=fast), tensor(15, 3 * 2 * 4))


def test_batched_attention_equals_the_one_by_utterance():
    lengths = [5, 2, 1]
    x = tensor(3, 5, 3 * 8)
    out = fast.batched_attention(x.view(15, 24), fast.padding_mask(torch.tensor(lengths), 5), 3, 2)
    packed = fast.attention(fast.pack_rows(x, lengths), lengths, 2)
    assert torch.allclose(fast.pack_rows(out.view(3, 5, 8), lengths), packed)


def test_padded_attention_equals_the_packed_one():
    lengths, heads = [5, 3], 2
    x = tensor(2, 5, 3 * 8)
    q, k, v = x.view(2, 5, 3, heads, 4).permute(2, 0, 3, 1, 4)
    padding = fast.padding_mask(torch.tensor(lengths), 5)
    out = fast.padded_attention(q, k, v, padding, 0.0).transpose(1, 2).reshape(2, 5, 8)
    packed = fast.attention(fast.pack_rows(x, lengths), lengths, heads)
    assert torch.allclose(fast.pack_rows(out, lengths), packed)


# ---------------------------------------------------------------- linear and its surroundings


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["linear_gelu", "linear_residual", "linear_residual_norm"])
def test_linear_forms(name, p, rows):
    function = getattr(fast, name)
    inputs = [tensor(rows, 3), tensor(4, 3, seed=1), tensor(4, seed=2)]
    if name != "linear_gelu":
        inputs.insert(0, tensor(rows, 4, seed=3))
    if name == "linear_residual_norm":
        inputs += [tensor(4, seed=4), tensor(4, seed=5)]
    check(lambda *x, fast: function(*x, p=p, bits=bits(), fast=fast), *inputs)


def test_frozen_weights_still_pass_the_gradient_on():
    x = tensor(5, 3)
    weight, bias = tensor(4, 3, grad=False), tensor(4, grad=False)
    out = fast.linear_gelu(x, weight, bias)
    assert torch.allclose(
        torch.autograd.grad(out.sum(), x)[0],
        torch.autograd.grad(fast.plain_linear_gelu(x, weight, bias).sum(), x)[0],
    )


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_keeps_the_format_of_rows_and_computes_in_float32(affine):
    x = torch.randn(6, 32).bfloat16()
    weight, bias = (torch.rand(32) + 1, torch.randn(32)) if affine else (None, None)
    out = fast.layer_norm(x, weight, bias)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    expected = torch.nn.functional.layer_norm(x.double(), (32,), *wide)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), expected, rtol=2**-8, atol=1e-3)


# ---------------------------------------------------------------- convolutions


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride"), [(3, 2), (2, 2), (4, 4), (1, 1), (2, 3), (1, 4), (5, 2), (7, 3), (3, 1), (10, 1)]
)
def test_convolution(kernel, stride, norm):
    """(10, 1) is over the number of chunks and takes the library's convolution. Inputs of a whole number of strides
    are taken in one product, with some frames of padding more."""
    function = fast.convolution_gelu
    least = (6 - 1) * stride + kernel
    for inputs, frames in itertools.product(
        (least + (stride - 1) // 2, -(-least // stride) * stride), ([6, 6], [6, 1], [0, 5])
    ):
        x = tensor(2, inputs, 2)
        parameters = [tensor(3, 2, kernel, seed=1), tensor(3, seed=2)]
        if norm:
            parameters += [tensor(3, seed=3), tensor(3, seed=4)]

        def form(x, weight, bias, *norms, fast, frames=frames):
            names = dict(zip(("norm_weight", "norm_bias"), norms, strict=True)) if norms else {}
            out = function(x, weight, bias, stride, frames, fast=fast, **names)
            assert not out[:, 6:].any()
            return out[:, :6]

        check(form, x, *parameters)
        if not norm:
            check(form, x, parameters[0], None)


def test_convolution_without_a_gradient_for_its_input():
    form, x = fast.convolution_gelu, tensor(2, 11, 2, grad=False)
    check(lambda weight, fast: form(x, weight, None, 2, [5, 4], fast=fast), tensor(3, 2, 3))


@pytest.mark.parametrize("frames", [[9, 9], [9, 4], [1, 9]])
@pytest.mark.parametrize(("kernel", "stride"), [(10, 5), (4, 4), (3, 7)])
def test_first_convolution_group_norm(kernel, stride, frames):
    form = fast.convolution_group_norm_gelu
    waveforms = tensor(2, 8 * stride + kernel + stride // 2, grad=False) + 0.3
    check(
        lambda *x, fast: form(waveforms, *x, stride, frames, dtype=DOUBLE, fast=fast),
        tensor(3, 1, kernel, seed=1),
        tensor(3, seed=2),
        tensor(3, seed=3),
    )


@pytest.mark.parametrize("frames", [[9, 9], [9, 4], [0, 9]])
@pytest.mark.parametrize("bias", [True, False])
def test_first_convolution_layer_norm(bias, frames):
    form = fast.convolution_layer_norm_gelu
    waveforms = tensor(2, 8 * 5 + 10, grad=False)
    check(
        lambda *x, fast: form(waveforms, *x, 5, frames, dtype=DOUBLE, fast=fast),
        tensor(3, 1, 10, seed=1),
        tensor(3, seed=2) if bias else None,
        tensor(3, seed=3),
        tensor(3, seed=4),
    )


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_first_convolution_over_several_blocks(norm):
    """More frames than one block holds, and a result in bfloat16 whose inner computation is float32."""
    waveforms = torch.randn(1, 5 * 5000 + 10)
    weight, norm_weight, norm_bias = torch.randn(4, 1, 10).requires_grad_(), torch.rand(4) + 1, torch.randn(4)
    frames = [(waveforms.shape[1] - 10) // 5 + 1]
    grads = []
    for use_fast, dtype in ((True, torch.float32), (False, DOUBLE), (True, torch.bfloat16)):
        args = [t.to(DOUBLE) if dtype == DOUBLE else t for t in (waveforms, weight, norm_weight, norm_bias)]
        if norm == "group":
            out = fast.convolution_group_norm_gelu(*args, 5, frames, dtype=dtype, fast=use_fast)
        else:
            out = fast.convolution_layer_norm_gelu(*args[:2], None, *args[2:], 5, frames, dtype=dtype, fast=use_fast)
        assert out.dtype == dtype
        loss = (out.double() * torch.sin(torch.arange(out.numel()).view(out.shape))).sum()
        grads.append((out.double(), torch.autograd.grad(loss, weight)[0]))
    (out, grad), (expected, expected_grad), (out16, _) = grads
    assert torch.allclose(out, expected, atol=1e-4)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-3 * float(expected_grad.abs().max()))
    assert torch.allclose(out16, expected, rtol=2**-8, atol=1e-4), "one rounding to bfloat16 and no more"


# ---------------------------------------------------------------- positional convolution


@pytest.mark.parametrize("lengths", [[6, 6], [6, 2], [1, 6], [0, 3]])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 9])
def test_window_convolution(kernel, lengths):
    function = fast.window_convolution
    check(
        lambda *x, fast: function(*x, lengths, groups=2, fast=fast),
        tensor(2, 6, 4),
        tensor(4, 2, kernel, seed=1),
        tensor(4, seed=2),
    )


def test_window_convolution_in_several_pieces():
    """More windows than are laid out at a time: 3 x 1200 frames of 300 * 4 numbers."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).requires_grad_() for s in ((3, 1200, 8), (8, 4, 300), (8,)))
    results = []
    for use_fast in (True, False):
        out = fast.window_convolution(x, weight, bias, [1200, 700, 1200], groups=2, fast=use_fast)
        loss = (out * torch.sin(torch.arange(out.numel())).view(out.shape)).sum()
        results.append([out, *torch.autograd.grad(loss, [x, weight, bias])])
    for ours, plain in zip(*results, strict=True):
        assert float(((ours - plain).norm() / plain.norm()).detach()) < 1e-5


def low_precision_cases():
    """Shapes of the inputs that are in bfloat16, and the form on them; norms' scale and shift stay float32."""

    def residual_norm(residual, x, weight, bias, **options):
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = torch.ones(16, dtype=wide), torch.zeros(16, dtype=wide)
        return fast.linear_residual_norm(residual, x, weight, bias, scale, shift, p=0.2, bits=bits(), **options)

    return {
        "attention": ([(20, 24)], lambda x, **o: fast.attention(x, [12, 8], 2, p=0.2, bits=bits(), **o)),
        "window_convolution": (
            [(1, 40, 16), (16, 8, 32), (16,)],
            lambda x, w, b, **o: fast.window_convolution(x, w, b, [40], groups=2, **o),
        ),
        "convolution_gelu": (
            [(1, 41, 64), (16, 64, 3)],
            lambda x, w, **o: fast.convolution_gelu(x, w, None, 2, [20], **o),
        ),
        "linear_residual_norm": ([(20, 16), (20, 64), (16, 64), (16,)], residual_norm),
    }


@pytest.mark.parametrize("name", low_precision_cases())
def test_bfloat16_stays_near_the_float64_formula(name):
    """The error of one rounding per stored number, not of accumulation in bfloat16."""
    shapes, form = low_precision_cases()[name]
    narrow = [(torch.randn(s) / s[-1] ** 0.5).bfloat16().requires_grad_() for s in shapes]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    out, expected = form(*narrow, fast=True), form(*wide, fast=False)
    target = torch.randn_like(expected)
    grads = torch.autograd.grad((out * target.to(out.dtype)).sum(), narrow)
    expected_grads = torch.autograd.grad((expected * target).sum(), wide)
    for ours, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float(((ours.double() - reference).norm() / reference.norm()).detach()) < 0.015
