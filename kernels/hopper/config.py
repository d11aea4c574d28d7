"""How the kernels for sm_90 are built, and what was measured to be best."""

from __future__ import annotations

from dataclasses import dataclass

# Of a thread: at launch (None is all there are), in a warpgroup and in the other warps, which take
# a warpgroup's share; by programs a multiprocessor, which has 512 times 128 of them.
REGISTERS = {1: (None, 240, 24), 2: (128, 216, 40), 3: (80, 128, 32)}


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is built.

    Attributes:
        block_n: keys a step, one block or two.
        warpgroups: of 64 queries each; they share a block of queries.
        key_stages, value_stages: slots of the rings of keys and of values.
        programs: a multiprocessor; more than one only with one warpgroup each.
        ping_pong: the warpgroups take turns at the tensor cores.
        query_registers: queries are operands from registers instead of shared memory, where they
            then take one slot instead of two.
        pin: keep ptxas from waiting for P V before the exponentials.
        guard: in steps without masks keep the maximum, until a sum outgrows it; without entropies
            only.
    """

    block_n: int
    warpgroups: int
    key_stages: int
    value_stages: int
    programs: int = 1
    ping_pong: bool = True
    query_registers: bool = False
    pin: bool = False
    guard: bool = False


def hopper_config(
    head_dim: int, block_size: tuple[int, int], entropies: bool = False
) -> HopperConfig:
    """The default; block_size is (64 or a multiple of 128, 64 or 128)."""
    is_wide = head_dim > 64
    if block_size[0] < 128:
        programs, value_stages = (2, 2) if is_wide else (3, 3)
        return HopperConfig(
            64, 1, 3, value_stages, programs, ping_pong=False, query_registers=is_wide,
            guard=not entropies,
        )  # fmt: skip
    if entropies:
        stages = 2 if is_wide else 4
        return HopperConfig(128, 2, stages, stages, ping_pong=is_wide, pin=True)
    if is_wide:
        return HopperConfig(128, 2, 2, 2, guard=True)
    return HopperConfig(128, 2, 3, 3, query_registers=True, guard=True)


@dataclass(frozen=True)
class HopperBackwardConfig:
    """How the backward kernel is built.

    Attributes:
        block_m: queries a step: 64 for head_dim over 64, else 128.
        stages: slots of the ring of queries and their gradients, 1 or 2; more do not fit.
        turns: the warpgroups take turns at starting scores and dP.
        unit: blocks of keys a multiprocessor, at least, whose sums are opened and closed together;
            see `sums`.
        lead: units between one that is added to and one that is cleared or rounded.
    """

    block_m: int
    stages: int
    turns: bool
    unit: float
    lead: int = 2


def hopper_backward_config(head_dim: int, is_causal: bool = False) -> HopperBackwardConfig:
    """The default."""
    if head_dim > 64:
        # Columns of causal masks are of very different lengths, and end together in larger units.
        return HopperBackwardConfig(64, 2, turns=True, unit=1.0 if is_causal else 0.5, lead=3)
    return HopperBackwardConfig(128, 2, turns=True, unit=1.5)
