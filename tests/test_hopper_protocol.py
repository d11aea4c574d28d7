"""A model of the barriers of kernels/hopper/forward.py and producer.py, simulated in random order.

It is kept by hand: a change of the kernel's waits and arrivals is to be made here too.

Scheduler, producer, warpgroups and copy engine are generators that are stepped in random order;
every step of a warpgroup is split where the hardware could be overtaken. Found are: deadlock, a
slot that is filled while a product still reads it, a slot read before its bytes came or with the
bytes of another step, a barrier that runs ahead by more than a phase, an item told wrongly.
"""

from __future__ import annotations

import random

import pytest


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all bytes are in."""

    def __init__(self, count):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, expect=0):
        assert self.pending > 0, "more arrivals than the phase has"
        self.bytes += expect
        self.pending -= 1
        self.check()

    def complete(self, count):
        self.bytes -= count
        self.check()

    def check(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity):
        """What try_wait.parity says: the phase of that parity is over."""
        return self.phase % 2 != parity


class Named:
    """A named barrier of two parties, one arriving, one waiting."""

    def __init__(self):
        self.arrived = 0

    def arrive(self):
        assert self.arrived == 0, "arrived twice"
        self.arrived = 1


class Ring:
    def __init__(self, name, slots, readers):
        self.name, self.slots = name, slots
        self.full = [Barrier(1) for _ in range(slots)]
        self.empty = [Barrier(readers) for _ in range(slots)]
        self.content = [None] * slots
        self.reading = [0] * slots

    def wait_full(self, use):
        while not self.full[use % self.slots].passed(use // self.slots & 1):
            yield

    def wait_empty(self, use):
        while not self.empty[use % self.slots].passed(use // self.slots & 1 ^ 1):
            yield

    def start_read(self, use, tag):
        slot = use % self.slots
        assert self.content[slot] == tag, f"{self.name}: {self.content[slot]} instead of {tag}"
        self.reading[slot] += 1

    def end_read(self, use, tag):
        slot = use % self.slots
        assert self.content[slot] == tag, f"{self.name}: overwritten while read"
        self.reading[slot] -= 1

    def release(self, use):
        self.empty[use % self.slots].arrive()

    def fetch(self, use, tag, engine):
        slot = use % self.slots
        assert self.reading[slot] == 0, f"{self.name}: filled while read"
        self.content[slot] = "half written"
        self.full[slot].arrive(expect=2)
        engine.append((self, slot, tag))
        engine.append((self, slot, tag))


def copy_engine(engine):
    """Copies finish in any order."""
    while True:
        if engine:
            ring, slot, tag = engine.pop(random.randrange(len(engine)))
            if all(other[:2] != (ring, slot) for other in engine):
                ring.content[slot] = tag
            ring.full[slot].complete(1)
        yield


def scheduler(program, items):
    for turn, item in enumerate([*enumerate(items), (-1, 0)]):
        if turn > 0:  # the kernel waits before it claims
            yield from program.queries.wait_empty(turn)
            yield  # the claim, and what it looks up
        assert program.reading[turn % 2] == 0, "an item is overwritten while it is read"
        program.work[turn % 2] = item
        yield
        program.announced[turn % 2].arrive()


def read_item(program, turn):
    while not program.announced[turn % 2].passed(turn // 2 & 1):
        yield
    program.reading[turn % 2] += 1
    item = program.work[turn % 2]
    yield
    assert program.work[turn % 2] == item
    program.reading[turn % 2] -= 1
    return item


def producer(program, items):
    turn = use = 0
    value = None
    item, steps = yield from read_item(program, 0)
    while item >= 0:
        program.queries.fetch(turn, ("q", item), program.engine)
        yield
        for step in range(steps):
            yield from program.keys.wait_empty(use)
            program.keys.fetch(use, ("k", item, step), program.engine)
            yield
            if use > 0:
                yield from program.values.wait_empty(use - 1)
                program.values.fetch(use - 1, value, program.engine)
                yield
            value = ("v", item, step)
            use += 1
        turn += 1
        item, steps = yield from read_item(program, turn)
    program.queries.fetch(turn, ("q", -1), program.engine)
    yield from program.keys.wait_empty(use)
    program.keys.fetch(use, ("k", -1, 0), program.engine)
    yield from program.values.wait_empty(use - 1)
    program.values.fetch(use - 1, value, program.engine)


def products(program, me, use, turn, key_tag, value_tag):
    """Q K^T of a step and P V of the one before; returns with P V in flight."""
    if program.ping_pong:
        while not program.turns[me].arrived:
            yield
        program.turns[me].arrived = 0
    yield from program.keys.wait_full(use)
    program.keys.start_read(use, key_tag)
    program.queries.start_read(turn, ("q", key_tag[1]))
    yield
    yield from program.values.wait_full(use - 1)
    program.values.start_read(use - 1, value_tag)
    if program.ping_pong:
        program.turns[1 - me].arrive()
    yield
    program.keys.end_read(use, key_tag)
    program.queries.end_read(turn, ("q", key_tag[1]))
    program.keys.release(use)
    yield


def finish(program, use, value_tag):
    program.values.end_read(use - 1, value_tag)
    program.values.release(use - 1)
    yield


def receive(program, turn):
    item = yield from read_item(program, turn)
    yield from program.queries.wait_full(turn)
    return item


def consumer(program, me, items):
    if program.ping_pong and me == 1:
        program.turns[0].arrive()
    item, steps = yield from receive(program, 0)
    yield from program.keys.wait_full(0)
    program.keys.start_read(0, ("k", 0, 0))
    program.queries.start_read(0, ("q", 0))
    yield
    program.keys.end_read(0, ("k", 0, 0))
    program.queries.end_read(0, ("q", 0))
    program.keys.release(0)
    turn, use, seen = 0, 1, []
    while item >= 0:
        seen.append((item, steps))
        for step in range(1, steps):
            value = ("v", item, step - 1)
            yield from products(program, me, use, turn, ("k", item, step), value)
            yield from finish(program, use, value)
            use += 1
        program.queries.release(turn)
        yield
        turn += 1
        following, following_steps = yield from receive(program, turn)
        value = ("v", item, steps - 1)
        yield from products(program, me, use, turn, ("k", following, 0), value)
        yield from finish(program, use, value)
        use += 1
        item, steps = following, following_steps
    assert seen == list(enumerate(items)), "items were told wrongly"


class Program:
    def __init__(self, warpgroups, stages, ping_pong):
        self.queries = Ring("Q", 2, warpgroups)
        self.keys = Ring("K", stages, warpgroups)
        self.values = Ring("V", stages, warpgroups)
        self.work, self.reading, self.engine = [None, None], [0, 0], []
        self.announced = [Barrier(1), Barrier(1)]
        self.turns, self.ping_pong = [Named(), Named()], ping_pong


def run(seed):
    random.seed(seed)
    warpgroups = random.choice((1, 2))
    ping_pong = warpgroups == 2 and random.random() < 0.7
    program = Program(warpgroups, random.choice((1, 2, 3, 4)), ping_pong)
    items = [random.choice((1, 1, 2, 3, 5, 8)) for _ in range(random.randint(1, 8))]
    actors = {"scheduler": scheduler(program, items), "producer": producer(program, items)}
    actors |= {f"warpgroup {i}": consumer(program, i, items) for i in range(warpgroups)}
    actors["engine"] = copy_engine(program.engine)
    # Some runs starve one actor, others are fair.
    weights = {name: random.choice((0.05, 1, 1, 1)) for name in actors}
    idle = 0
    while len(actors) > 1:
        name = random.choices(list(actors), [weights[n] for n in actors])[0]
        before = state(program)
        try:
            next(actors[name])
        except StopIteration:
            del actors[name]
            idle = 0
            continue
        idle = idle + 1 if state(program) == before else 0
        assert idle < 5000, f"deadlock of {sorted(actors)} with items {items}"
    assert not program.engine, "a copy was still under way at the end"


def state(program):
    rings = (program.queries, program.keys, program.values)
    barriers = [*program.announced, *(b for r in rings for b in (*r.full, *r.empty))]
    return (
        [(b.phase, b.pending, b.bytes) for b in barriers],
        [tuple(r.reading) for r in rings],
        [t.arrived for t in program.turns],
        len(program.engine),
        [*program.reading],
    )


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_no_deadlock_and_no_slot_is_reused_too_early(first):
    for seed in range(first, first + 40):
        run(seed)


def many_runs():
    for seed in range(60):
        run(seed)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wait_empty", "filled while read|overwritten|more arrivals|half written|instead of"),
        ("wait_full", "half written|instead of|while read|told wrongly|NoneType"),
        ("release", "deadlock"),
    ],
)
def test_what_is_forgotten_is_found(method, message, monkeypatch):
    nothing = (lambda *_: None) if method == "release" else lambda *_: iter(())
    monkeypatch.setattr(Ring, method, nothing)
    with pytest.raises((AssertionError, TypeError), match=message):
        many_runs()


def test_a_scheduler_that_does_not_wait_is_found(monkeypatch):
    waiting = scheduler

    def hasty(program, items):
        program.queries.wait_empty = lambda turn: iter(())
        yield from waiting(program, items)

    monkeypatch.setitem(globals(), "scheduler", hasty)
    with pytest.raises(AssertionError):
        many_runs()


def test_items_that_are_read_unannounced_are_found(monkeypatch):
    def hasty(program, turn):
        yield
        return program.work[turn % 2]

    monkeypatch.setitem(globals(), "read_item", hasty)
    with pytest.raises((AssertionError, TypeError)):
        many_runs()
