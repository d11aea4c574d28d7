"""In what order dQ's sums lie in memory, for the Hopper backward.

Sums lie in tiles of 64 queries and 64 columns, what a warpgroup computes at a time. First come the
two of a head's first step, then those of the next; the last step is filled up. Of head_dim over 64
the two stand side by side, else one below the other.

A thread holds two adjacent columns of a row, and the next two are eight columns further on. Row by
row it could store 8 bytes at a time, and half of the threads that do so at the same time would find
the others at their banks. So that it stores 16 bytes, and eight threads 128 adjacent ones, a tile's
numbers are, from slow to fast, of
    32 pairs of rows, 4 times 16 columns, 2 rows of a pair, 4 threads, 2 times 8 columns, 2 columns.
As the sums of a step are one run in memory then, a single copy adds them. The code of
FlashAttention-3 (hopper/ in github.com/Dao-AILab/flash-attention) has them in the order of
registers as well.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(4096)  # numbers
# A quarter of a tile: 16 rows. What is cleared or rounded at a time is made of these.
STRIP = gl.constexpr(1024)
TILE_STRIPS = gl.constexpr(TILE // STRIP)


@gluon.jit
def in_order(tile):
    """A warpgroup's tile (64, 64) as its numbers lie in memory, (4096,). Nothing moves."""
    return tile.reshape([32, 2, 4, 2, 4, 2]).permute((0, 2, 1, 4, 3, 5)).reshape([TILE])


@gluon.jit
def in_rows(numbers):
    """Strips as they lie in memory, (1024 n,), by rows: (16 n, 64). Nothing moves."""
    COUNT: gl.constexpr = numbers.shape[0]
    parts = numbers.reshape([COUNT // 128, 4, 2, 4, 2, 2])
    return parts.permute((0, 2, 1, 4, 3, 5)).reshape([COUNT // 64, 64])
