"""The soft entropies under torch's own machinery, and what they say about bad arguments."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from range_cases import Case

import entropy_attn as ea
from entropy_attn.partition import ops

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_balls(backend: str, weighted: bool, device: str) -> None:
    x, anchors = torch.randn(1, 2, 20, 3, device=device), torch.randn(1, 2, 5, 3, device=device)
    alpha = torch.rand(1, 2, device=device)
    weights = torch.rand(1, 2, 20, device=device) if weighted else None
    tensors = (x, anchors, alpha, weights)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(ops.range_forward.overload, (*leaves, False, backend))
    with torch.no_grad():
        torch.library.opcheck(ops.range_forward.overload, (*tensors, True, backend))
        entropy, mass, lse, _ = ops.range_forward(*tensors, False, backend)
        given = (torch.ones_like(entropy), *tensors, entropy, mass, lse)
        for needs in ((True, True, weighted), (False, True, False), (True, False, weighted)):
            torch.library.opcheck(ops.range_backward.overload, (*given, *needs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_halfspaces(backend: str, device: str) -> None:
    x, normals = torch.randn(1, 2, 20, 3, device=device), torch.randn(1, 2, 3, 3, device=device)
    tensors = (x, normals, normals[..., 0].clone(), torch.rand(1, 2, device=device) + 0.5)
    tensors = (*tensors, torch.rand(1, 2, 20, device=device))
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(ops.halfspace_forward.overload, (*leaves, backend))
    with torch.no_grad():
        entropy, mass = ops.halfspace_forward(*tensors, backend)
        given = (torch.ones_like(entropy), *tensors, entropy, mass)
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            torch.library.opcheck(ops.halfspace_backward.overload, (*given, *needs, backend))


@pytest.mark.parametrize("halfspaces", [False, True])
def test_gradcheck(halfspaces: bool) -> None:
    case = Case(9, 3, 3, halfspaces=halfspaces, batch=(2,), weights=True)
    *inputs, weights = [t.double() for t in case.build("cpu")]
    inputs.append(weights + 0.1)  # at 0 there is a derivative to one side alone
    function = ea.halfspace_entropy if halfspaces else ea.range_entropy
    assert torch.autograd.gradcheck(function, case.leaves(inputs))


def test_gradcheck_of_hard_weights() -> None:
    weights = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (9,))
    assert torch.autograd.gradcheck(lambda w: ea.partition_entropy(labels, 4, w), weights)


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [4, 140])
def test_each_gradient_alone(k: int, backend: str, needed: int, device: str) -> None:
    """What is not needed is not computed, and the rest stays the same."""
    case = Case(20, 3, k, weights=True)
    inputs = case.build(device)
    together = case.leaves(inputs)
    grads = torch.autograd.grad(ea.range_entropy(*together, backend=backend), together)
    alone = [t.requires_grad_(i == needed) for i, t in enumerate(case.leaves(inputs))]
    (grad,) = torch.autograd.grad(ea.range_entropy(*alone, backend=backend), alone[needed])
    assert torch.equal(grad, grads[needed])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    x = torch.randn(2, 3, 20, 4, device=device)
    anchors, normals = torch.randn(5, 4, device=device), torch.randn(3, 4, device=device)
    weights = torch.rand(3, 20, device=device)

    def loss(x, anchors, normals):
        balls = ea.range_entropy(x, anchors, 0.7, weights, backend=backend)
        planes = ea.halfspace_entropy(x, normals, normals[:, 0], 1.5, backend=backend)
        low, high = ea.entropy_interval(x, anchors, 0.7, backend=backend)
        labels = (x[..., 0] > 0).int()
        return (balls + planes).sum(), (low + high, ea.partition_entropy(labels, 2))

    mode = "inductor" if device == "cuda" else "aot_eager"
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=mode)):
        leaves = [t.clone().requires_grad_() for t in (x, anchors, normals)]
        value, others = function(*leaves)
        results.append((value, *others, *torch.autograd.grad(value, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_module_compiles_once_it_is_initialised() -> None:
    x = torch.randn(4, 30, 3)
    module = ea.RangeEntropy(6)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert module.anchors.grad.abs().sum() > 0


def test_named_backends_do_not_fall_back() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ea.BackendUnavailable, match="not fp64"):
        ea.range_entropy(x, x, 1.0, backend="triton")
    with pytest.raises(ea.BackendUnavailable, match="dense"):
        ea.range_entropy(x, x, 1.0, backend="sdpa")
    with pytest.raises(ValueError, match="backend must be"):
        ea.range_entropy(x, x, 1.0, backend="cuda")


X = torch.randn(2, 8, 3)
BALLS = {
    "not a tensor": (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    "integer points": (dict(x=X.int()), TypeError, "x has dtype torch.int32; allowed are float16"),
    "one dimension": (dict(x=X[0, 0]), ValueError, r"x must have shape \(..., n, d\).*\(3,\)"),
    "no coordinates": (dict(x=X[..., :0]), ValueError, "d >= 1"),
    "other d": (
        dict(anchors=X[..., :2]),
        ValueError,
        r"anchors must have shape \(..., k, 3\) for x of shape \(2, 8, 3\), got \(2, 8, 2\)",
    ),
    "no anchors": (dict(anchors=X[:, :0]), ValueError, r"anchors must have shape.*\(2, 0, 3\)"),
    "half anchors": (dict(anchors=X.half()), TypeError, "anchors has dtype torch.float16.*cast"),
    "device": (dict(anchors=X.to("meta")), ValueError, "anchors is on meta but x is on cpu"),
    "batch": (
        dict(anchors=X[:1].expand(3, 8, 3)),
        ValueError,
        r"do not broadcast: x \(2,\), anchors \(3,\)",
    ),
    "alpha": (dict(alpha=0.0), ValueError, "alpha must be a finite number > 0, got 0.0"),
    "alpha nan": (dict(alpha=math.nan), ValueError, "alpha.*nan"),
    "alpha int tensor": (dict(alpha=torch.tensor(1)), TypeError, "alpha has dtype torch.int64"),
    "weights int": (dict(weights=torch.ones(8).int()), TypeError, "weights.*bool.*int32"),
    "weights n": (dict(weights=torch.ones(7)), ValueError, r"weights.*\(..., 8\).*got \(7,\)"),
    "weights device": (dict(weights=torch.ones(8, device="meta")), ValueError, "weights is on"),
}


@pytest.mark.parametrize("function", [ea.range_entropy, ea.entropy_interval])
@pytest.mark.parametrize("name", BALLS)
def test_balls_say_what_is_wrong(name: str, function: Any) -> None:
    changes, error, message = BALLS[name]
    with pytest.raises(error, match=message):
        function(**{"x": X, "anchors": X, "alpha": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(normals=X[0, :, :2]), r"normals must have shape \(..., T, 3\)"),
        (dict(normals=torch.randn(13, 3)), "13 halfspaces; at most 12.*range_entropy"),
        (dict(offsets=torch.randn(7)), r"offsets must have shape \(..., 8\)"),
        (dict(tau=-1.0), "tau must be a finite number > 0, got -1.0"),
    ],
)
def test_halfspaces_say_what_is_wrong(changes: dict, message: str) -> None:
    given = {"x": X, "normals": X[0], "offsets": X[0, :, 0], "tau": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        ea.halfspace_entropy(**given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(5), 2), TypeError, "labels must be an integer tensor.*float32"),
        ((torch.tensor(1), 2), ValueError, "labels must have shape"),
        ((torch.tensor([0, 2]), 2), ValueError, "labels holds 2; allowed are 0 to k - 1 = 1"),
        ((torch.tensor([0, -1]), 2), ValueError, "labels holds -1"),
        ((torch.tensor([0]), 0), ValueError, "k must be an int >= 1, got 0"),
        ((torch.tensor([0]), 1, torch.ones(2)), ValueError, "weights must have shape"),
    ],
)
def test_partition_says_what_is_wrong(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ea.partition_entropy(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ea.RangeEntropy, 0), "num_anchors must be None or an int >= 1, got 0"),
        (partial(ea.RangeEntropy, alpha=-1.0), "alpha must be a finite number > 0"),
        (partial(ea.RangeEntropy, lloyd_steps=-1), "lloyd_steps must be an int >= 0"),
        (lambda: ea.RangeEntropy()(X * math.nan), "x holds NaN or infinite points"),
        (lambda: ea.RangeEntropy()(X, torch.zeros(8)), "no point of weight > 0"),
    ],
)
def test_module_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
