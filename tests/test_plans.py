"""Plans: launches that are kept for calls of the same form, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import entropy_attn as ea
from entropy_attn.kernels import plans
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.testing import assert_close_to_reference


class Compiled(CompiledKernel):
    """What Triton's compiler returns, but for the compiling."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(("compiled", grid, args))


class Kernel:
    """A kernel as triton.jit makes it: parameters a, b, n, BLOCK."""

    arg_names = ("a", "b", "n", "BLOCK")

    def __init__(self) -> None:
        self.calls: list = []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.calls.append(("jit", grid, args, constants))
            return Compiled(self.calls)

        return launch


def test_later_launches_go_to_the_compiled_kernel_with_every_parameter():
    kernel = Kernel()
    launch = Launch(kernel, (7,), (3,), BLOCK=64, num_warps=4)
    tensors = torch.zeros(4), None
    others = torch.ones(4), torch.ones(2)
    launch(*tensors)
    launch(*others)
    first, second = kernel.calls
    assert first == ("jit", (7, 1, 1), (*tensors, 3), {"BLOCK": 64, "num_warps": 4})
    assert second[:2] == ("compiled", (7, 1, 1))
    a, b, *rest = second[2]
    assert a is others[0]
    assert b is others[1]
    assert rest == [3, 64]


def test_descriptors_follow_the_tensor_and_keep_none_alive():
    kernel = Kernel()
    old, new = torch.zeros(8, 16), torch.ones(8, 16)
    launch = Launch(kernel, (1,), (3,), described={1: describe(old)}, BLOCK=64)
    launch(torch.zeros(1), old)
    launch(torch.zeros(1), new)
    for call, tensor in zip(kernel.calls, (old, new), strict=True):
        moved = call[2][1]
        assert moved.base is tensor
        assert (moved.shape, moved.strides, moved.block_shape) == ([8, 16], [16, 1], [4, 16])
    gone = weakref.ref(old)
    kernel.calls.clear()
    del old, tensor, call, moved
    gc.collect()
    assert gone() is None


def describe(tensor: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor(tensor, [8, 16], [16, 1], [4, 16])


def test_a_plan_holds_for_the_form_of_tensors_and_the_value_of_the_rest():
    made = []

    @planned
    def plan(tensor, other, number, pair):
        made.append((tensor, number))
        return len(made)

    memory = torch.zeros(64, 16, dtype=torch.float16)
    base = memory[:8]
    args = (None, 2, (1, 2))
    assert plan(base, *args) == 1
    assert plan(memory[8:16], *args) == 1  # values and address may differ
    variants = [
        (memory[:16], *args),  # shape
        (memory[:16:2], *args),  # strides
        (base.bfloat16(), *args),  # dtype
        (memory.flatten()[1:129].view(8, 16), *args),  # alignment
        (base, base, 2, (1, 2)),
        (base, None, 3, (1, 2)),
        (base, None, 2, (2, 1)),
    ]
    found = [plan(*call) for call in variants]
    assert found == list(range(2, 2 + len(variants)))
    assert plan(base, *args) == 1


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    made = []

    @planned
    def plan(number):
        made.append(number)
        return number

    for number in (0, 1, 2, 0, 3, 3, 0):
        assert plan(number) == number
    assert made == [0, 1, 2, 3, 0]  # the oldest made room


def test_a_compiled_kernel_is_kept_for_its_device(monkeypatch):
    kernel = Kernel()
    launch = Launch(kernel, (1,), (3,), BLOCK=64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())

    class On(torch.Tensor):
        device_index = 0

        def get_device(self):
            return self.device_index

    first, second = (torch.zeros(4).as_subclass(On) for _ in range(2))
    second.device_index = 1
    for tensor in (first, second, first, second):
        launch(tensor, None)
    assert [call[0] for call in kernel.calls] == ["jit", "jit", "compiled", "compiled"]


def test_plans_are_forgotten():
    made = []

    @planned
    def plan(number):
        made.append(number)
        return None

    plan(1), plan(1)
    assert made == [1]  # None is a plan too
    plans.forget_plans()
    plan(1)
    assert made == [1, 1]


def test_an_error_is_its_own():
    @planned
    def plan(number):
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no") as found:
            plan(1)
        assert found.value.__context__ is None


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_tf32_by_either_of_torchs_settings(setting):
    code = (
        "import torch; from entropy_attn.kernels.plans import dot_precision as p;"
        "matmul = torch.backends.cuda.matmul;"
        "assert p(torch.float32) == 'ieee';"
        f"matmul.allow_tf32 = {setting == 'tf32'}; assert p(torch.float32) == {setting!r};"
        "assert p(torch.bfloat16) == 'ieee'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        code = (
            "import torch; from entropy_attn.kernels.plans import dot_precision as p;"
            f"torch.backends.fp32_precision = {setting!r}; assert p(torch.float32) == {setting!r}"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "q_len"), [(64, 200), (128, 4096)])
def test_gpu_calls_of_one_form_differ_in_address_and_alignment(dtype, head_dim, q_len):
    shape = (2, q_len, 4, head_dim)
    count = 2 * 4 * q_len * head_dim

    def tokens(offset: int) -> torch.Tensor:
        memory = torch.randn(count + 8, device="cuda", dtype=dtype)
        return memory[offset : offset + count].view(shape).transpose(1, 2)

    kept = []  # so that addresses differ
    for offset in (0, 0, 8, 1, 1, 0, 3, 8):
        inputs = [tokens(offset) for _ in range(3)]
        mask = ea.select_blocks(*inputs[:2], budget=ea.TopK(0.3), is_causal=True)
        out = ea.block_sparse_attention(*inputs, mask, is_causal=True)
        low, high = (
            ea.block_sparse_attention(
                *(x.to(dtype) for x in inputs), mask, is_causal=True, backend="reference"
            )
            for dtype in (dtype, torch.float64)
        )
        assert_close_to_reference(out, low, high, f"output at offset {offset}")
        assert out.stride() == inputs[0].stride()
        again = ea.select_blocks(
            *(x.clone() for x in inputs[:2]), budget=ea.TopK(0.3), is_causal=True
        )
        assert torch.equal(mask.to_dense(), again.to_dense())
        kept.append((inputs, out))
