"""The mask function for transformers: a mask pattern in, one small tensor of codes out.

transformers describes a mask as a function of (batch, head, query, key) indices and asks the
registered mask function to turn it into what the attention function takes. SDPA's stores
(B, 1, N, N); this one returns, for the few patterns that block-sparse attention knows,

    None                        every key is valid and the queries are the last keys,
    (B, 1, 1, kv_length) int8   codes of padding and cache positions, see `padding`,
    (B, 1, 1, N) int32          which sequence each token of a packed batch belongs to,

and raises for every other pattern. Four dimensions mark a finished mask: `generate` hands masks
that it prepared back to the model, which would take two dimensions for the user's padding mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from entropy_attn.integrations.padding import encode
from entropy_attn.traced import is_capturing

# The patterns of transformers.masking_utils that lengths, windows and sequences express.
CAUSAL = "causal_mask_function"
BIDIRECTIONAL = "bidirectional_mask_function"
WINDOW = "sliding_window_overlay"
PACKED = "packed_sequence_mask_function"

CAPTURED_PACKED = (
    "entropy_attn takes no packed sequences (position_ids that start again, cu_seq_lens_q) in a "
    "CUDA graph, as their lengths would have to be read; call the model without one"
)


def token_codes(
    batch_size: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    cache_position: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask function that is registered with transformers; its arguments are theirs.

    ``cache_position`` comes from transformers before 5, in place of the offsets of the queries.
    In a graph of torch.compile nothing depends on the values of tensors; outside, one forward
    pass waits for the device once when it is given an attention mask, as SDPA's mask does.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    bidirectional = allow_is_bidirectional_skip is not None
    pattern = _Pattern(mask_function, use_vmap, bidirectional, local_size, device)
    if attention_mask is None and not bidirectional:
        segments = pattern.segments(batch_size, q_length)
        if segments is not None:
            return segments[:, None, None, :]
    pattern.check(q_length, q_offset, kv_length, kv_offset)

    valid = _fit(attention_mask, kv_length, kv_offset)
    if valid is not None and local_size is not None and q_length > 1:
        _check_no_gaps(valid, kv_length, local_size)
    if bidirectional:
        if valid is None or (allow_is_bidirectional_skip and _all(valid)):
            return None
        return encode(valid, torch.ones_like(valid))[:, None, None, :]

    # While torch.compile traces or a graph is captured, transformers may not allow the skip, as
    # there may be packed sequences; `pattern` has asserted that there are none.
    may_skip = allow_is_causal_skip or _hides_values(device)
    aligned = may_skip and _ends_with_queries(q_offset, q_length, kv_offset + kv_length)
    if aligned and (valid is None or _all(valid)):
        return None
    column = torch.arange(kv_length, device=device) + kv_offset
    present = (column < q_offset + q_length).expand(batch_size, -1)
    query = present & (column >= q_offset)
    codes = encode(present if valid is None else present & valid, query)
    return codes[:, None, None, :]


class _Pattern:
    """A mask function of transformers, and whether this package can express it."""

    def __init__(self, function, use_vmap, bidirectional, local_size, device) -> None:
        if use_vmap:
            raise ValueError(_unsupported("an overlay of the model (or_mask, and_mask)"))
        self.function = function
        self.bidirectional = bidirectional
        self.local_size = local_size
        self.device = device

    def segments(self, batch_size: int, q_length: int) -> Tensor | None:
        """(B, N) int32, which packed sequence each token belongs to; None if one a row.

        transformers finds packed sequences in ``position_ids``. In a graph of torch.compile it
        cannot tell whether there are any; `check` then asserts on the device that there are not. So
        does this where a CUDA graph is captured.
        """
        if torch.compiler.is_compiling():
            return None
        for part in _parts(self.function):
            if _name(part) == PACKED:
                segments = _closure(part)["packed_sequence_mask"]
                one_a_row = (segments == segments[:, :1]).all()
                if _hides_values(segments.device):
                    torch._assert_async(one_a_row, CAPTURED_PACKED)
                    return None
                if one_a_row:
                    return None
                return segments.to(torch.int32).expand(batch_size, -1).contiguous()
        return None

    def check(self, q_length: int, q_offset, kv_length: int, kv_offset: int) -> None:
        """Raise unless the pattern is plain causal, causal with a window, or bidirectional."""
        if torch.compiler.is_compiling():
            self._check_values(q_length, q_offset, kv_length, kv_offset)
            return
        known = {BIDIRECTIONAL} if self.bidirectional else {CAUSAL, WINDOW, PACKED}
        for part in _parts(self.function):
            if _name(part) not in known:
                raise ValueError(_unsupported(_name(part)))

    def _check_values(self, q_length: int, q_offset, kv_length: int, kv_offset: int) -> None:
        """Compare the pattern with the expected one along lines of (query, key) pairs, O(N).

        Names cannot be read while torch.compile traces. Chunks, packed sequences and
        bidirectional spans all differ from a causal pattern on the lines next to the diagonal or
        in the last row.
        """
        query = torch.arange(q_length, device=self.device) + q_offset
        key = torch.arange(kv_length, device=self.device) + kv_offset
        lines = [(query[-1:], key), (query, key[:1]), (query, query), (query[:-1], query[1:])]
        for back in (1, *(() if self.local_size is None else (self.local_size,))):
            lines.append((query[back:], query[: max(q_length - back, 0)]))
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        differs = [self._expected(q, k) ^ self.function(zero, zero, q, k) for q, k in lines]
        torch._assert_async(
            ~torch.cat(differs).any(),
            "entropy_attn under torch.compile supports causal, sliding-window and bidirectional "
            "masks; packed sequences (position_ids that start again) and other patterns run "
            "without torch.compile only, or not at all",
        )

    def _expected(self, query: Tensor, key: Tensor) -> Tensor:
        if self.bidirectional:
            return (query >= 0) & (key >= 0)
        causal = key <= query
        return causal if self.local_size is None else causal & (query - key < self.local_size)


def _parts(function: Callable) -> Iterator[Callable]:
    """The pieces that transformers combined with and_masks."""
    if _name(function) == "and_masks":
        for part in _closure(function)["mask_functions"]:
            yield from _parts(part)
    elif _name(function) == "remap_positions_for_packed_sequence":
        yield from _parts(_closure(function)["mask_function"])
    else:
        yield function


def _name(function: Callable) -> str:
    """The function of transformers.masking_utils that a pattern is or comes from."""
    return getattr(function, "__qualname__", repr(function)).split(".")[0]


def _closure(function: Callable) -> dict:
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _unsupported(what: str) -> str:
    return (
        f"the model asks for the mask pattern {what!r}; entropy_attn supports causal attention, "
        "with or without a sliding window, packed sequences, and bidirectional attention. Load "
        'this model with attn_implementation="sdpa"'
    )


def _fit(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """(B, kv_length) bool of a padding mask that may be shorter or start earlier than the keys."""
    if attention_mask is None:
        return None
    valid = attention_mask.bool()
    missing = kv_offset + kv_length - valid.shape[1]
    if missing > 0:
        valid = torch.nn.functional.pad(valid, (0, missing))
    return valid[:, kv_offset : kv_offset + kv_length]


def _check_no_gaps(valid: Tensor, kv_length: int, window: int) -> None:
    """A window counts valid tokens here, which is what transformers means only without gaps."""
    if kv_length <= window:
        return
    starts = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    message = (
        "attention_mask has zeros between ones, and the model has a sliding window: entropy_attn "
        "supports padding on the left or right only"
    )
    if _hides_values(valid.device):
        torch._assert_async((starts <= 1).all(), message)
    elif not bool((starts <= 1).all()):
        raise ValueError(message)


def _ends_with_queries(q_offset: int | Tensor, q_length: int, end: int) -> bool:
    """Whether the last key belongs to the last query, as far as that is known on the host."""
    if isinstance(q_offset, Tensor):
        if _hides_values(q_offset.device):
            return False
        q_offset = int(q_offset)
    return q_offset + q_length == end


def _all(valid: Tensor) -> bool:
    """Whether no token is padding; False where that would have to be read in a graph."""
    return not _hides_values(valid.device) and bool(valid.all())


def _hides_values(device: torch.device | None) -> bool:
    """Whether the values of tensors cannot be read now: torch.compile or a graph's capture."""
    return torch.compiler.is_compiling() or is_capturing(device)
