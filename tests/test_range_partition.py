"""Hard partitions, the interval that holds their entropy, and the module with its own anchors."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from range_cases import least_contiguous_entropy

import entropy_attn as ea
from entropy_attn.partition.anchors import (
    default_count,
    median_alpha,
    place_anchors,
    sample_points,
)
from entropy_attn.reference.soft_entropy import nearest_anchor

# Hard partitions


def test_hard_entropy_by_hand(device: str) -> None:
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]], device=device)
    out = ea.partition_entropy(labels, 3)
    torch.testing.assert_close(out, torch.tensor([math.log(2), 0.0], device=device))
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0], device=device)
    out = ea.partition_entropy(labels.int(), 3, weights)
    torch.testing.assert_close(out, torch.tensor([math.log(2), 0.0], device=device))
    assert (ea.partition_entropy(labels, 3, torch.zeros(4, device=device)) == 0).all()
    assert ea.partition_entropy(labels[:, :0], 3).tolist() == [0.0, 0.0]


def test_hard_entropy_is_the_limit_of_soft() -> None:
    x, anchors = torch.randn(3, 50, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    labels = nearest_anchor(x, anchors)
    expected = torch.cdist(x, anchors).argmin(-1)
    assert torch.equal(labels, expected)
    weights = torch.rand(50, dtype=torch.float64)
    hard = ea.partition_entropy(labels, 6, weights)
    torch.testing.assert_close(ea.range_entropy(x, anchors, 1e7, weights), hard)


# The interval


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    k=st.integers(1, 9),
    log_alpha=st.floats(-7, 9),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(seed=8097, n=8, k=2, log_alpha=0.0, weighted=True, dtype=torch.float32)
@settings(max_examples=150, deadline=None)
def test_hard_entropy_lies_in_the_interval(seed, n, k, log_alpha, weighted, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    x, anchors = draw(n, 2), draw(k, 2)
    anchors[seed % k] = anchors[0]  # a tie of two cells
    weights = draw(n).clamp(min=0).double() if weighted else torch.ones(n, dtype=torch.float64)
    low, high = ea.entropy_interval(x, anchors, math.exp(log_alpha), weights.to(dtype))
    hard = ea.partition_entropy(nearest_anchor(x, anchors), k, weights)
    assert 0 <= low.item() <= hard.item() + 1e-15
    assert hard.item() <= high.item() * (1 + torch.finfo(dtype).eps)
    assert high.item() <= math.log(k) * (1 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 5, 140])
def test_interval_is_the_same_from_the_kernel(k: int, device: str) -> None:
    x, anchors = torch.randn(2, 60, 3, device=device), torch.randn(k, 3, device=device)
    weights = torch.rand(60, device=device)
    for given_weights in (None, weights, weights > 0.5):
        bounds = [
            torch.stack(ea.entropy_interval(x, anchors, 3.0, given_weights, backend=backend))
            for backend in ("reference", "triton")
        ]
        torch.testing.assert_close(*bounds)
        assert not bounds[0].requires_grad


def test_interval_closes_as_cells_harden() -> None:
    x, anchors = torch.randn(200, 2), torch.randn(5, 2)
    widths = []
    for alpha in (0.01, 1.0, 100.0, 1e8):
        low, high = ea.entropy_interval(x, anchors, alpha)
        widths.append((high - low).item())
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 1
    assert widths[-1] < 0.05


def brute_force(points: list[float], longest: float) -> float:
    """Over all ways to cut the sorted points into runs."""
    x, best = sorted(points), math.inf
    for cuts in itertools.product([False, True], repeat=len(x) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        runs = [x[a:b] for a, b in itertools.pairwise([0, *ends, len(x)])]
        if all(run[-1] - run[0] <= longest for run in runs):
            shares = [len(run) / len(x) for run in runs]
            best = min(best, -sum(share * math.log(share) for share in shares))
    return best


@pytest.mark.parametrize("longest", [0.1, 0.7, 2.0, 9.0])
def test_dynamic_program_finds_the_least_entropy(longest: float) -> None:
    points = torch.randn(9)
    expected = brute_force(points.tolist(), longest)
    assert math.isclose(least_contiguous_entropy(points, longest), expected, abs_tol=1e-12)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 40), k=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_upper_end_bounds_the_least_entropy_on_a_line(seed, n, k) -> None:
    """Where the ranges, here intervals, are long enough for the cells of nearest anchors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    anchors = torch.randn(k, 1, generator=generator, dtype=torch.float64)
    labels = nearest_anchor(x, anchors)
    cells = [x[labels == j, 0] for j in range(k) if (labels == j).any()]
    longest = max((cell.max() - cell.min()).item() for cell in cells)
    least = least_contiguous_entropy(x[:, 0], longest)
    hard = ea.partition_entropy(labels, k, torch.ones(n, dtype=torch.float64)).item()
    for alpha in (0.3, 3.0, 300.0):
        _, high = ea.entropy_interval(x, anchors, alpha)
        assert least <= hard + 1e-12
        assert least <= high.item() + 1e-12


# Anchors from data


def blobs(k: int = 5, n: int = 40, d: int = 3, scale: float = 1.0) -> torch.Tensor:
    """(k * n, d) points in k clusters far apart."""
    centres = 20 * torch.arange(k)[:, None, None]
    return scale * (centres + 0.3 * torch.randn(k, n, d)).flatten(0, 1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("d", [3, 200])
def test_module_needs_no_hyperparameter(scale: float, d: int) -> None:
    x = blobs(d=d, scale=scale)
    module = ea.RangeEntropy(5)
    entropy = module(x)
    torch.testing.assert_close(entropy, torch.tensor(math.log(5)), rtol=0.02, atol=0)
    low, high = module.interval(x)
    hard = ea.partition_entropy(module.labels(x), 5)
    torch.testing.assert_close(hard, torch.tensor(math.log(5)))
    assert low <= hard <= high
    assert high - low < 0.5
    # All points in one cluster.
    assert module(x[:40]) < 0.1


def test_default_number_of_anchors() -> None:
    assert [default_count(n) for n in (1, 4, 50, 4096, 10**6)] == [2, 2, 8, 64, 64]
    module = ea.RangeEntropy()
    module(torch.randn(4, 50, 3))
    assert module.anchors.shape == (8, 3)


def test_alpha_is_what_it_says() -> None:
    points, anchors = torch.randn(301, 4).double(), torch.randn(6, 4).double()
    alpha = median_alpha(points, anchors)
    scores = -alpha * torch.cdist(points, anchors).square()
    best, second = scores.topk(2).values.unbind(-1)
    torch.testing.assert_close((best - second).median(), torch.tensor(6.0).double())
    assert math.isfinite(median_alpha(anchors[:1], anchors[:1]))
    assert math.isfinite(median_alpha(points * 0, anchors / anchors.norm(dim=-1, keepdim=True)))


def test_no_two_anchors_at_one_place() -> None:
    """Else one place would count as several cells."""
    module = ea.RangeEntropy(8)
    assert module(torch.ones(30, 2)) == 0
    assert module.anchors.shape == (1, 2)
    module = ea.RangeEntropy(8)
    module(torch.tensor([0.0, 1.0, 1.0, 5.0])[:, None])
    assert sorted(module.anchors.flatten().tolist()) == [0.0, 1.0, 5.0]


def test_lloyd_steps_lower_the_distances() -> None:
    points = torch.randn(400, 2).double()
    costs = []
    for steps in (0, 1, 10):
        anchors = place_anchors(points, 7, steps, torch.Generator().manual_seed(3))
        costs.append(torch.cdist(points, anchors).amin(-1).square().sum().item())
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_anchors_follow_the_seed_and_the_weights() -> None:
    x = torch.randn(2, 30, 3)
    modules = [ea.RangeEntropy(4, seed=seed) for seed in (0, 0, 1)]
    for module in modules:
        module.reset(x)
    first, same, other = (module.anchors for module in modules)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    x[:, 20:] = float("nan")
    weights = torch.arange(30) < 20
    points = sample_points(x, weights, torch.Generator().manual_seed(0))
    assert points.shape == (40, 3)
    assert points.isfinite().all()
    assert ea.RangeEntropy(4)(x, weights).isfinite().all()


def test_large_batches_are_sampled() -> None:
    points = sample_points(torch.randn(3, 10_000, 2), None, torch.Generator().manual_seed(0))
    assert points.shape == (8192, 2)
    assert len(points.unique(dim=0)) > 8000


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_forward_without_gradients(mode) -> None:
    x = torch.randn(2, 30, 3)
    module = ea.RangeEntropy(4).eval()
    with mode():
        first = module(x)
    torch.testing.assert_close(module(x), first)
    module(x).sum().backward()
    assert module.anchors.grad is not None


def test_what_learns() -> None:
    x = torch.randn(30, 3, requires_grad=True)
    for anchors, alpha in itertools.product([False, True], repeat=2):
        module = ea.RangeEntropy(4, learn_anchors=anchors, learn_alpha=alpha)
        module(x).backward()
        assert (module.anchors.grad is not None) == anchors
        assert (module.log_alpha.grad is not None) == alpha


def test_training_lowers_the_entropy() -> None:
    x = torch.nn.Parameter(torch.randn(60, 2))
    module = ea.RangeEntropy(6, learn_anchors=False)
    optimizer = torch.optim.Adam([x], lr=0.05)  # made before the first forward
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


def test_state_dict_round_trip() -> None:
    x = torch.randn(2, 30, 3)
    module = torch.nn.Sequential(ea.RangeEntropy(4, alpha=2.5))
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.nn.Sequential(ea.RangeEntropy())
    loaded.load_state_dict(torch.load(file))
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded[0].alpha.item(), 2.5)
    assert torch.equal(copy.deepcopy(loaded)(x), expected)
    assert "anchors=(4, 3)" in repr(loaded)


def test_state_dict_before_the_first_batch() -> None:
    fresh = ea.RangeEntropy(4)
    assert "set by the first batch" in repr(fresh)
    other = ea.RangeEntropy(4)
    other.load_state_dict(fresh.state_dict())
    x = torch.randn(30, 3)
    assert torch.equal(other(x), fresh(x))


def test_reset_keeps_the_parameters_of_an_optimizer() -> None:
    module = ea.RangeEntropy(4)
    module(torch.randn(30, 3))
    anchors = module.anchors
    before = anchors.detach().clone()
    module.reset(torch.randn(30, 3) + 5)
    assert module.anchors is anchors
    assert not torch.equal(anchors, before)


def test_double_and_half_precision() -> None:
    x = torch.randn(30, 3)
    module = ea.RangeEntropy(4)
    assert module(x.double()).dtype == torch.float64
    module = ea.RangeEntropy(4)
    assert module(x.bfloat16()).dtype == module.anchors.dtype == torch.float32
