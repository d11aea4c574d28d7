"""The machine of `gluon_on_cpu`: numbers, tiles, shared memory, barriers, partitions.

Partitions are threads of which one runs at a time; where others could notice what it does, another
one may go on, chosen at random. The copy engine is one more actor, which does what it was given in
any order.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

CELL = 64  # rows and columns of the pieces of shared memory that are told apart


class Wrong(AssertionError):
    """What the hardware would not do, or would do wrong."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise Wrong(message)


# Numbers and pointers


class Number(int):
    """A scalar of 32 or 64 bits."""

    @property
    def dtype(self) -> str:
        return "int32"

    def to(self, dtype: Any) -> Number:
        return (Unsigned if dtype == "uint32" else Number)(self)


class Unsigned(Number):
    """One that wraps around at 2^32."""

    def __new__(cls, value: int) -> Unsigned:
        return super().__new__(cls, int(value) % 2**32)


def _give_operators() -> None:
    def make(name: str) -> Callable[..., Any]:
        plain = getattr(int, name)

        def operate(self: Number, other: Any) -> Any:
            if isinstance(other, (np.ndarray, Symbol, Pointer)):
                return NotImplemented
            if "div" in name or "mod" in name:
                check(int(self) >= 0, "division of a negative number, which C rounds to zero")
            result = plain(self, other)
            is_unsigned = isinstance(self, Unsigned) or isinstance(other, Unsigned)
            kind = Unsigned if is_unsigned else Number
            return result if result is NotImplemented else kind(result)

        return operate

    for word in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
        setattr(Number, f"__{word}__", make(f"__{word}__"))
        if word not in ("floordiv", "mod"):
            setattr(Number, f"__r{word}__", make(f"__r{word}__"))


_give_operators()


class Lanes(np.ndarray):
    """A vector whose entries are real."""

    def permute(self, order: Sequence[int]) -> Lanes:
        return self.transpose(order)

    def to(self, dtype: Any) -> Lanes:
        return self


def lanes(values: Any) -> Lanes:
    return np.asarray(values).view(Lanes)


class Pointer:
    """To an entry of an array, or to several of them."""

    dtype = SimpleNamespace(element_ty="out")

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset - offset)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        places, inside = np.broadcast_arrays(np.asarray(self.offset), np.asarray(mask))
        touched = places[inside]
        check(
            bool((touched >= 0).all() and (touched < self.array.size).all()),
            f"out of bounds: {touched} of {self.array.size}",
        )
        return places, inside


# Tiles


class Symbol:
    """A tile in registers.

    Attributes:
        parents: what it was computed from, element by element.
        tags: of what was loaded.
        product: (left, right) operands, each a `Symbol` or what stood in the cells; it is added to
            ``acc``.
        mask: of a tile that was masked.
        undefined: why it may be anything.
        pending: the product is not there yet.
        is_zero: whatever the parents are.
    """

    type = SimpleNamespace(layout=None)
    __array_ufunc__ = None

    def __init__(self, parents: Iterable[Any] = (), tags: Sequence[Any] = ()) -> None:
        self.parents = [x for x in parents if isinstance(x, Symbol)]
        for parent in self.parents:
            check(not parent.pending, "a product is used before it is there")
        self.tags = tags
        self.product: tuple[Any, Any] = ((), ())
        self.acc: Symbol | None = None
        self.mask: np.ndarray | None = None
        self.undefined: str | None = None
        self.pending = self.is_zero = False

    def to(self, dtype: Any) -> Symbol:
        same = Symbol([self])
        same.is_zero = self.is_zero
        return same

    def __getitem__(self, key: Any) -> Symbol:
        return self

    def reshape(self, shape: Sequence[int]) -> Symbol:
        return self

    def permute(self, order: Sequence[int]) -> Symbol:
        return self

    def _merged(self, other: Any) -> Symbol:
        return Symbol([self, other])

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = _merged
    __truediv__ = __rtruediv__ = __and__ = __rand__ = _merged
    __ne__ = __lt__ = __gt__ = _merged  # type: ignore[assignment]
    __hash__ = object.__hash__

    def products(self) -> list[tuple[Any, Any]]:
        """Operands of the products that it, or what its first parents were, is the sum of."""
        found, symbol = [], self
        while symbol is not None:
            check(symbol.undefined is None, f"undefined: {symbol.undefined}")
            if symbol.product[1]:
                found.append(symbol.product)
                symbol = symbol.acc
            else:
                symbol = symbol.parents[0] if symbol.parents else None
        return found

    def gather(self) -> tuple[set[Any], list[np.ndarray]]:
        """Tags and masks of all that it was made from."""
        tags: set[Any] = set()
        masks, seen = [], set()
        left: list[Any] = [self]
        while left:
            thing = left.pop()
            if isinstance(thing, Part):
                left.append(thing.symbol)
            elif not isinstance(thing, Symbol):
                tags.add(thing)
            elif id(thing) not in seen:
                seen.add(id(thing))
                check(thing.undefined is None, f"undefined: {thing.undefined}")
                masks += [thing.mask] if thing.mask is not None else []
                left += [*thing.parents, *thing.tags]
                left += [thing.acc] if thing.acc is not None else []
                for operand in thing.product:
                    left += [operand] if isinstance(operand, Symbol) else operand
        return tags, masks


class Part:
    """The cell in row ``row`` and column ``column`` of a tile that a partition stored."""

    def __init__(self, symbol: Symbol, row: int, column: int) -> None:
        self.symbol, self.row, self.column = symbol, row, column


class Cell:
    def __init__(self) -> None:
        self.content: Any = None
        self.version = 0
        self.writers = 0  # copies on their way into it
        self.unfenced: Any = None  # the partition that stored it and has not fenced that yet

    def write(self, content: Any) -> None:
        self.version += 1
        self.content = content


class Stack:
    """Tiles of shared memory, one behind the other, each by columns of cells."""

    def __init__(self, cells: list[Cell], dtype: Any, shape: Sequence[int]) -> None:
        self.cells, self.dtype, self.shape = cells, dtype, [int(n) for n in shape]
        _, *inner = self.shape
        self.grid = (1, 1)
        if len(inner) > 1 and inner[-2] % CELL == 0:
            self.grid = (inner[-2] // CELL, inner[-1] // CELL)
        self.size = self.grid[0] * self.grid[1]
        self.bytes = int(np.prod(inner)) * {"fp32": 4, "int32": 4}.get(dtype, 2)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Stack:
        other = Stack(self.cells, dtype, shape)
        check(other.size * other.shape[0] == len(self.cells), "another size")
        return other

    def index(self, place: int) -> View:
        check(0 <= place < self.shape[0], f"slot {place} of {self.shape[0]}")
        cells = self.cells[place * self.size : (place + 1) * self.size]
        rows, columns = self.grid
        return View([[cells[c * rows + r] for c in range(columns)] for r in range(rows)], self)


class View:
    """A tile of a `Stack`, or some rows of it, or its transpose."""

    def __init__(self, cells: list[list[Cell]], whole: Stack | View) -> None:
        self.cells, self.dtype, self.bytes = cells, whole.dtype, whole.bytes

    def slice(self, start: int, length: int) -> View:
        return View(self.cells[start // CELL : (start + length) // CELL], self)

    def permute(self, order: Any) -> View:
        return View([list(column) for column in zip(*self.cells, strict=True)], self)

    def all(self) -> list[tuple[int, int, Cell]]:
        return [(r, c, cell) for r, row in enumerate(self.cells) for c, cell in enumerate(row)]

    def store(self, value: Any) -> None:
        machine().pause()
        for r, c, cell in self.all():
            cell.write(Part(value, r, c) if isinstance(value, Symbol) else value)
            cell.unfenced = machine().current
            machine().current.stored.append(cell)

    def load(self, layout: Any = None) -> Any:
        machine().pause()
        cells = [cell for _, _, cell in self.all()]
        if isinstance(cells[0].content, np.ndarray):
            return cells[0].content.copy()
        symbol = Symbol(tags=[cell.content for cell in cells])
        if any(cell.content is None or cell.writers for cell in cells):
            symbol.undefined = "loaded while it is written"
        return symbol


class Read:
    """Tiles that a product or a copy reads from its start to its end."""

    def __init__(self, views: Iterable[View]) -> None:
        self.cells = [cell for view in views for _, _, cell in view.all()]
        self.versions = [cell.version for cell in self.cells]
        self.problem: str | None = None
        for cell in self.cells:
            if cell.content is None or cell.writers:
                self.problem = "read before it is written"
            elif cell.unfenced is not None:
                self.problem = "stored, and read by the copy engine or a product without a fence"

    def end(self) -> str | None:
        if any(c.version != v for c, v in zip(self.cells, self.versions, strict=True)):
            self.problem = self.problem or "written while it is read"
        return self.problem


# The machine


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all bytes are in."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, expected: int = 0) -> None:
        check(self.pending > 0, "more arrivals at a barrier than its phase has")
        self.bytes += expected
        self.pending -= 1
        self._end_phase()

    def complete(self, count: int) -> None:
        self.bytes -= count
        self._end_phase()

    def _end_phase(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Barriers(list):
    def index(self, place: int) -> Barrier:  # type: ignore[override]
        check(0 <= place < len(self), f"barrier {place} of {len(self)}")
        return self[place]


class Partition:
    """A thread of the machine.

    Attributes:
        products: under way, oldest first.
        unread, undone: copies from shared memory that it asked for.
        stored: cells, since its last fence.
        ready: what it waits for.
    """

    def __init__(self, program: Program, run: Callable[[], None], weight: float) -> None:
        self.program, self.weight = program, weight
        self.products: list[tuple[Symbol, Read]] = []
        self.unread: list[Any] = []
        self.undone: list[Any] = []
        self.stored: list[Cell] = []
        self.ready: Callable[[], bool] | None = None
        self.turn = threading.Semaphore(0)
        self.ended = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, args=(run,), daemon=True)

    def _work(self, run: Callable[[], None]) -> None:
        self.turn.acquire()
        try:
            if not machine().aborted:
                run()
        except BaseException as error:  # of any kind: the machine raises it
            self.error = error
        self.ended = True
        machine().back.release()


class Program:
    def __init__(self, number: int) -> None:
        self.number = number
        self.turns: dict[int, bool] = {}
        self.partitions: list[Callable[[], None]] = []


class Aborted(BaseException):
    """Ends the threads of a run that went wrong."""


class Machine:
    """Runs programs; see the head of this file.

    Args:
        places: programs that run at a time.
        stored: called with a descriptor, coordinates and what stood in the cells of a tile that has
            arrived in memory.
    """

    def __init__(
        self, seed: int, places: int, stored: Callable[[Any, Sequence[int], list[Any]], None]
    ) -> None:
        self.random = random.Random(seed)
        self.places, self.stored = places, stored
        self.copies: list[Callable[[], None]] = []
        self.back = threading.Semaphore(0)
        self.current: Any = None
        self.program: Any = None
        self.changes = 0  # of counters in memory
        self.aborted = False
        self.programs = 0

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others go on, at least until something holds."""
        me = self.current
        if me is None or (until is None and self.random.random() < 0.5):
            return
        me.ready = until
        self.back.release()
        me.turn.acquire()
        if self.aborted:
            raise Aborted

    def run(self, launch: Callable[[], None], programs: int) -> None:
        self.programs = programs
        waiting = list(range(programs))
        active: list[Partition] = []
        while waiting or active or self.copies:
            while waiting and len({p.program for p in active}) < self.places:
                self.program = Program(waiting.pop(0))
                launch()
                for run in self.program.partitions:
                    partition = Partition(self.program, run, self.random.choice((0.05, 1.0, 1.0)))
                    partition.thread.start()
                    active.append(partition)
                self.program = None
            self._go_on(active)
            active = [p for p in active if not p.ended]

    def _go_on(self, active: list[Partition]) -> None:
        able = [p for p in active if p.ready is None or p.ready()]
        if self.copies and (not able or self.random.random() < 0.2):
            self.copies.pop(self.random.randrange(len(self.copies)))()
            return
        if not able:
            self._abort(active)
            raise Wrong("deadlock")
        [partition] = self.random.choices(able, [p.weight for p in able])
        self.current, self.program, partition.ready = partition, partition.program, None
        partition.turn.release()
        self.back.acquire()
        self.current = self.program = None
        if partition.error is not None:
            self._abort(active)
            raise partition.error

    def _abort(self, active: list[Partition]) -> None:
        self.aborted = True
        for partition in active:
            if not partition.ended:
                partition.turn.release()
                partition.thread.join()


ACTIVE = SimpleNamespace(machine=None)


def machine() -> Machine:
    """The one that works."""
    return ACTIVE.machine


def run_programs(one: Machine, launch: Callable[[], None], programs: int) -> None:
    """Launch a kernel; one machine works at a time."""
    ACTIVE.machine = one
    one.run(launch, programs)
