"""The one place that validates arguments.

Every check raises an error that names the argument, its value, what is allowed and what to do.
Values that live on a GPU are not read here: a call must not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entropy_attn.masks import BlockMask

ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = (16, 256)
MAX_HALFSPACES = 12
MAX_CELLS = 1024
MOST_PAGED_QUERIES = 16
MOST_DECODING_BLOCKS = 16384
ENTROPY_KINDS = ("row", "block", "tile")


def check_qkv(query: Tensor, key: Tensor, value: Tensor | None = None, suffix: str = "") -> None:
    """Shapes, dtypes and devices of (B, Hq, Nq, D) and (B, Hkv, Nk, D).

    Args:
        suffix: of the names of key and value.
    """
    key_name, value_name = f"key{suffix}", f"value{suffix}"
    named = {"query": query, key_name: key} | ({} if value is None else {value_name: value})
    for name, tensor in named.items():
        check_tokens(name, tensor)
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but query has {query.dtype}; "
                "cast them to one dtype"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} but query is on {query.device}; move it with .to()"
            )
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch:
        raise ValueError(f"{key_name} has batch size {key.shape[0]} but query has {batch}")
    if key.shape[3] != head_dim:
        raise ValueError(f"{key_name} has head_dim {key.shape[3]} but query has {head_dim}")
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(
            f"query has {heads} heads, which is not a multiple of {key_name}'s {key.shape[1]} heads"
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(
            f"{value_name} has shape {tuple(value.shape)} but {key_name} has {tuple(key.shape)}"
        )
    low, high = HEAD_DIMS
    if not low <= head_dim <= high:
        raise ValueError(f"head_dim is {head_dim}; allowed are {low} to {high}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a float; head_dim ** -0.5 by default."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def check_window(window: int | None, is_causal: bool) -> int:
    """The window as an int, 0 for none."""
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive int (tokens) or None, got {window!r}")
    if not is_causal:
        raise ValueError(
            f"window={window} needs is_causal=True: it counts keys back from the query"
        )
    return window


def check_reorderable(is_causal: bool, window: int | None) -> None:
    """That no query's keys depend on where it stands."""
    for name, value in (("is_causal", is_causal), ("window", window)):
        if value is not None and value is not False:
            raise ValueError(
                f"{name}={value!r} cannot be combined with reorder, which sorts the tokens: only "
                "attention without is_causal and window can be reordered; leave reorder out"
            )


def check_lens(name: str, lens: Tensor | None, query: Tensor) -> Tensor | None:
    """(B,) int32 valid lengths on the device of the query, adjacent in memory as kernels read them.

    The values are not read.
    """
    if lens is None:
        return None
    if not isinstance(lens, Tensor) or lens.dtype != torch.int32:
        got = lens.dtype if isinstance(lens, Tensor) else type(lens).__name__
        raise TypeError(f"{name} must be an int32 tensor of shape (batch,), got {got}")
    if lens.shape != query.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({query.shape[0]},), one length a batch row, "
            f"got {tuple(lens.shape)}"
        )
    if lens.device != query.device:
        raise ValueError(f"{name} is on {lens.device} but query is on {query.device}")
    return lens.contiguous()


def check_pages(query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor) -> None:
    """Pages (P, Hkv, page, D) and a table (B, M) int32; the table's values are not read."""
    check_tokens("query", query)
    check_tokens("key_pages", key_pages)
    # Pages are no batch rows: what they must have in common with queries is all but those.
    like_a_batch = query.new_empty(()).expand(key_pages.shape[0], *query.shape[1:])
    check_qkv(like_a_batch, key_pages, value_pages, suffix="_pages")
    if not 1 <= query.shape[2] <= MOST_PAGED_QUERIES:
        raise ValueError(
            f"query has {query.shape[2]} tokens a sequence; paged attention takes 1 to "
            f"{MOST_PAGED_QUERIES}, the last ones. Gather the pages and use block_sparse_attention"
        )
    if 0 in key_pages.shape[:1] + key_pages.shape[2:3]:
        raise ValueError(
            f"key_pages has shape {tuple(key_pages.shape)}; there must be a page, and a token in it"
        )
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32:
        got = block_table.dtype if isinstance(block_table, Tensor) else type(block_table).__name__
        raise TypeError(f"block_table must be an int32 tensor of shape (batch, pages), got {got}")
    if block_table.dim() != 2 or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"block_table must have shape ({query.shape[0]}, pages), one row a sequence, got "
            f"{tuple(block_table.shape)}"
        )
    if block_table.device != query.device:
        raise ValueError(f"block_table is on {block_table.device} but query is on {query.device}")


def check_decoding_blocks(blocks: int, kv_len: int, block_size: int) -> None:
    """That one program can choose among so many blocks of a cache."""
    if blocks > MOST_DECODING_BLOCKS:
        raise ValueError(
            f"block_size={block_size} makes {blocks} blocks of a cache of {kv_len} keys; at most "
            f"{MOST_DECODING_BLOCKS} can be chosen from. Take a larger block_size"
        )


def check_no_gradient(**tensors: Tensor) -> None:
    """That no gradient is asked of what has none."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and paged attention has none: call it under "
                "torch.no_grad() or torch.inference_mode()"
            )


def check_block_mask(
    block_mask: BlockMask, query: Tensor, key: Tensor, kv_len: int | None = None
) -> None:
    """That the mask was built for these lengths, heads and device.

    Args:
        kv_len: keys of a sequence, where they are not key's third dimension.
    """
    from entropy_attn.masks import BlockMask  # masks.py validates with this module

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be an entropy_attn.BlockMask, got {type(block_mask).__name__}; "
            "BlockMask.from_dense and BlockMask.from_flex convert other masks, and "
            "BlockMask.full(...) keeps every block"
        )
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2] if kv_len is None else kv_len
    if (block_mask.q_len, block_mask.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"block_mask was built for q_len={block_mask.q_len}, kv_len={block_mask.kv_len} but "
            f"query has {q_len} and key {kv_len} tokens; build it for these lengths"
        )
    mask_batch, mask_heads = block_mask.kv_num_blocks.shape[:2]
    if mask_batch not in (1, batch):
        raise ValueError(f"block_mask has batch size {mask_batch}; allowed are 1 and {batch}")
    kv_heads = key.shape[1]
    if mask_heads not in (1, kv_heads, heads):
        raise ValueError(
            f"block_mask has {mask_heads} heads; allowed are 1, {kv_heads} (one list a key head) "
            f"and {heads} (one list a query head)"
        )
    if block_mask.kv_indices.device != query.device:
        raise ValueError(
            f"block_mask is on {block_mask.kv_indices.device} but query is on {query.device}; "
            "move it with block_mask.to(device)"
        )


def check_block_size(
    block_size: int | tuple[int, int], name: str = "block_size"
) -> tuple[int, int]:
    """(block_q, block_k), each a power of two from 16 to 256."""
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    valid = isinstance(sizes, Sequence) and len(sizes) == 2
    for size in sizes if valid else ():
        power = isinstance(size, int) and not isinstance(size, bool) and 16 <= size <= 256
        valid = valid and power and size & (size - 1) == 0
    if not valid:
        raise ValueError(
            f"{name} must be a power of two from 16 to 256, or a pair of them (query, key), "
            f"got {block_size!r}"
        )
    return sizes[0], sizes[1]


def check_entropy_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """A non-empty selection of "row", "block" and "tile"."""
    if isinstance(kinds, str) or not kinds or any(k not in ENTROPY_KINDS for k in kinds):
        raise ValueError(f"kinds must be a non-empty tuple out of {ENTROPY_KINDS}, got {kinds!r}")
    return tuple(kinds)


def check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Two partial results of the same queries."""
    if out_a.shape != out_b.shape or out_a.dtype != out_b.dtype:
        raise ValueError(
            f"out_a {tuple(out_a.shape)} {out_a.dtype} and out_b {tuple(out_b.shape)} "
            f"{out_b.dtype} must have one shape and dtype"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {tuple(out_a.shape[:-1])}, got {tuple(lse.shape)}"
            )


# Block masks. Checked once, when a mask is built: these read values and may wait for the device.


def check_dense_blocks(dense: Tensor, block_size: tuple[int, int], q_len: int, kv_len: int) -> None:
    """A bool tensor with one entry a block. Values are not read."""
    if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
        got = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"dense must be a bool tensor, one entry a block, got {got}")
    rows, columns = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    if dense.ndim != 4 or dense.shape[2:] != (rows, columns):
        raise ValueError(
            f"dense must have shape (batch or 1, heads or 1, {rows}, {columns}) for q_len={q_len}, "
            f"kv_len={kv_len} and block_size={block_size}, got {tuple(dense.shape)}"
        )


def check_block_lists(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: tuple[int, int],
    q_len: int,
    kv_len: int,
    is_full: bool,
) -> Tensor:
    """Shapes and values of block lists; returns the indices, ascending within the counts."""
    num_columns = _check_list_shapes(kv_num_blocks, kv_indices, block_size, q_len, kv_len)
    if kv_num_blocks.numel() == 0:
        return kv_indices
    if is_full and (kv_num_blocks != num_columns).any():
        raise ValueError(
            f"is_full=True but not every row lists all {num_columns} key blocks; leave it False"
        )
    # Batches and heads that share their lists in memory are checked once.
    counts, indices = kv_num_blocks, kv_indices
    for dim in (0, 1):
        if counts.stride(dim) == 0 and indices.stride(dim) == 0:
            counts, indices = counts.narrow(dim, 0, 1), indices.narrow(dim, 0, 1)
    ascending = _check_list_values(counts, indices, num_columns)
    return kv_indices if ascending is indices else ascending.expand(kv_indices.shape)


def _check_list_values(kv_num_blocks: Tensor, kv_indices: Tensor, num_columns: int) -> Tensor:
    most = min(kv_indices.shape[-1], num_columns)
    wrong = _first((kv_num_blocks < 0) | (kv_num_blocks > most))
    if wrong:
        raise ValueError(
            f"kv_num_blocks[{_at(wrong)}] is {kv_num_blocks[wrong].item()}; allowed are 0 to "
            f"{most}: kv_indices has room for {kv_indices.shape[-1]} and there are {num_columns} "
            "key blocks"
        )
    slot = torch.arange(kv_indices.shape[-1], device=kv_indices.device)
    listed = slot < kv_num_blocks[..., None]
    outside = (kv_indices < 0) | (kv_indices >= num_columns)
    wrong = _first(listed & outside)
    if wrong:
        raise ValueError(
            f"kv_indices[{_at(wrong)}] is {kv_indices[wrong].item()}; allowed are 0 to "
            f"{num_columns - 1}: the mask has {num_columns} key blocks"
        )
    if _first(outside):
        kv_indices = kv_indices.clamp(0, max(num_columns - 1, 0))
    descending = kv_indices[..., 1:] <= kv_indices[..., :-1]
    if _first(descending & listed[..., 1:]):
        kv_indices = _sorted_lists(kv_indices, listed, num_columns)
    return kv_indices


def _check_list_shapes(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: tuple[int, int],
    q_len: int,
    kv_len: int,
) -> int:
    for name, tensor, ndim, shape in (
        ("kv_num_blocks", kv_num_blocks, 3, "(batch or 1, heads or 1, query blocks)"),
        ("kv_indices", kv_indices, 4, "(batch or 1, heads or 1, query blocks, width)"),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {got}; convert it with .int()")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if kv_indices.shape[:3] != kv_num_blocks.shape:
        raise ValueError(
            f"kv_indices has shape {tuple(kv_indices.shape)}; its first three sizes must be those "
            f"of kv_num_blocks, {tuple(kv_num_blocks.shape)}"
        )
    if kv_indices.device != kv_num_blocks.device:
        raise ValueError(
            f"kv_indices is on {kv_indices.device} but kv_num_blocks is on {kv_num_blocks.device}; "
            "move it with .to()"
        )
    num_rows, num_columns = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    if kv_num_blocks.shape[2] != num_rows:
        raise ValueError(
            f"kv_num_blocks has {kv_num_blocks.shape[2]} query blocks; q_len={q_len} with blocks "
            f"of {block_size[0]} has {num_rows}"
        )
    return num_columns


def _sorted_lists(kv_indices: Tensor, listed: Tensor, num_columns: int) -> Tensor:
    values, order = kv_indices.masked_fill(~listed, num_columns).sort(dim=-1, stable=True)
    wrong = _first((values[..., 1:] == values[..., :-1]) & listed[..., 1:])
    if wrong:
        row, slot = wrong[:-1], wrong[-1]
        pair = order[row][slot : slot + 2].tolist()
        raise ValueError(
            f"kv_indices[{_at(row)}] lists key block {values[wrong].item()} twice, at entries "
            f"{pair[0]} and {pair[1]}; a row may list a block once"
        )
    return values.clamp(max=max(num_columns - 1, 0))


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Position of the first True, or None."""
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None


def _at(position: tuple[int, ...]) -> str:
    return ", ".join(str(p) for p in position)


def check_integer(name: str, value: int, minimum: int, besides: str = "") -> int:
    """An int, not a bool, of at least ``minimum``; ``besides`` says what else is allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        other = f"{besides} or " if besides else ""
        raise ValueError(f"{name} must be {other}an int >= {minimum}, got {value!r}")
    return value


def check_positive(name: str, value: float) -> float:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def check_share(name: str, value: float, may_be_zero: bool = False) -> float:
    """A number in (0, 1], or in [0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (value == 0 and not may_be_zero):
        allowed = "[0, 1]" if may_be_zero else "(0, 1]"
        raise ValueError(f"{name} must be a number in {allowed}, got {value!r}")
    return float(value)


def check_power_of_two(name: str, value: int) -> int:
    """A power of two as an int, 1 included."""
    check_integer(name, value, minimum=1)
    if value & (value - 1) != 0:
        raise ValueError(f"{name} must be a power of two, got {value!r}")
    return value


def check_group(name: str, group: int, block_size: tuple[int, int]) -> None:
    """Tokens a group: a power of two, a whole number of groups and at most 64 in a block."""
    low, high = max(1, max(block_size) // 64), min(block_size)
    if not low <= group <= high:
        raise ValueError(
            f"{name}={group} does not fit block_size={block_size}: allowed are powers of two from "
            f"{low} to {high}; TrueMass() scores single tokens"
        )


def check_tile_mass(
    name: str, mass: Tensor, tiles: int, blocks: int, leading: Sequence[int] | None = None
) -> None:
    """(B, H, Mq, Mk) fp32 or fp64; the values are checked on the device, see `keep_blocks`."""
    if not isinstance(mass, Tensor) or mass.dtype not in (torch.float32, torch.float64):
        got = mass.dtype if isinstance(mass, Tensor) else type(mass).__name__
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {got}")
    expected = (*(leading or mass.shape[:2]), tiles, blocks)
    if mass.ndim != 4 or tuple(mass.shape) != expected:
        wanted = f"({'batch, heads' if leading is None else f'{leading[0]}, {leading[1]}'}, "
        raise ValueError(
            f"{name} must have shape {wanted}{tiles}, {blocks}): one value for each block of "
            f"queries and block of keys; got {tuple(mass.shape)}"
        )


# Sets of points and the cells that they fall into.


def check_tokens(name: str, x: Tensor) -> None:
    """(B, H, N, D) floating point."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got shape "
            f"{tuple(x.shape)}; use unsqueeze for a missing batch or head dimension"
        )
    if x.dtype not in ATTENTION_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in ATTENTION_DTYPES)
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}")


def check_cells(cells: int) -> int:
    """From 1 to MAX_CELLS."""
    check_integer("cells", cells, minimum=1, besides="None")
    if cells > MAX_CELLS:
        raise ValueError(f"cells must be at most {MAX_CELLS}, got {cells}")
    return cells


def check_points(x: Tensor) -> torch.dtype:
    """(..., n, d) floating point; returns the dtype of statistics."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ATTENTION_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in ATTENTION_DTYPES)
        raise TypeError(f"x has dtype {x.dtype}; allowed are {allowed}")
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have shape (..., n, d), n points of d >= 1 coordinates, got {tuple(x.shape)}; "
            "use x[:, None] for points on a line"
        )
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_beside_points(name: str, tensor: Tensor, x: Tensor, *sizes: int | str) -> None:
    """A tensor (..., *sizes) for the points; a size that is a word may be any from 1 on."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    if tensor.dtype not in (x.dtype, statistics):
        allowed = " or ".join(sorted({str(x.dtype), str(statistics)}))
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; with x in {x.dtype} allowed is {allowed}: cast it"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move it with .to()")
    shape = tuple(tensor.shape[-len(sizes) :])
    fits = tensor.ndim >= len(sizes) and all(
        have == want if isinstance(want, int) else have >= 1
        for have, want in zip(shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, sizes))
        raise ValueError(
            f"{name} must have shape (..., {wanted}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


def check_sharpness(name: str, value: float | Tensor, x: Tensor) -> None:
    """A number > 0, or a floating point tensor on the device of x, whose values are not read."""
    if not isinstance(value, Tensor):
        check_positive(name, value)
        return
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be a float or a floating tensor")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x is on {x.device}; move it with .to()")


def check_point_weights(weights: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    """None, or (..., n) floating point >= 0 or bool; the values are not read."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not (
        weights.dtype == torch.bool or weights.dtype.is_floating_point
    ):
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating point or bool tensor (..., n), got {got}")
    if weights.ndim < 1 or weights.shape[-1] != shape[-1]:
        raise ValueError(
            f"weights must have shape (..., {shape[-1]}), one for each point, "
            f"got {tuple(weights.shape)}"
        )
    if weights.device != like.device:
        raise ValueError(
            f"weights is on {weights.device} but the points are on {like.device}; "
            "move it with .to()"
        )


def check_leading(**shapes: tuple[int, ...]) -> torch.Size:
    """The common leading dimensions of arguments, given by name, after broadcasting."""
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"the leading dimensions do not broadcast: {listed}; make them equal, or 1 to share"
        ) from error


def check_planes(normals: Tensor) -> None:
    """At most MAX_HALFSPACES of them: there are 2^T cells."""
    if normals.shape[-2] > MAX_HALFSPACES:
        raise ValueError(
            f"normals holds {normals.shape[-2]} halfspaces; at most {MAX_HALFSPACES} are allowed, "
            "since T of them cut 2^T cells: use fewer, or range_entropy with anchors"
        )


def check_labels(labels: Tensor, k: int) -> None:
    """(..., n) integers from 0 to k - 1; values on a GPU are not read."""
    check_integer("k", k, minimum=1)
    integer = isinstance(labels, Tensor) and not (
        labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool
    )
    if not integer:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor (..., n), got {got}")
    if labels.ndim < 1:
        raise ValueError("labels must have shape (..., n), got a single number")
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= k:
        wrong = low if low < 0 else high
        raise ValueError(f"labels holds {wrong}; allowed are 0 to k - 1 = {k - 1}")


def check_sample(points: Tensor) -> None:
    """(m, d) points to place anchors by: some, and all finite. Reads values."""
    if len(points) == 0:
        raise ValueError("x holds no point of weight > 0 to place anchors by; pass a full batch")
    if not torch.isfinite(points).all():
        raise ValueError("x holds NaN or infinite points; give them weight 0 or remove them")
