"""The soft entropies: results worked out by hand, the reference against the definition in fp64,
the kernels against plain PyTorch in the same dtype."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from range_cases import Case, plain_results, values_and_gradients

import entropy_attn as ea
from entropy_attn.partition import ops
from entropy_attn.reference import soft_entropy as reference
from entropy_attn.testing import assert_close_to_reference

HAS_GPU = torch.cuda.is_available()
BACKENDS = ["reference", "triton"]
BALLS = [
    Case(1, 3, 1),
    Case(1, 3, 5),
    Case(63, 40, 2, weights=True),
    Case(197, 3, 5),
    Case(197, 96, 33, weights=True),
    Case(63, 40, 300, weights=True),
    Case(40, 70, 100, batch=(2,)),
    Case(33, 3, 5, batch=(2, 3), weights=True, fused=True),
    Case(33, 8, 5, batch=(2, 1, 2), shared=False),
    Case(33, 8, 140, batch=(2,), shared=False, weights=True),
]
PLANES = [
    Case(1, 3, 1, halfspaces=True),
    Case(63, 40, 2, halfspaces=True, weights=True),
    Case(197, 96, 5, halfspaces=True),
    Case(70, 8, 10, halfspaces=True, weights=True),
    Case(33, 3, 3, halfspaces=True, batch=(2, 3), weights=True, fused=True),
    Case(33, 3, 4, halfspaces=True, batch=(2, 2), shared=False),
]
HALF = [
    Case(63, 40, 5, weights=True, dtype=torch.float16),
    Case(63, 40, 140, dtype=torch.float16),
    Case(63, 40, 5, halfspaces=True, weights=True, dtype=torch.float16),
]


def run(case: Case, backend: str):
    function = ea.halfspace_entropy if case.halfspaces else ea.range_entropy
    return partial(function, backend=backend)


# By hand


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_at_one_anchor_have_entropy_zero(backend: str, device: str) -> None:
    anchors = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], device=device)
    x = anchors[:1].expand(50, 2)
    out = ea.range_entropy(x, anchors, 10.0, backend=backend)
    assert out.shape == ()
    assert out.item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_evenly_split_points_have_the_log_of_their_parts(backend: str, device: str) -> None:
    anchors = torch.eye(4, device=device) * 10
    x = anchors.repeat(7, 1)
    out = ea.range_entropy(x, anchors, 50.0, backend=backend)
    torch.testing.assert_close(out, torch.tensor(math.log(4), device=device))
    # A quarter of the points decides which parts count.
    weights = torch.tensor([True, True, False, False], device=device).repeat(7)
    out = ea.range_entropy(x, anchors, 50.0, weights, backend=backend)
    torch.testing.assert_close(out, torch.tensor(math.log(2), device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_between_two_anchors_count_half_for_each(backend: str, device: str) -> None:
    anchors = torch.tensor([[-1.0], [1.0]], device=device)
    x = torch.zeros(5, 1, device=device)
    out = ea.range_entropy(x, anchors, 3.0, backend=backend)
    torch.testing.assert_close(out, torch.tensor(math.log(2), device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_anchor_has_entropy_and_gradients_zero(backend: str, device: str) -> None:
    x, anchors = torch.randn(20, 3, device=device), torch.randn(1, 3, device=device)
    leaves = [t.requires_grad_() for t in (x, anchors)]
    out, *grads = values_and_gradients(
        lambda x, c: ea.range_entropy(x, c, 2.0, backend=backend), leaves
    )
    assert out.item() == 0.0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_cut_quadrants(backend: str, device: str) -> None:
    normals, offsets = torch.eye(2, device=device), torch.zeros(2, device=device)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=device)
    out = ea.halfspace_entropy(corners, normals, offsets, 0.01, backend=backend)
    torch.testing.assert_close(out, torch.tensor(math.log(3), device=device))
    out = ea.halfspace_entropy(corners * 0, normals, offsets, 1.0, backend=backend)
    torch.testing.assert_close(out, torch.tensor(math.log(4), device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halfspaces_are_balls_around_the_corners_of_a_cube(backend: str, device: str) -> None:
    """sigmoid(a) and its complement are a softmax, so with signed distances as points the corners
    of a cube of side 1 are the cells' anchors, with alpha = 1/2."""
    x, normals, offsets, tau = Case(40, 5, 3, halfspaces=True).build(device)
    distances = (x @ normals.mT - offsets) / tau
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], device=device)] * 3)
    balls = ea.range_entropy(distances, corners, 0.5, backend=backend)
    planes = ea.halfspace_entropy(x, normals, offsets, tau, backend=backend)
    torch.testing.assert_close(planes, balls)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(30, 3, 4), Case(30, 3, 140), Case(30, 3, 4, True)], ids=str)
def test_a_point_without_weight_is_not_there(case: Case, backend: str, device: str) -> None:
    """Whatever it holds, and whatever the scale of the weights."""
    x, *cells = case.build(device)
    padded = torch.cat((x, torch.full((9, 3), float("nan"), device=device)))
    mask = torch.arange(39, device=device) < 30
    expected = values_and_gradients(run(case, backend), case.leaves([x, *cells]))
    for weights in (mask, mask * 1e6, mask * 1e-6):
        function = lambda *leaves: run(case, backend)(*leaves, weights)  # noqa: B023, E731
        found = values_and_gradients(function, case.leaves([padded, *cells]))
        assert (found[1][30:] == 0).all()
        found[1] = found[1][:30]
        torch.testing.assert_close(found[0], expected[0])
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(got / 39, wanted / 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(30, 3, 4, batch=(2,)), Case(30, 3, 4, True, batch=(2,))])
def test_a_set_without_weight_is_zero(case: Case, backend: str, device: str) -> None:
    inputs = [*case.build(device), torch.ones(2, 30, device=device)]
    inputs[-1][0] = 0
    out, *grads = values_and_gradients(run(case, backend), case.leaves(inputs))
    assert out[0] == 0 < out[1]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][0] == 0).all()
    assert (grads[-1][0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_points_and_no_sets(backend: str, device: str) -> None:
    anchors, normals = torch.randn(4, 3, device=device), torch.randn(2, 3, device=device)
    for shape in ((0, 3), (5, 0, 3), (0, 7, 3)):
        x = torch.randn(*shape, device=device)
        leaves = [t.detach().requires_grad_() for t in (x, anchors, normals)]
        out = ea.range_entropy(*leaves[:2], 1.0, backend=backend)
        planes = ea.halfspace_entropy(
            leaves[0], leaves[2], torch.zeros(2, device=device), 1.0, backend=backend
        )
        assert out.shape == planes.shape == shape[:-2]
        grads = torch.autograd.grad((out + planes).sum(), leaves)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_cell_is_safe(backend: str, device: str) -> None:
    """p underflows for the far anchor: no NaN, and no pull on it."""
    x = torch.randn(30, 2, device=device)
    anchors = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1e4, 0.0]], device=device)
    leaves = [t.requires_grad_() for t in (x, anchors)]
    function = lambda x, c: ea.range_entropy(x, c, 1.0, backend=backend)  # noqa: E731
    out, *grads = values_and_gradients(function, leaves)
    near = values_and_gradients(function, [x, anchors[:2].detach().requires_grad_()])
    # Far anchors move the common origin: digits are lost, not more.
    torch.testing.assert_close(out, near[0], rtol=0, atol=0.01)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[1][2] == 0).all()


@pytest.mark.parametrize("unit", [1e-7, 1e7])
@pytest.mark.parametrize("k", [5, 140])
def test_the_unit_of_length_does_not_matter(k: int, unit: float, device: str) -> None:
    x, anchors, alpha = Case(33, 3, k).build(device)
    wanted = [1.0, 1 / unit, 1 / unit, unit**2]
    leaves = [x * unit, anchors * unit, alpha / unit**2]
    function = lambda *t: ea.range_entropy(*t, backend="triton")  # noqa: E731
    near = values_and_gradients(
        function, [t.detach().requires_grad_() for t in (x, anchors, alpha)]
    )
    far = values_and_gradients(function, [t.detach().requires_grad_() for t in leaves])
    for got, expected, factor in zip(far, near, wanted, strict=True):
        torch.testing.assert_close(got / factor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_the_origin_no_digit_is_lost(backend: str, device: str) -> None:
    x, anchors = torch.randn(64, 3, device=device), torch.randn(6, 3, device=device)
    x, anchors = ((t * 64).round() / 64 for t in (x, anchors))  # exact after the shift
    near = ea.range_entropy(x, anchors, 2.0, backend=backend)
    far = ea.range_entropy(x + 4096, anchors + 4096, 2.0, backend=backend)
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)


# Against the definition


@pytest.mark.parametrize("case", BALLS + PLANES, ids=str)
def test_reference_follows_the_definition(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", 20 * case.cells * 16)  # several chunks
    inputs = [t.double() for t in case.build("cpu")]
    found = values_and_gradients(run(case, "reference"), case.leaves(inputs))
    expected = values_and_gradients(case.naive, case.leaves(inputs))
    for name, got, wanted in zip(case.names, found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("case", BALLS + PLANES + HALF, ids=str)
def test_kernels_are_as_good_as_plain_pytorch(case: Case, device: str) -> None:
    inputs = case.build(device)
    found = values_and_gradients(run(case, "triton"), case.leaves(inputs))
    assert found[0].dtype == torch.float32
    exact = values_and_gradients(case.naive, case.leaves(inputs, torch.float64))
    plain = plain_results(case, inputs, exact, [run(case, "reference")])
    for name, got, same, wanted in zip(case.names, found, plain, exact, strict=True):
        assert_close_to_reference(got, same, wanted, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [5, 140])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_anchors_in_half_precision(batch: tuple, k: int, backend: str, device: str) -> None:
    """The same numbers as with anchors in fp32, and gradients that are rounded once."""
    x = torch.randn(*batch, 20, 4, device=device).half()
    anchors = torch.randn(k, 4, device=device).half()
    results = []
    for given in (anchors, anchors.float()):
        leaf = given.requires_grad_()
        out = ea.range_entropy(x, leaf, 0.7, backend=backend)
        results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
    (out, grad), (expected, exact) = results
    assert torch.equal(out, expected)
    assert torch.equal(grad, exact.half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_of_each_set(backend: str, device: str) -> None:
    x, anchors = torch.randn(2, 3, 20, 4, device=device), torch.randn(5, 4, device=device)
    alpha = torch.tensor([0.1, 1.0, 5.0], device=device, requires_grad=True)
    out = ea.range_entropy(x, anchors, alpha, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), alpha)
    for head in range(3):
        one = alpha[head].detach().requires_grad_()
        alone = ea.range_entropy(x[:, head], anchors, one, backend=backend)
        torch.testing.assert_close(out[:, head], alone)
        torch.testing.assert_close(grad[head], torch.autograd.grad(alone.sum(), one)[0])


def test_points_may_be_shared_by_sets_of_anchors() -> None:
    x, anchors = torch.randn(20, 4, requires_grad=True), torch.randn(3, 5, 4)
    out = ea.range_entropy(x, anchors, 1.0)
    single = torch.stack([ea.range_entropy(x, each, 1.0) for each in anchors])
    torch.testing.assert_close(out, single)
    grads = [torch.autograd.grad(each.sum(), x)[0] for each in (out, single)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("case", [BALLS[4], BALLS[5], PLANES[2]], ids=str)
def test_every_run_gives_the_same_numbers(case: Case, device: str) -> None:
    inputs = case.build(device)
    first, second = (
        values_and_gradients(run(case, "triton"), case.leaves(inputs)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_points_are_read_where_they_lie(device: str, monkeypatch) -> None:
    """Any strides, no copy: the launcher gets the memory that the caller gave."""
    from entropy_attn.kernels import range_entropy as kernels

    case = Case(33, 3, 5, batch=(2, 3), fused=True)
    x, anchors, alpha = case.build(device)
    x = x.mT.contiguous().mT  # nor need the coordinates be adjacent
    seen = []
    launch = kernels.range_mass
    monkeypatch.setattr(kernels, "range_mass", lambda x, *rest: seen.append(x) or launch(x, *rest))
    out = ea.range_entropy(x, anchors, alpha, backend="triton")
    assert [(t.data_ptr(), t.stride()) for t in seen] == [(x.data_ptr(), x.stride())]
    torch.testing.assert_close(out, ea.range_entropy(x, anchors, alpha))


def test_chunks_bound_what_the_reference_stores() -> None:
    x = torch.empty(100_000, 8)
    sizes = [x[rows].shape[0] * 1024 for rows in reference.row_chunks(x, 1024)]
    assert max(sizes) <= reference.CHUNK_ENTRIES
    assert sum(sizes) == 100_000 * 1024


# At size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [64, 200])
def test_a_million_points(dtype: torch.dtype, k: int) -> None:
    case = Case(1_000_000, 64, k, weights=True, dtype=dtype)
    inputs = case.build("cuda")
    leaves = case.leaves(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = values_and_gradients(run(case, "auto"), leaves)
    extra = torch.cuda.max_memory_allocated() - before
    # dx, a few numbers a point, and the sums of the programs; n x k would be 244 MiB and more.
    allowed = inputs[0].numel() * inputs[0].element_size() + 24 * case.n + 2**26
    assert extra < allowed, f"{extra / 2**20:.0f} MiB, allowed are {allowed / 2**20:.0f}"

    exact = values_and_gradients(case.naive, case.leaves(inputs, torch.float64))
    plain = plain_results(case, inputs, exact)
    for name, got, same, wanted in zip(case.names, found, plain, exact, strict=True):
        assert_close_to_reference(got, same, wanted, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_on_tensor_cores(dtype: torch.dtype) -> None:
    for case in (
        Case(5000, 80, 100, weights=True, dtype=dtype),
        Case(5000, 80, 10, halfspaces=True, weights=True, dtype=dtype),
    ):
        inputs = case.build("cuda")
        found = values_and_gradients(run(case, "triton"), case.leaves(inputs))
        exact = values_and_gradients(run(case, "reference"), case.leaves(inputs, torch.float64))
        plain = plain_results(case, inputs, exact)
        for name, got, same, wanted in zip(case.names, found, plain, exact, strict=True):
            assert_close_to_reference(got, same, wanted, name)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    n, d = 2**25 + 77, 80
    x = torch.zeros(n, d, device="cuda", dtype=torch.float16)
    x[-1] = 10
    anchors = torch.stack((x[0], x[-1])).float()
    weights = torch.zeros(n, device="cuda")
    weights[0] = weights[-1] = 1
    x.requires_grad_()
    out = ea.range_entropy(x, anchors, 1e-3, weights)
    (grad,) = torch.autograd.grad(out, x)
    ends = x.detach()[[0, -1]].requires_grad_()
    expected = ea.range_entropy(ends, anchors, 1e-3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad[[0, -1]], torch.autograd.grad(expected, ends)[0])
    assert (grad[1:-1] == 0).all()


@pytest.mark.gpu
def test_no_wait_for_the_device(forbid_waiting) -> None:
    x = torch.randn(4, 1000, 32, device="cuda", requires_grad=True)
    anchors = torch.randn(9, 32, device="cuda", requires_grad=True)
    normals = torch.randn(4, 32, device="cuda")

    def step():
        out = ea.range_entropy(x, anchors, 0.1)
        out = out + ea.halfspace_entropy(x, normals, normals[:, 0], 2.0)
        torch.autograd.grad(out.sum(), (x, anchors))
        ea.entropy_interval(x, anchors, 0.1)

    step()
    with forbid_waiting():
        step()


def test_ops_give_what_interval_needs(device: str) -> None:
    x, anchors, alpha = Case(50, 3, 140, batch=(1, 2), shared=False).build(device)
    alpha = alpha.expand(1, 2)
    found = ops.range_forward(x, anchors, alpha, None, True, "triton")
    exact = ops.range_forward(x, anchors, alpha, None, True, "reference")
    for position in (1, 3):  # masses and peaks
        torch.testing.assert_close(found[position], exact[position])
