"""The warps of the Hopper forward that find work and fetch it: a scheduler and a producer.

See `forward` for what they and the warpgroups tell each other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from entropy_attn.kernels.hopper.primitives import NO_ITEM, ROWS

# Scheduler


@gluon.jit
def scheduler(problem, memory, items_ptr, items):
    """Claim items, and look up what they are while another one is worked at.

    A claim, the item and its list's last entry are three round trips to memory, one by one.
    """
    item = gl.program_id(0)
    turn = 0  # items so far
    while item < items:
        tile = gl.load(items_ptr + item * 4)
        last = gl.load(items_ptr + item * 4 + 1)
        full = gl.load(items_ptr + item * 4 + 2)
        batch_head = tile // problem.q_tiles
        row = tile % problem.q_tiles * problem.BLOCK_M
        address = problem.address(batch_head, row)
        low, high = problem.starts(address, last, problem.steps(last) - 1)
        memory.items.announce(turn, batch_head, row, last, full, low, high)
        turn += 1
        # When the item in that slot has been read by all.
        memory.queries.wait_empty(turn)
        claimed = gl.atomic_add(items_ptr + items * 4, 1)
        # Each program's first item needs no claim, and each claims once in vain: this was the last.
        gl.store(items_ptr + items * 4, 0, mask=claimed == items - 1)
        item = claimed + gl.num_programs(0)
    memory.items.announce(turn, NO_ITEM, 0, 0, 0, 0, 0)


# Producer


@gluon.jit
def producer(problem, memory, query_desc, key_desc, value_desc):
    """Fetch in the order of use: a step's keys before the values of the step before."""
    turn = 0  # items so far
    use = 0  # steps so far
    # Of the values that are still to be fetched.
    value_batch = 0
    value_head = 0
    value_low = 0
    value_high = 0
    batch_head, row, last, _, low, high = memory.items.read(0)
    while batch_head >= 0:
        batch, head = problem.place(batch_head)
        memory.queries.fetch(turn, query_desc, batch, head, row, row + ROWS)
        kv_head = head // problem.group
        address = problem.address(batch_head, row)
        step = problem.steps(last) - 1
        while step >= 0:
            memory.keys.wait_empty(use)
            memory.keys.fetch(use, key_desc, batch, kv_head, low, high)
            # The next step's indices are on their way while this one waits for its slot.
            next_low, next_high = problem.starts(address, last, gl.maximum(step - 1, 0))
            if use > 0:
                memory.values.wait_empty(use - 1)
                memory.values.fetch(
                    use - 1, value_desc, value_batch, value_head, value_low, value_high
                )
            value_batch = batch
            value_head = kv_head
            value_low = low
            value_high = high
            low = next_low
            high = next_high
            use += 1
            step -= 1
        turn += 1
        batch_head, row, last, _, low, high = memory.items.read(turn)
    # The end: queries and keys for a product that nobody looks at.
    memory.queries.fetch(turn, query_desc, 0, 0, 0, ROWS)
    memory.keys.wait_empty(use)
    memory.keys.fetch(use, key_desc, 0, 0, 0, 0)
    memory.values.wait_empty(use - 1)
    memory.values.fetch(use - 1, value_desc, value_batch, value_head, value_low, value_high)
