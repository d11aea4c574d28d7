"""What the layers of a model did: calls, sparse or dense and why, density, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from entropy_attn.integrations.table import render
from entropy_attn.traced import find, is_capturing, key_of

SPARSE, DECODED = "sparse", "decoded"
# Masks, and their rows in all, that a layer keeps until they are added up.
MOST_MASKS, MOST_COUNTS = 64, 2**16


@dataclass(frozen=True)
class LayerStatistics:
    """Attributes:
    name: of the attention module.
    sparse: calls that ran sparse, as prefill.
    decoded: calls of few queries to a cache that ran sparse.
    dense: calls that ran dense, by reason.
    compiled: what torch.compile put into its graphs, by reason, once a trace; the runs of a
        graph are not counted.
    density: blocks visited over blocks with a visible pair, over all sparse calls; None
        without such a call. What a captured graph ran counts here, though not as calls.
    decode_density: the same over all decoded calls and the heads of keys.
    kv_len: shortest and longest keys of a call, in tokens; None without a call.
    """

    name: str
    sparse: int
    dense: dict[str, int]
    compiled: dict[str, int]
    density: float | None
    kv_len: tuple[int, int] | None
    decoded: int = 0
    decode_density: float | None = None

    @property
    def calls(self) -> int:
        return self.sparse + self.decoded + sum(self.dense.values())


@dataclass(frozen=True)
class Statistics:
    """The statistics of every layer; ``str()`` gives a table."""

    layers: tuple[LayerStatistics, ...]

    @property
    def sparse(self) -> int:
        return sum(layer.sparse for layer in self.layers)

    @property
    def dense(self) -> dict[str, int]:
        return dict(sum((Counter(layer.dense) for layer in self.layers), Counter()))

    @property
    def decoded(self) -> int:
        return sum(layer.decoded for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Mean over the layers that ran sparse."""
        return _mean(layer.density for layer in self.layers)

    @property
    def decode_density(self) -> float | None:
        """Mean over the layers that decoded sparsely."""
        return _mean(layer.decode_density for layer in self.layers)

    def __str__(self) -> str:
        columns = ["layer", "sparse", "dense", "density", "keys"]
        rows = [
            [
                layer.name,
                str(layer.sparse) + _traced(layer.compiled, sparse=True),
                str(sum(layer.dense.values())) + _traced(layer.compiled, sparse=False),
                _share(layer.density),
                "-" if layer.kv_len is None else "{}..{}".format(*layer.kv_len),
            ]
            for layer in self.layers
        ]
        if self.decoded:
            columns[4:4] = ["decoded", "decode density"]
            for row, layer in zip(rows, self.layers, strict=True):
                row[4:4] = [str(layer.decoded), _share(layer.decode_density)]
        notes = [f"dense, {count} calls: {reason}" for reason, count in self.dense.items()]
        if any(layer.compiled for layer in self.layers):
            notes.append("+n: in a graph of torch.compile, whose runs are not counted")
        return render("attention calls", columns, rows, notes)


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def _traced(compiled: dict[str, int], sparse: bool) -> str:
    count = sum(n for reason, n in compiled.items() if (reason == SPARSE) == sparse)
    return f" +{count}" if count else ""


class Recorder:
    """Counts the calls of one layer without waiting for the device."""

    def __init__(self) -> None:
        self.key = key_of(self)
        self._totals: Tensor | None = None
        self._replayed: Tensor | None = None
        self.reset()

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # a copy of a layer counts anew

    def reset(self) -> None:
        self.calls: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()
        self.kv_len: tuple[int, int] | None = None
        self._kept: Tensor | None = None
        self._masks: list[tuple[Tensor, int]] = []  # not yet in _kept
        self._visible: Tensor | float = 0
        for totals in (self._totals, self._replayed):
            if totals is not None:
                totals.zero_()  # a captured graph may go on adding to it

    def decoding_totals(self, device: torch.device) -> Tensor:
        """(2,) int64, to which decoding adds the blocks that it kept and that were visible."""
        self._totals = _pair(self._totals, torch.int64, device)
        return self._totals

    def call(self, reason: str, kv_len: int) -> None:
        """One call; ``reason`` is SPARSE, DECODED or why it runs dense."""
        self.calls[reason] += 1
        low, high = self.kv_len or (kv_len, kv_len)
        self.kv_len = (min(low, kv_len), max(high, kv_len))

    def density(self, counts: Tensor, batch: int, heads: int, visible: Tensor | int) -> None:
        """Add the lists of a block mask, whose lengths are ``counts``.

        Args:
            visible: number of blocks with a visible pair, of one head.
        """
        times = (batch // counts.shape[0]) * (heads // counts.shape[1])
        replayed = self._replayed_totals(counts.device)
        if is_capturing(counts.device):  # what the graph writes is only there until it runs again
            replayed[0].add_(counts.sum(dtype=torch.float64) * times)
            replayed[1].add_(visible * heads)
            return
        # Each sum is launches that a small model would wait for.
        self._masks.append((counts, times))
        self._visible = self._visible + visible * heads
        if len(self._masks) >= MOST_MASKS or counts.numel() * len(self._masks) >= MOST_COUNTS:
            self._add_up()

    def _replayed_totals(self, device: torch.device) -> Tensor:
        """(2,) fp64, to which captured graphs add the blocks that they kept and that were visible.

        Made in the first call that is not captured, if there is one.
        """
        self._replayed = _pair(self._replayed, torch.float64, device)
        return self._replayed

    @torch.no_grad()
    def _add_up(self) -> None:
        alike: dict[tuple[torch.device, int], list[Tensor]] = {}
        for counts, times in self._masks:
            alike.setdefault((counts.device, times), []).append(counts.flatten())
        self._masks = []
        for (_, times), rows in alike.items():
            kept = torch.cat(rows).sum(dtype=torch.float64) * times
            self._kept = kept if self._kept is None else self._kept + kept.to(self._kept.device)

    def read(self, name: str) -> LayerStatistics:
        """Waits for the device."""
        ran_sparse = (SPARSE, DECODED)
        dense = {reason: n for reason, n in self.calls.items() if reason not in ran_sparse}
        density = self._density()
        kept, visible = (0, 0) if self._totals is None else self._totals.tolist()
        return LayerStatistics(
            name, self.calls[SPARSE], dense, dict(self.compiled), density, self.kv_len,
            self.calls[DECODED], kept / visible if visible else None,
        )  # fmt: skip

    def _density(self) -> float | None:
        if any(counts.is_cuda for counts, _ in self._masks):
            torch.cuda.synchronize()  # they may be another stream's
        self._add_up()
        kept = 0.0 if self._kept is None else float(self._kept)
        visible = float(self._visible)
        if self._replayed is not None:
            replayed = self._replayed.tolist()
            kept, visible = kept + replayed[0], visible + replayed[1]
        if self._kept is None and not visible:
            return None
        return kept / max(visible, 1.0)


def _pair(totals: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The totals, two zeros where there are none yet on the device."""
    if totals is not None and totals.device == device:
        return totals
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=dtype, device=device)


@torch.compiler.assume_constant_result
def note_traced(key: str, reason: str) -> None:
    """Runs when torch.compile traces a call, not when the graph runs."""
    find(key).compiled[reason] += 1


def count_visible_blocks(
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    *,
    is_causal: bool,
    window: int | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
) -> Tensor | int:
    """Blocks with a visible pair over the batch, of one head: an int, or a tensor with lengths."""
    if kv_lens is None and q_lens is None:
        return batch * _visible_blocks_without_lens(q_len, kv_len, block_size, is_causal, window)
    return visible_blocks(
        q_len, kv_len, block_size, is_causal=is_causal, window=window, kv_lens=kv_lens,
        q_lens=q_lens, batch=batch,
    ).sum()  # fmt: skip


@lru_cache(maxsize=256)
def _visible_blocks_without_lens(q_len, kv_len, block_size, is_causal, window) -> int:
    counts = visible_blocks(q_len, kv_len, block_size, is_causal=is_causal, window=window)
    return int(counts.sum())


def visible_blocks(
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    *,
    is_causal: bool,
    window: int | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    batch: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """(B, Mq) int64: how many blocks of keys hold a key that a block of queries may see.

    On the device of the lengths if there are any, else on ``device``.
    """
    block_q, block_k = block_size
    lengths = kv_lens if kv_lens is not None else q_lens
    device = device if lengths is None else lengths.device
    k_end = _column(kv_lens, batch, kv_len, device)
    q_end = _column(q_lens, batch, q_len, device)
    first = torch.arange(0, q_len, block_q, device=device)[None, :]
    last = torch.minimum(first + block_q, q_end) - 1  # last valid query of the block
    offset = k_end - q_end
    low = torch.zeros_like(last)
    high = (k_end - 1).expand_as(last)
    if is_causal:
        high = torch.minimum(high, last + offset)
        if window is not None:
            low = (first + offset - window + 1).clamp(min=0)
    count = high.div(block_k, rounding_mode="floor") - low.div(block_k, rounding_mode="floor") + 1
    return torch.where((last >= first) & (high >= low), count, 0)


def _column(lengths: Tensor | None, batch: int, default: int, device) -> Tensor:
    if lengths is None:
        return torch.full((batch, 1), default, dtype=torch.int64, device=device)
    return lengths.to(torch.int64)[:, None]
