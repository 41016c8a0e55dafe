"""The encoder of data2vec text (Baevski et al. 2022, section 3.3; Liu et al. 2019): a transformer over tokens.

Token and position embeddings -> layer norm -> dropout -> blocks with norms after each part. Order and arithmetic are
fairseq's. What transformers calls Data2VecTextModel is the same with two more parts, which a model read from there
keeps: a vector of "token types" that is added to every token, and a pooler.

Padding may stand anywhere: a padded token is never attended to, and does not count in the positions. On a CPU only
the real tokens are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.nn.fast.batched_attention import SHORT_FRAMES
from toolkit.nn.fast.bits import DropoutBits, dropout
from toolkit.nn.fast.linear import layer_norm
from toolkit.nn.precision import compute_dtype, explicit_precision
from toolkit.nn.sizes import check_sizes
from toolkit.nn.transformer import INITIAL_STD, ROW_MULTIPLE, LayerStack, Layout, WantedRows
from toolkit.seeds import Randomness


@dataclass(frozen=True)
class EncodedText:
    """What the encoder makes of a batch.

    features : (batch, length, dim), zero in the padding, or (wanted, dim) if only some positions were asked for, in
        the format that was computed in.
    padding : (batch, length) bool, True in the padding.
    layers : (output, feed-forward output) of each layer that ran, both (batch, length, dim), if they were asked for.
    """

    features: Tensor
    padding: Tensor
    layers: Sequence[tuple[Tensor, Tensor]] | None


class TextEncoder(nn.Module):
    """Tokens to contextual features. Defaults are data2vec text base's.

    Arguments
    ---------
    vocab_size : token ids, special ones included.
    dim, num_layers, ffn_dim, num_heads : width, depth, inner width and heads of the transformer.
    max_positions : longest sequence, in tokens.
    padding_id : the token that pads; its embedding stays as it is.
    dropout, attention_dropout, activation_dropout : drop probabilities of the embeddings and the blocks' residuals, of
        attention weights, and inside the feed-forward blocks.
    layerdrop : probability of leaving a layer out.
    token_types : rows of a table whose first is added to every token's embedding (transformers); 0: no such table.
    pooler : keep the linear layer that transformers puts on the first token's vector; nothing here goes through it.
    gradient_checkpointing : recompute layers in the backward pass to save memory.

    Raises
    ------
    ModelError : settings that do not fit together.

    Example
    -------
    >>> encoder = TextEncoder(vocab_size=20, dim=16, num_layers=1, ffn_dim=32, num_heads=2, max_positions=8)
    >>> encoder(torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])).features.shape
    torch.Size([2, 4, 16])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int = 768,
        num_layers: int = 12,
        ffn_dim: int = 3072,
        num_heads: int = 12,
        max_positions: int = 512,
        padding_id: int = 1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        layerdrop: float = 0.0,
        token_types: int = 0,
        pooler: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        # Before any other local name exists: exactly the arguments.
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=dim, ffn_dim=ffn_dim, num_heads=num_heads, max_positions=max_positions)
        check_sizes(least=0, num_layers=num_layers, padding_id=padding_id, token_types=token_types)
        if padding_id >= vocab_size:
            raise ModelError(f"padding_id is {padding_id}, expected one of the {vocab_size} token ids (from 0).")
        self.config = arguments
        self.vocab_size, self.dim, self.dropout = vocab_size, dim, dropout
        self.max_positions, self.padding_id = max_positions, padding_id
        self.short_length = SHORT_FRAMES
        self.token_embedding = nn.Embedding(vocab_size, dim, padding_idx=padding_id)
        # As in the originals: real tokens count from padding_id + 1, and the rows before the padding's are never used.
        self.position_embedding = nn.Embedding(max_positions + padding_id + 1, dim, padding_idx=padding_id)
        self.token_type_embedding = nn.Embedding(token_types, dim) if token_types else None
        self.pooler = nn.Linear(dim, dim) if pooler else None
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=INITIAL_STD)
            nn.init.zeros_(embedding.weight[padding_id])
        if self.token_type_embedding is not None:
            nn.init.zeros_(self.token_type_embedding.weight)
        self.embedding_norm = nn.LayerNorm(dim)
        self.layers = LayerStack(
            num_layers=num_layers,
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            layerdrop=layerdrop,
            pre_norm=False,
            gradient_checkpointing=gradient_checkpointing,
        )

    def blocks(self) -> list[nn.Module]:
        """The modules that are gathered (where parameters are sharded) and compiled one by one."""
        return list(self.layers)

    def reset_layers(self, count: int) -> None:
        """Give the last ``count`` layers fresh weights; raises ModelError if there are not so many."""
        self.layers.reset_last(count)

    def forward(
        self,
        tokens: Tensor,
        *,
        rng: Randomness | None = None,
        layers: bool = False,
        positions: Tensor | None = None,
    ) -> EncodedText:
        """Encode a batch.

        Arguments
        ---------
        tokens : (batch, length) int64. A row of padding alone gives zeros.
        rng : this micro-batch's randomness. In training mode it drops.
        layers : return every layer's outputs.
        positions : (wanted,) int64, ascending indices into batch * length of real tokens (those masked, say): the
            result's features are for these alone, and on a CPU the last layer leaves the others out.

        Raises
        ------
        ModelError : a row holds more tokens than there are positions, or (seen on a CPU) an id that is no token's.
        """
        rng = rng if self.training else None
        padding = self._checked_padding(tokens)
        packed = tokens.device.type == "cpu" and tokens.shape[1] > self.short_length
        dtype = compute_dtype(tokens.device.type, self.token_embedding.weight.dtype)
        with explicit_precision(tokens.device.type):
            places = (~padding).cumsum(1).masked_fill(padding, 0) + self.padding_id
            real = (~padding).flatten().nonzero().squeeze(1) if packed else None
            layout = self._layout(padding, packed)
            x = self._embedded(tokens, places, real).to(dtype)
            x = layer_norm(x, self.embedding_norm.weight, self.embedding_norm.bias, self.embedding_norm.eps)
            bits = None if rng is None else DropoutBits(rng.child("transformer input"), x.device)
            x = dropout(x, self.dropout, bits)
            if not packed:
                x = x.masked_fill(padding.view(-1, 1), 0)
            wanted = None
            if packed and positions is not None and not layers:
                wanted = self._wanted_rows(padding, positions)
            x, outputs = self.layers(x, layout, rng=rng, layers=layers, wanted=wanted)
            if wanted is None:
                x = self._placed(x, padding, real)
                if positions is not None:
                    x = x.flatten(0, 1).index_select(0, positions)
        per_layer = [tuple(self._placed(rows, padding, real) for rows in pair) for pair in outputs] if layers else None
        return EncodedText(x, padding, per_layer)

    def _checked_padding(self, tokens: Tensor) -> Tensor:
        """(batch, length) bool, True in the padding, of tokens that the embeddings have rows for."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ModelError(
                f"the tokens are {tuple(tokens.shape)} of {str(tokens.dtype).removeprefix('torch.')}; expected "
                "(batch, length) int64."
            )
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ModelError(
                    f"the token id {wrong} is outside the model's vocabulary of {self.vocab_size}; encode the text "
                    "with the dictionary that belongs to the model."
                )
        padding = tokens == self.padding_id
        if tokens.shape[1] > self.max_positions:  # else there is nothing to ask a device for
            longest = int((~padding).sum(1).max())
            if longest > self.max_positions:
                raise ModelError(
                    f"a row holds {longest} tokens, but the model has {self.max_positions} positions; cut the text, or "
                    "build the model with a larger max_positions."
                )
        return padding

    @staticmethod
    def _layout(padding: Tensor, packed: bool) -> Layout:
        batch, length = padding.shape
        if packed:
            return Layout((~padding).sum(1).tolist(), None, True)
        # attention without any key would give no number: a row of padding alone attends to its first token
        first = torch.zeros_like(padding)
        first[:, :1] = padding.all(1, keepdim=True)
        return Layout([length] * batch, padding & ~first, False)

    def _embedded(self, tokens: Tensor, places: Tensor, real: Tensor | None) -> Tensor:
        """(rows, dim): the sums of the embeddings, of the ``real`` tokens alone where they are given."""
        tokens, places = tokens.flatten(), places.flatten()
        if real is not None:
            filling = -len(real) % ROW_MULTIPLE
            tokens, places = (
                F.pad(values.index_select(0, real), (0, filling), value=self.padding_id) for values in (tokens, places)
            )
        embedded = self.token_embedding(tokens) + self.position_embedding(places)
        return embedded if self.token_type_embedding is None else embedded + self.token_type_embedding.weight[0]

    @staticmethod
    def _wanted_rows(padding: Tensor, positions: Tensor) -> WantedRows:
        batch, length = padding.shape
        rows = (~padding).flatten().cumsum(0) - 1
        counts = torch.bincount(torch.div(positions, length, rounding_mode="floor"), minlength=batch)
        return WantedRows(rows.index_select(0, positions), counts.tolist())

    @staticmethod
    def _placed(rows: Tensor, padding: Tensor, real: Tensor | None) -> Tensor:
        """(rows, dim) -> (batch, length, dim), zero in the padding."""
        batch, length = padding.shape
        if real is None:
            return rows.view(batch, length, -1).masked_fill(padding[..., None], 0)
        if len(real) == batch * length == len(rows):
            return rows.view(batch, length, -1)
        out = rows.new_zeros(batch * length, rows.shape[1])
        return out.index_copy(0, real, rows[: len(real)]).view(batch, length, -1)
