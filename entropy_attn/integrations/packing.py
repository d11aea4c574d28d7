"""Packing: several sequences in one row of tokens, taken apart for attention.

Sequences are grouped by length, each group padded to its longest member, so that no more than
twice the tokens are stored. Taking them apart needs their lengths on the host: it waits for the
device once a forward pass, not once a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from entropy_attn.integrations.call import AttentionCall


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a packed batch lie.

    Attributes:
        groups: for each group of sequences of similar length, their tokens as (S, L) int64
            indices into the B * N tokens; past the end of a sequence an arbitrary token.
        lengths: for each group the (S,) int32 lengths of its sequences.
        place: (B * N,) int64, where each token stands in the groups' S * L rows, concatenated.
    """

    groups: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    place: Tensor

    def attend(self, call: AttentionCall, attend: Callable[[AttentionCall], Tensor]) -> Tensor:
        """Run ``attend`` on each group of sequences and put the rows back: (B, H, N, D)."""
        rows = []
        for tokens, lengths in zip(self.groups, self.lengths, strict=True):
            group = replace(
                call,
                query=_take(call.query, tokens),
                key=_take(call.key, tokens),
                value=_take(call.value, tokens),
                packing=None,
                kv_lens=lengths,
                q_lens=lengths,
            )
            rows.append(attend(group).transpose(1, 2).flatten(0, 1))
        out = torch.cat(rows).index_select(0, self.place)
        return out.unflatten(0, (call.query.shape[0], call.q_len)).transpose(1, 2)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """(S, H, L, D): tokens (S, L) of the B * N tokens of (B, H, N, D)."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)


def packing_from_starts(starts: Tensor) -> Packing:
    """From (B * N,) bool, true where a sequence starts. Waits for the device."""
    begin = starts.nonzero().flatten().cpu()
    lengths = torch.diff(begin, append=torch.tensor([starts.numel()]))
    # Sequences of up to 2^k tokens, and more than half of that, form one group.
    size = torch.ceil(torch.log2(lengths.double())).long()
    groups, counts, order = [], [], []
    for k in size.unique():
        members = size == k
        first, count = begin[members], lengths[members]
        step = torch.arange(int(count.max()))
        inside = step < count[:, None]
        tokens = first[:, None] + torch.minimum(step, count[:, None] - 1)
        groups.append(tokens)
        counts.append(count.to(torch.int32))
        order.append(torch.where(inside, tokens, -1).flatten())
    rows = torch.cat(order)
    used = (rows >= 0).nonzero().flatten()
    place = torch.empty(starts.numel(), dtype=torch.int64)
    place[rows[used]] = used
    device = starts.device
    return Packing(
        groups=tuple(t.to(device) for t in groups),
        lengths=tuple(t.to(device) for t in counts),
        place=place.to(device),
    )


def packing_from_segments(segments: Tensor) -> Packing:
    """From (B, N) integers that are equal within a sequence; a new row starts a new sequence."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return packing_from_starts(starts.flatten())


def packing_from_cumulative(cumulative: Tensor, tokens: int) -> Packing:
    """From cumulative lengths (S + 1,), from 0 to ``tokens``, as in cu_seq_lens_q.

    Raises:
        ValueError: they do not run from 0 to ``tokens`` in increasing order.
    """
    ends = cumulative.cpu()
    if ends[0] != 0 or ends[-1] != tokens or (torch.diff(ends) <= 0).any():
        raise ValueError(
            f"cu_seq_lens_q must increase from 0 to the {tokens} tokens of the batch, "
            f"got {ends.tolist()}"
        )
    starts = torch.zeros(tokens, dtype=torch.bool, device=cumulative.device)
    starts[cumulative[:-1].long()] = True
    return packing_from_starts(starts)


class PackingCache:
    """The packing that a tensor describes, built once and shared by all layers."""

    def __init__(self) -> None:
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, build: Callable[[], Packing]) -> Packing:
        version, packing = self._known.get(tensor, (None, None))
        # A buffer that was written to since then may describe other sequences.
        if packing is None or version != tensor._version:
            packing = build()
            self._known[tensor] = (tensor._version, packing)
        return packing
