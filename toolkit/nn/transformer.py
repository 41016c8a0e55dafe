"""The transformer over features: positional convolution, blocks of self-attention and feed-forward, layerdrop.

On a CPU the real frames of a padded batch are packed into rows (frames, dim), so that padding costs nothing and
needs no mask. Batches of short utterances, and batches on other devices, stay padded, of fixed shape, and keys in the
padding are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.errors import ModelError
from toolkit.nn.fast.attention import attention, padded_attention
from toolkit.nn.fast.batched_attention import SHORT_FRAMES, batched_attention
from toolkit.nn.fast.bits import DropoutBits, check_drop_probabilities, dropout
from toolkit.nn.fast.common import full_lengths, pack_rows, padding_mask, unpack_rows
from toolkit.nn.fast.linear import layer_norm, linear_gelu, linear_residual, linear_residual_norm
from toolkit.nn.positional import PositionalConv
from toolkit.nn.transfer import to_device
from toolkit.seeds import Randomness

ROW_MULTIPLE = 8
"""Packed rows are filled up to a multiple of this: products on a CPU are 3 to 5 % faster then."""

INITIAL_STD = 0.02
"""Standard deviation of the products' weights at the start, as in BERT."""


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    _draw_weights(layer)
    return layer


def _draw_weights(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Layout:
    """How the frames of a batch lie in rows.

    lengths : rows of each utterance, padding included where the batch stayed padded.
    padding : (batch, frames) bool, True in the padding, for a batch that stayed padded; None where there is none.
    packed : only real frames, then perhaps a few rows that belong to no utterance (CPU).
    """

    lengths: list[int]
    padding: Tensor | None
    packed: bool


@dataclass(frozen=True)
class WantedRows:
    """The packed rows for which the last block is to give results: rows (wanted,), and how many in each utterance."""

    rows: Tensor
    counts: list[int]

    @classmethod
    def of(cls, positions: Tensor, lengths: list[int], frames: int) -> WantedRows:
        """From ascending positions in (batch * frames); those in the padding give the utterance's last frame."""
        real = torch.tensor(lengths)
        utterances = torch.div(positions, frames, rounding_mode="floor")
        first = real.cumsum(0) - real
        within = torch.minimum(positions - utterances * frames, real[utterances] - 1)
        return cls(first[utterances] + within, torch.bincount(utterances, minlength=len(lengths)).tolist())


class _LeftOut(torch.autograd.Function):
    """A block that is left out: part of the graph, as a block that runs is, with no gradient for its parameters."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.count


class TransformerLayer(nn.Module):
    """One block: self-attention, then a feed-forward network, each with dropout, residual and norm.

    ``qkv`` holds the weights of queries, keys and values on top of each other, (3 * dim, dim), in this order.

    Arguments
    ---------
    dim, ffn_dim, num_heads : width, inner width of the feed-forward network, heads.
    dropout, attention_dropout, activation_dropout : drop probabilities of the two outputs, of the attention
        probabilities, and of the feed-forward network's inner activations.
    pre_norm : norms before attention and network (LARGE), or after their residuals (BASE).
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.pre_norm = num_heads, pre_norm
        self.dropout, self.attention_dropout, self.activation_dropout = dropout, attention_dropout, activation_dropout
        self.fast = True
        self.qkv = _linear(dim, 3 * dim)
        self.out = _linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.fc1 = _linear(dim, ffn_dim)
        self.fc2 = _linear(ffn_dim, dim)
        self.final_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        bits: DropoutBits | None = None,
        need_ffn: bool = False,
        wanted: WantedRows | None = None,
        left_out: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output, and that of the feed-forward network if ``need_ffn``.

        Arguments
        ---------
        x : (rows, dim), the frames of all utterances in turn.
        layout : whose the rows are.
        bits : dropout decisions; None means evaluation.
        need_ffn : also return the feed-forward output before dropout, residual and norm (data2vec's target).
        wanted : give results for these of the packed rows only; they still attend to all.
        left_out : give ``x`` on as it is, and no gradient to the parameters.
        """
        if left_out:
            return _LeftOut.apply(x, *self.parameters()), None
        dtype = x.dtype
        h = self._normed(self.attention_norm, x) if self.pre_norm else x
        h = self._attention(h, layout, bits) if wanted is None else self._attention_of(wanted, h, layout, bits)
        x = x if wanted is None else x.index_select(0, wanted.rows)
        x = self._add(x, h, self.out, self.attention_norm, bits)
        h = self._normed(self.final_norm, x) if self.pre_norm else x
        h = linear_gelu(
            h, self.fc1.weight.to(dtype), self.fc1.bias.to(dtype), p=self.activation_dropout, bits=bits, fast=self.fast
        )
        if not need_ffn:
            return self._add(x, h, self.fc2, self.final_norm, bits), None
        ffn = F.linear(h, self.fc2.weight.to(dtype), self.fc2.bias.to(dtype))
        x = x + dropout(ffn, self.dropout, bits)
        return x if self.pre_norm else self._normed(self.final_norm, x), ffn

    @staticmethod
    def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, norm.weight, norm.bias, norm.eps)

    def _add(self, x: Tensor, h: Tensor, linear: nn.Linear, norm: nn.LayerNorm, bits: DropoutBits | None) -> Tensor:
        """x + dropout(linear(h)), normed in a post-norm block."""
        weight, bias = linear.weight.to(x.dtype), linear.bias.to(x.dtype)
        if self.pre_norm:
            return linear_residual(x, h, weight, bias, p=self.dropout, bits=bits, fast=self.fast)
        return linear_residual_norm(
            x, h, weight, bias, norm.weight, norm.bias, p=self.dropout, bits=bits, eps=norm.eps, fast=self.fast
        )

    def _attention(self, h: Tensor, layout: Layout, bits: DropoutBits | None) -> Tensor:
        """What each row gathers from its utterance, (rows, dim), before the output product."""
        qkv = F.linear(h, self.qkv.weight.to(h.dtype), self.qkv.bias.to(h.dtype))
        lengths, p = layout.lengths, self.attention_dropout
        if layout.packed:
            return attention(qkv, lengths, self.num_heads, p=p, bits=bits, fast=self.fast)
        if qkv.device.type == "cpu":
            return batched_attention(qkv, layout.padding, len(lengths), self.num_heads, p=p, bits=bits, fast=self.fast)
        batch, dim = len(lengths), h.shape[1]
        # (rows, 3 * dim) -> three of (batch, heads, frames, channels of a head)
        q, k, v = qkv.view(batch, -1, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        out = padded_attention(q, k, v, layout.padding, p if bits is not None else 0.0)
        return out.transpose(1, 2).reshape(-1, dim)

    def _attention_of(self, wanted: WantedRows, h: Tensor, layout: Layout, bits: DropoutBits | None) -> Tensor:
        """The same for some of the packed rows: queries for these, keys and values for all."""
        dim = h.shape[1]
        weight, bias = self.qkv.weight.to(h.dtype), self.qkv.bias.to(h.dtype)
        return attention(
            F.linear(h, weight[dim:], bias[dim:]),
            layout.lengths,
            self.num_heads,
            p=self.attention_dropout,
            bits=bits,
            queries=F.linear(h.index_select(0, wanted.rows), weight[:dim], bias[:dim]),
            query_lengths=wanted.counts,
            fast=self.fast,
        )


class LayerStack(nn.ModuleList):
    """Blocks one on top of the other, with layerdrop: what the transformers of speech and of text have in common.

    Arguments
    ---------
    num_layers : how many.
    dim, ffn_dim, num_heads, dropout, attention_dropout, activation_dropout, pre_norm : of each, see
        :class:`TransformerLayer`.
    layerdrop : probability of leaving a block out in training.
    gradient_checkpointing : recompute each block in the backward pass (with the same dropout) to save memory.

    ``keep_all`` set to True calls blocks that are left out, too (they do nothing): where parameters are sharded over
    ranks that leave out different ones, every rank has to take part in gathering each.

    Raises
    ------
    ModelError : settings that do not fit together.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        layerdrop: float,
        pre_norm: bool,
        gradient_checkpointing: bool,
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ModelError(f"the transformer's dim {dim} is no multiple of its num_heads {num_heads}.")
        if num_layers < 0 or ffn_dim < 1:
            raise ModelError(
                f"the transformer has {num_layers} layers of inner width {ffn_dim}; expected at least 0 and 1."
            )
        check_drop_probabilities(
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            layerdrop=layerdrop,
        )
        super().__init__(
            TransformerLayer(
                dim=dim,
                ffn_dim=ffn_dim,
                num_heads=num_heads,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                pre_norm=pre_norm,
            )
            for _ in range(num_layers)
        )
        self.layerdrop, self.gradient_checkpointing = layerdrop, gradient_checkpointing
        self.keep_all = False

    def reset_last(self, count: int) -> None:
        """Give the last ``count`` blocks fresh weights; raises ModelError if there are not so many."""
        if not 0 <= count <= len(self):
            raise ModelError(f"{count} layers cannot be reset; the encoder has {len(self)}.")
        for layer in list(self)[len(self) - count :]:
            for part in layer.children():
                if isinstance(part, nn.LayerNorm):
                    part.reset_parameters()
                else:
                    _draw_weights(part)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        rng: Randomness | None = None,
        layers: bool = False,
        wanted: WantedRows | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The last block's output, and with ``layers`` (output, feed-forward output) of each block that ran.

        Arguments
        ---------
        x : (rows, dim).
        layout : whose the rows are.
        rng : randomness of this micro-batch; None means evaluation.
        layers : also return what each block gives, (rows, dim) both.
        wanted : the result is for these of the packed rows alone, and the last block does not compute the others.
        """
        chosen = self._layers_to_run(rng)
        outputs: list[tuple[Tensor, Tensor]] = []
        for i in range(len(self)):
            if i not in chosen:
                if self.keep_all:
                    x, _ = self[i](x, layout, left_out=True)
                continue
            x, ffn = self._run_layer(i, x, layout, rng, layers, wanted if i == chosen[-1] else None)
            if layers:
                outputs.append((x, ffn))
        if wanted is not None and not chosen:
            x = x.index_select(0, wanted.rows)
        # Hooks on what the stack's owner returns must not be hooks on the last block's own output: which of the two
        # is gathered first in the backward pass would depend on what the rank left out.
        return x.view_as(x) if self.keep_all else x, outputs

    def _layers_to_run(self, rng: Randomness | None) -> list[int]:
        if rng is None or self.layerdrop == 0:
            return list(range(len(self)))
        return [i for i, u in enumerate(rng.numpy("layerdrop").random(len(self))) if u > self.layerdrop]

    def _run_layer(
        self, i: int, x: Tensor, layout: Layout, rng: Randomness | None, need_ffn: bool, wanted: WantedRows | None
    ) -> tuple[Tensor, Tensor | None]:
        def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
            # a fresh stream for each call: a recomputed block draws the decisions it drew before
            bits = None if rng is None else DropoutBits(rng.child("layer", i), x.device)
            return self[i](x, layout, bits=bits, need_ffn=need_ffn, wanted=wanted)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            own_bits = rng is None or x.device.type == "cpu"
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=not own_bits)
        return run(x)


class TransformerEncoder(nn.Module):
    """Positional convolution and a stack of blocks (wav2vec 2.0, section 2). Defaults are BASE's.

    Arguments
    ---------
    num_layers, dim, ffn_dim, num_heads : blocks, width, inner width of the feed-forward networks, heads.
    dropout : drop probability of the blocks' outputs and of the first block's input.
    attention_dropout, activation_dropout : drop probabilities of attention probabilities and inner activations.
    layerdrop : probability of leaving a block out in training.
    pre_norm : norms before each part and one at the end (LARGE), or after each part and one at the start (BASE).
    pos_kernel, pos_groups, pos_depth, pos_over_padding : see :class:`toolkit.nn.positional.PositionalConv`.
    gradient_checkpointing : recompute each block in the backward pass (with the same dropout) to save memory.

    Raises
    ------
    ModelError : settings that do not fit together.

    Example
    -------
    >>> encoder = TransformerEncoder(num_layers=2, dim=16, ffn_dim=32, num_heads=2, pos_kernel=4, pos_groups=2)
    >>> encoder(torch.randn(2, 7, 16), torch.tensor([7, 5])).shape
    torch.Size([2, 7, 16])
    """

    def __init__(
        self,
        *,
        num_layers: int = 12,
        dim: int = 768,
        ffn_dim: int = 3072,
        num_heads: int = 12,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        layerdrop: float = 0.05,
        pre_norm: bool = False,
        pos_kernel: int = 128,
        pos_groups: int = 16,
        pos_depth: int = 1,
        pos_over_padding: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.pre_norm = dropout, pre_norm
        self.short_frames = SHORT_FRAMES
        self.positional = PositionalConv(dim, pos_kernel, pos_groups, pos_depth, over_padding=pos_over_padding)
        self.norm = nn.LayerNorm(dim)
        self.layers = LayerStack(
            num_layers=num_layers,
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            layerdrop=layerdrop,
            pre_norm=pre_norm,
            gradient_checkpointing=gradient_checkpointing,
        )

    def reset_layers(self, count: int) -> None:
        """Give the last ``count`` blocks fresh weights.

        The last blocks of a pretrained encoder may serve its objective more than the next task. Pasad et al. 2021
        (arXiv 2107.04734, abstract) report better word error rates with little data by a changed fine-tuning; that
        the change is this one is from memory, unverified.

        Arguments
        ---------
        count : how many; 0 changes nothing.

        Raises
        ------
        ModelError : there are not so many.
        """
        self.layers.reset_last(count)

    def forward(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        *,
        rng: Randomness | None = None,
        dtype: torch.dtype | None = None,
        layers: bool = False,
        positions: Tensor | None = None,
        padding_too: bool = False,
    ) -> Tensor | tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Contextual features.

        Arguments
        ---------
        x : (batch, frames, dim).
        frame_lengths : (batch,) real frames of each utterance, best on the host; None means that all are full.
        rng : randomness of this micro-batch, for dropout and layerdrop; None means evaluation. On devices other than
            the CPU dropout draws from torch's own generator of the device instead.
        dtype : format of products and of the features between blocks; None takes that of ``x``.
        layers : also return (output, feed-forward output) of each block that ran, both (batch, frames, dim).
        positions : (wanted,) int64, ascending indices into batch * frames of real frames: the result is for these
            alone, and the last block does not compute the others (half a block's work less in pretraining).
        padding_too : compute frames of padding like real ones (nobody attends to them), for statistics that the
            originals take over them; they are then not zero in the result.

        Returns
        -------
        (batch, frames, dim) in ``dtype``, zero in the padding, or (wanted, dim); with ``layers``, this and the list.
        """
        x = x.to(dtype or x.dtype)
        batch, frames, _ = x.shape
        padding_too = padding_too and frame_lengths is not None
        packed = x.device.type == "cpu" and frames > self.short_frames and not padding_too
        padding = None
        if frame_lengths is not None and not packed:
            # attention without any key would give no number: an utterance has one frame at least
            frame_lengths = to_device(frame_lengths, x.device)
            padding = padding_mask(frame_lengths.clamp(min=1), frames)
            x = x.masked_fill(padding[..., None], 0)
        layout = Layout(full_lengths(frame_lengths if packed else None, batch, frames), padding, packed)
        x = x + self.positional(x, None if padding_too else frame_lengths)
        x = pack_rows(x, layout.lengths, ROW_MULTIPLE if packed else 1)
        if not self.pre_norm:
            x = layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        x = dropout(x, self.dropout, None if rng is None else DropoutBits(rng.child("transformer input"), x.device))
        wanted = None
        if packed and positions is not None and not layers:
            wanted = WantedRows.of(positions, layout.lengths, frames)
        x, outputs = self.layers(x, layout, rng=rng, layers=layers, wanted=wanted)
        if self.pre_norm:
            x = layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        if wanted is not None:
            return x
        if padding_too:
            layout = replace(layout, padding=None)  # nothing is made zero
        x = self._unpacked(x, layout, frames)
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)
        if not layers:
            return x
        return x, [tuple(self._unpacked(rows, layout, frames) for rows in pair) for pair in outputs]

    @staticmethod
    def _unpacked(rows: Tensor, layout: Layout, frames: int) -> Tensor:
        x = unpack_rows(rows, layout.lengths, frames)
        return x if layout.padding is None else x.masked_fill(layout.padding[..., None], 0)
