"""Runs the partitions of a Gluon kernel on the CPU, from their own source.

Modules of a kernel are executed once more with Gluon replaced, on the `gluon_machine`. Numbers that
say where something is (items, lists, coordinates, counters) are real. Tiles of queries, keys or
scores are `Symbol`s that know what they were made from, by the coordinates of what was copied. A
tile that was read while it was written, read before its fence, or never written is undefined; that
is an error only once it reaches global memory, as kernels may compute what they drop. Found besides
are: deadlock, reads out of bounds, coordinates that the copy engine does not take, results of
products that are used before they are there.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from gluon_machine import (
    CELL,
    Barrier,
    Barriers,
    Cell,
    Number,
    Pointer,
    Read,
    Stack,
    Symbol,
    View,
    check,
    lanes,
    machine,
)

# Gluon, replaced


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda f: f


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    machine().pause()
    places, inside = pointer.places(mask)
    values = np.full(places.shape, other, pointer.array.dtype)
    values[inside] = pointer.array[places[inside]]
    return lanes(values) if values.shape else Number(int(values))


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    """Of a tile, which has no numbers, 1 is stored, where nothing may have been."""
    machine().pause()
    places, inside = pointer.places(mask)
    if isinstance(value, Symbol):
        value.gather()
        check(bool(np.isnan(pointer.array[places[inside]]).all()), "stored twice")
        value = 1.0
    pointer.array[places[inside]] = np.broadcast_to(np.asarray(value), places.shape)[inside]


def _atomic_add(pointer: Pointer, value: int, sem: str = "", scope: str = "") -> Number:
    machine().pause()
    pointer.places(True)
    old = int(pointer.array[int(pointer.offset)])
    pointer.array[int(pointer.offset)] += value
    machine().changes += value != 0
    return Number(old)


def where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, np.ndarray) and condition.ndim:
        if isinstance(yes, Symbol):
            masked = Symbol([yes])
            masked.mask = np.array(condition)
            return masked
        return lanes(np.where(condition, yes, no))
    if isinstance(condition, Symbol):
        return Symbol([yes, no, condition])  # products are looked for in the first
    chosen = yes if condition else no
    if isinstance(chosen, float):
        zero = Symbol()
        zero.is_zero = True
        return zero
    return Number(chosen) if isinstance(chosen, int) else chosen


def _extreme(function: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Symbol) or isinstance(b, Symbol):
        return Symbol([a, b])
    found = function(a, b)
    return lanes(found) if found.shape else Number(int(found))


def _zeros(shape: Sequence[int], dtype: Any, layout: Any) -> Any:
    return lanes(np.zeros(shape)) if len(shape) == 1 else Symbol()


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype == "int64":
        return Barriers(Barrier() for _ in range(shape[0]))
    count = Stack([], dtype, shape)
    return Stack([Cell() for _ in range(count.size * int(shape[0]))], dtype, shape)


def _assembly(code: str, constraints: str, args: Sequence[Any], **options: Any) -> Any:
    me, value = machine().current, args[0]
    if code.startswith("mov"):
        return value
    if code.startswith("bar.sync"):
        machine().pause(lambda: me.program.turns.get(value, False))
        me.program.turns[value] = False
    elif code.startswith("bar.arrive"):
        machine().pause()
        check(not me.program.turns.get(value, False), "a turn is passed twice")
        me.program.turns[value] = True
    elif code.startswith("cp.async.bulk.wait_group 0"):
        machine().pause(lambda: not me.undone)
    elif code.startswith("nanosleep"):
        seen = machine().changes
        machine().pause(lambda: machine().changes != seen)
    elif not code.startswith("fence.proxy.async"):
        return Symbol(args)
    return Number(0)


def _fence() -> None:
    machine().pause()
    me = machine().current
    for cell in me.stored:
        cell.unfenced = None if cell.unfenced is me else cell.unfenced
    me.stored.clear()


def _wait(barrier: Barrier, phase: int) -> None:
    machine().pause(lambda: barrier.phase % 2 != phase)


def _arrive(barrier: Barrier, count: int = 1) -> None:
    machine().pause()
    barrier.arrive()


def _tags(view: View) -> list[Any]:
    return [cell.content for _, _, cell in view.all()]


def _product(a: Any, b: View, acc: Symbol, use_acc: bool = True, is_async: bool = False) -> Symbol:
    machine().pause()
    check(not (isinstance(a, Symbol) and a.pending), "a product is used before it is there")
    result = Symbol()
    result.product = (a if isinstance(a, Symbol) else _tags(a), _tags(b))
    result.acc = acc if use_acc else None
    read = Read([x for x in (a, b) if isinstance(x, View)])
    result.pending = True
    machine().current.products.append((result, read))
    return result


def _wait_products(left: int, deps: Sequence[Symbol]) -> Any:
    machine().pause()
    products = machine().current.products
    while len(products) > left:
        result, read = products.pop(0)
        result.undefined = read.end()
        result.pending = False
    return deps[0] if len(deps) == 1 else tuple(deps)


def _check_coordinates(descriptor: Any, place: Sequence[int]) -> None:
    check(place[-1] * descriptor.itemsize % 16 == 0, f"the copy engine takes no {place}")


def _copy_in(descriptor: Any, place: Sequence[int], barrier: Barrier, view: View) -> None:
    machine().pause()
    _check_coordinates(descriptor, place)
    place = tuple(int(x) for x in place)
    cells = view.all()
    for _, _, cell in cells:
        cell.write(None)
        cell.writers += 1
        cell.unfenced = None

    def arrive() -> None:
        for r, c, cell in cells:
            *first, row, column = place
            cell.write((descriptor.name, *first, row + r * CELL, column + c * CELL))
            cell.writers -= 1
        barrier.complete(view.bytes)

    machine().copies.append(arrive)


def copy_out(descriptor: Any, place: Sequence[int], view: View) -> None:
    machine().pause()
    _check_coordinates(descriptor, place)
    me, engine, token = machine().current, machine(), object()
    read = Read([view])
    me.unread.append(token)
    me.undone.append(token)

    def be_read() -> None:
        problem = read.end()
        check(problem is None, f"{descriptor.name} at {list(place)}: {problem}")
        contents = _tags(view)
        me.unread.remove(token)

        def be_done() -> None:
            engine.stored(descriptor, tuple(int(x) for x in place), contents)
            me.undone.remove(token)

        engine.copies.append(be_done)

    machine().copies.append(be_read)


def _wait_read(left: int) -> None:
    me = machine().current
    machine().pause(lambda: not me.unread)


class _Layout:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    get_default_for = classmethod(lambda cls, *args: None)


def _specialize(partitions: Sequence[tuple[Any, ...]], *sizes: Any) -> None:
    for function, args in partitions:
        machine().program.partitions.append(lambda f=function, a=args: f(*a))


LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x, tensor=None, shared_memory_descriptor=None,
    int32="int32", int64="int64", uint32="uint32", float32="fp32",
    NVMMASharedLayout=_Layout, SwizzledSharedLayout=_Layout, BlockedLayout=_Layout,
    SliceLayout=_Layout, DotOperandLayout=_Layout, NVMMADistributedLayout=_Layout,
    static_range=range, static_assert=lambda holds: check(holds, "a static assertion"),
    allocate_shared_memory=_allocate,
    arange=lambda first, end, layout: lanes(np.arange(first, end)),
    zeros=_zeros, zeros_like=lambda x: lanes(np.zeros_like(x)), where=where,
    minimum=lambda a, b: _extreme(np.minimum, a, b),
    maximum=lambda a, b: _extreme(np.maximum, a, b),
    load=_load, store=_store, atomic_add=_atomic_add,
    sum=lambda x, axis: Symbol([x]) if isinstance(x, Symbol) else Number(int(x.sum())),
    max=lambda x, axis: Symbol([x]), log2=lambda x: Symbol([x]),
    convert_layout=lambda x, layout: x, broadcast=lambda x, y: (Symbol([x]), y),
    multiple_of=lambda x, values: x, max_contiguous=lambda x, values: x,
    max_constancy=lambda x, values: x,
    inline_asm_elementwise=_assembly, thread_barrier=lambda: None, num_warps=lambda: 4,
    program_id=lambda axis: Number(machine().program.number),
    num_programs=lambda axis: Number(machine().programs), to_tensor=Number,
    warp_specialize=_specialize,
)  # fmt: skip
MBARRIER = SimpleNamespace(
    MBarrierLayout=_Layout, init=lambda barrier, count: barrier.init(count), wait=_wait,
    arrive=_arrive, expect=lambda barrier, count: barrier.arrive(count),
)  # fmt: skip
TMA = SimpleNamespace(
    tensor_descriptor=None, async_copy_global_to_shared=_copy_in,
    async_copy_shared_to_global=copy_out,
    store_wait=_wait_read,
)  # fmt: skip
GLUON = SimpleNamespace(jit=_jit, constexpr_function=lambda f: f, language=LANGUAGE)
FAKES: dict[str, Any] = {
    "triton.experimental": SimpleNamespace(gluon=GLUON),
    "triton.experimental.gluon": GLUON,
    "triton.experimental.gluon.language._core": SimpleNamespace(builtin=lambda f: f),
    "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(
        fence_async_shared=_fence, mbarrier=MBARRIER, tma=TMA, warpgroup_mma=_product,
        warpgroup_mma_wait=_wait_products,
    ),
    "triton.language.core": SimpleNamespace(_aggregate=lambda cls: cls),
    "triton.language.extra.cuda": SimpleNamespace(gdc_wait=lambda: None),
    "entropy_attn.kernels.primitives": SimpleNamespace(
        wait_for_last=lambda overlap: None, may_start_next=lambda overlap: None
    ),
}  # fmt: skip


PACKAGE = "entropy_attn.kernels.hopper."


def load(
    modules: Sequence[str], replaced: Mapping[str, Any], edits: Sequence[tuple[str, str]] = ()
) -> Any:
    """The first of some modules with Gluon replaced, in it and in the others that it imports.

    Args:
        modules: names in `PACKAGE`.
        replaced: names of any of these modules that get another value.
        edits: (old, new) pieces of source, each of which has to be found once in all.
    """
    loaded: dict[str, ModuleType] = {}
    left = list(edits)
    names = [PACKAGE + name for name in modules]

    def importer(name: str, space: Any = None, local: Any = None, wanted: Any = (), level: int = 0):
        if name in FAKES and wanted:
            return FAKES[name]
        if name in names:
            return execute(name)
        return builtins.__import__(name, space, local, wanted, level)

    def execute(name: str) -> ModuleType:
        if name in loaded:
            return loaded[name]
        path = Path(str(import_module(name).__file__))
        source = path.read_text()
        for old, new in list(left):
            if old in source:
                assert source.count(old) == 1, f"{old!r} stands more than once in {path.name}"
                source = source.replace(old, new)
                left.remove((old, new))
        module = loaded[name] = ModuleType(name)
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importer}
        module.__dict__["__file__"] = str(path)
        exec(compile(source, str(path), "exec"), module.__dict__)
        module.__dict__.update({n: x for n, x in replaced.items() if n in module.__dict__})
        return module

    module = execute(names[0])
    assert not left, f"not in the source: {left}"
    return module
