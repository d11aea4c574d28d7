"""A model of the barriers of kernels/hopper/backward.py, simulated in random order.

It is kept by hand, as that of the forward is: a change of the kernel's waits and arrivals is to be
made here too. Producer, warpgroups and writer are generators that are stepped in random order, some
of them rarely. Found are: deadlock, a slot that is filled while a product still reads it, dS or a
part of dQ that is overwritten too early or read too soon, a turn that is passed twice.
"""

from __future__ import annotations

import random

import pytest
from test_hopper_protocol import Barrier, Named


class Program:
    """Shared memory and barriers of a program that takes ``steps`` steps."""

    def __init__(self, stages, steps, turns):
        self.stages, self.steps = stages, steps
        self.full = [Barrier(1) for _ in range(stages)]  # queries and gradients
        self.empty = [Barrier(2) for _ in range(stages)]
        self.queries, self.reading = [None] * stages, [0] * stages
        self.scores_full = [Barrier(2), Barrier(2)]
        self.scores, self.scores_read = [[None, None], [None, None]], [0, 0]
        self.sum_full, self.sum_empty = Barrier(2), Barrier(1)
        self.sum_tiles = [None, None]
        self.turns = [Named(), Named()] if turns else None
        self.added = []

    def wait_empty(self, use):
        while not self.empty[use % self.stages].passed(use // self.stages & 1 ^ 1):
            yield


def producer(program):
    for use in range(program.steps):
        slot = use % program.stages
        yield from program.wait_empty(use)
        assert not program.reading[slot], "queries are overwritten while they are read"
        program.queries[slot] = None
        yield
        program.queries[slot] = use
        program.full[slot].arrive()
        yield


def start_query_product(program, use):
    """dQ of the step before, from the slot that both warpgroups filled in it."""
    while not program.scores_full[use % 2].passed(use // 2 & 1):
        yield
    program.scores_read[use % 2] += 1
    yield


def end_query_product(program, use):
    assert use == 0 or program.scores[use % 2] == [use, use], "dS of another step"
    program.scores_read[use % 2] -= 1


def hand_over(program, me, use):
    while not program.sum_empty.passed(use & 1 ^ 1):
        yield
    program.sum_tiles[me] = None
    yield
    program.sum_tiles[me] = use
    program.sum_full.arrive()
    yield


def warpgroup(program, me, waits=True):
    program.scores_full[0].arrive()
    yield
    if program.turns and me == 1:
        program.turns[0].arrive()
    for use in range(program.steps):
        slot = use % program.stages
        while not program.full[slot].passed(use // program.stages & 1):
            yield
        assert program.queries[slot] == use
        program.reading[slot] += 1
        if program.turns:
            while not program.turns[me].arrived:
                yield
            program.turns[me].arrived = 0
            yield  # scores and dP are started
            program.turns[1 - me].arrive()
        yield
        if waits:
            yield from program.wait_empty(use - 1 + program.stages)
        target = (use + 1) % 2
        assert not program.scores_read[target], "dS is overwritten while it is read"
        program.scores[target][me] = None
        yield
        program.scores[target][me] = use + 1
        yield from start_query_product(program, use)
        program.scores_full[target].arrive()
        yield
        end_query_product(program, use)
        yield from hand_over(program, me, use)
        assert program.queries[slot] == use
        program.reading[slot] -= 1
        program.empty[slot].arrive()
        yield
    yield from start_query_product(program, program.steps)
    end_query_product(program, program.steps)
    yield from hand_over(program, me, program.steps)


def writer(program):
    while not program.sum_full.passed(0):
        yield
    program.sum_empty.arrive()  # what comes of the first slot is dropped
    for use in range(1, program.steps + 1):
        while not program.sum_full.passed(use & 1):
            yield
        assert program.sum_tiles == [use, use]
        yield
        assert program.sum_tiles == [use, use], "dQ is overwritten while it is added"
        program.added.append(use)
        program.sum_empty.arrive()
        yield


def run(seed, **forgotten):
    rng = random.Random(seed)
    program = Program(rng.choice((1, 2, 3)), rng.choice((0, 1, 2, 3, 9)), rng.random() < 0.5)
    actors = [
        producer(program), writer(program), *[warpgroup(program, me, **forgotten) for me in (0, 1)]
    ]  # fmt: skip
    weights = {id(actor): rng.choice((0.03, 1, 1)) for actor in actors}
    for _ in range(200_000):
        actor = rng.choices(actors, [weights[id(actor)] for actor in actors])[0]
        if next(actor, "ends") == "ends":
            actors.remove(actor)
        if not actors:
            break
    assert not actors, "deadlock"
    assert program.added == list(range(1, program.steps + 1))


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_steps_are_in_order(first):
    for seed in range(first, first + 100):
        run(seed)


def many_runs(**forgotten):
    for seed in range(400):
        run(seed, **forgotten)


def test_a_forgotten_wait_is_found():
    with pytest.raises(AssertionError, match="dS"):
        many_runs(waits=False)
