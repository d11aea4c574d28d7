"""EntropyNet: its order is a permutation, its cuts are good ones, and its weights come with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
pytest.importorskip("scipy")
pytest.importorskip("safetensors")

import entropy_attn as ea  # noqa: E402
from entropy_attn.benchmarks.points import family  # noqa: E402
from entropy_attn.geometry import learned_order as learned  # noqa: E402
from entropy_attn.geometry import train as training  # noqa: E402
from entropy_attn.geometry.entropy_net import WEIGHTS, EntropyNet  # noqa: E402

FAMILIES = ("square", "disk", "gauss", "clusters", "circle")


@pytest.fixture(scope="module")
def net() -> EntropyNet:
    return EntropyNet.pretrained()


@pytest.fixture(autouse=True)
def one_thread():
    with learned.one_thread():
        yield


def unit(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2))


# --- the order ---


@given(
    n=st.integers(0, 3000),
    distinct=st.sampled_from([1, 2, 7, 10**6]),
    dtype=st.sampled_from([np.float64, np.float32, np.int64, np.uint8]),
    line=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_it_is_a_permutation(n, distinct, dtype, line, seed) -> None:
    """Few points, copies, points on a line, every dtype."""
    points = unit(seed, max(min(n, distinct), 1))[np.arange(n) % max(min(n, distinct), 1)]
    if line is not None:
        points[:, line] = 0.5
    points = (points * (1 if np.issubdtype(dtype, np.floating) else 200)).astype(dtype)
    order = ea.geometry.entropy_order(points, "learned", seed=seed)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, ea.geometry.entropy_order(points.copy(), "learned", seed=seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_its_order_has_an_entropy_like_a_curves(name) -> None:
    """The families are held out: training has seen none of these."""
    points = family(name, 20_000, seed=7)
    entropy = {
        method: ea.geometry.order_entropy(
            points, ea.geometry.entropy_order(points, method), relative=True
        )
        for method in ("learned", "hilbert", "brio", "random")
    }
    assert ea.geometry.order_entropy(points, relative=True) > 0.85  # as they come
    assert entropy["random"] > 0.85
    assert entropy["learned"] < 0.5 * entropy["random"]
    assert entropy["learned"] < entropy["brio"]
    # Its rounds cost a little.
    assert entropy["learned"] < entropy["hilbert"] + 0.08


def test_the_sample_comes_first_along_the_path() -> None:
    points = unit(0, 5000)
    order = ea.geometry.entropy_order(points, "learned")
    sample = learned.choose_sample(5000, seed=0)
    assert len(sample) == 5000 // 8
    assert set(order[: len(sample)]) == set(sample)
    assert [len(learned.choose_sample(n, 0)) for n in (3, 256, 300, 10**6)] == [3, 256, 256, 4096]
    assert len(set(learned.choose_sample(10**6, 0))) == 4096
    assert not np.array_equal(order, ea.geometry.entropy_order(points, "learned", seed=1))


def test_moving_and_scaling_a_set_leaves_its_order() -> None:
    points = np.random.default_rng(0).integers(0, 2**20, (3000, 2)) / 2.0**20
    order = ea.geometry.entropy_order(points, "learned")
    for scale, shift in ((2.0, 0.0), (2.0**-30, 0.0), (1.0, 1024.0), (8.0, -64.0)):
        moved = points * scale + shift
        assert np.array_equal(order, ea.geometry.entropy_order(moved, "learned"))
    for scale in (1e300, 1.7e308, 1e-300):
        found = ea.geometry.entropy_order((points - 0.5) * scale, "learned")
        assert np.array_equal(np.sort(found), np.arange(3000))


def test_the_order_of_a_sample_does_not_matter(net) -> None:
    sample = unit(0, 1000)
    tree = learned.cut_tree(net.cut, sample)
    again = learned.cut_tree(net.cut, sample[np.random.default_rng(1).permutation(1000)])
    assert np.array_equal(tree.axes, again.axes)
    assert np.array_equal(tree.offsets, again.offsets)
    assert np.array_equal(tree.ranks, again.ranks)


def test_threads_are_as_many_as_before(net) -> None:
    before = torch.get_num_threads()
    net.order(unit(0, 1000))
    assert torch.get_num_threads() == before


def test_it_triangulates() -> None:
    pytest.importorskip("pythoncdt")
    points = unit(3, 2000)

    def triangles(order: str) -> set[tuple[int, ...]]:
        found = ea.geometry.triangulate(points, library="pythoncdt", order=order)
        return {tuple(sorted(corners)) for corners in found.tolist()}

    assert triangles("learned") == triangles("hilbert")


@pytest.mark.parametrize(
    ("points", "error", "says"),
    [
        ([[0, 0], [1, np.nan], [2, 0]], ValueError, r"points\[1\] is \[1.0, nan\]"),
        (np.zeros((5, 3)), ValueError, r"\(n, 2\), got \(5, 3\)"),
        (np.zeros((5, 2), bool), TypeError, "bool"),
    ],
)
def test_bad_points(net, points, error, says) -> None:
    with pytest.raises(error, match=says):
        ea.geometry.entropy_order(points, "learned")
    with pytest.raises(error, match=says):
        net.order(points)


def test_bad_seed(net) -> None:
    with pytest.raises(ValueError, match="seed must be an int >= 0, got -1"):
        net.order(np.zeros((3, 2)), seed=-1)


# --- cells ---


def at_means(points, pieces, count):
    """A cutter that needs no network: across x and y in turn, at the mean."""
    axis = count.bit_length() % 2
    sums = torch.zeros(count).double().index_add(0, pieces, points[:, axis])
    return torch.full((count,), axis), sums / pieces.bincount(minlength=count).clamp(min=1)


def test_squares_are_sorted_by_their_cell() -> None:
    tree = learned.cut_tree(at_means, unit(0, 4096))
    places = learned.square_places(tree, 5)
    assert np.array_equal(np.sort(places), np.arange(4**5))
    centres = learned._centres(5)
    assert (np.abs(np.diff(centres, axis=0)).sum(1) == 1 / 32).all(), "along the curve"
    cells = np.empty(4**5, np.int64)
    for square, (x, y) in enumerate(centres):
        node = 0
        while node < len(tree.axes):
            node = 2 * node + 1 + int((x, y)[tree.axes[node]] > tree.offsets[node])
        cells[square] = tree.ranks[node - len(tree.axes)]
    by_place = np.argsort(places)
    assert (np.diff(cells[by_place]) >= 0).all()
    assert (np.diff(by_place)[np.diff(cells[by_place]) == 0] > 0).all()


def test_the_path_goes_from_cell_to_neighbour() -> None:
    tree = learned.cut_tree(at_means, unit(0, 4096))
    assert np.array_equal(np.sort(tree.ranks), np.arange(16))
    # The cells are about the squares of the second level: those in sequence touch.
    centres = learned._centres(2)[np.argsort(learned.square_places(tree, 2))]
    assert (np.abs(np.diff(centres, axis=0)) < 0.26).all()


def test_the_order_visits_cell_after_cell(net) -> None:
    points = family("gauss", 40_000)
    cells = net.cells(points)
    assert np.array_equal(np.unique(cells), np.arange(16))
    order = net.order(points)[4096:]  # after the sample
    # Squares are taken whole, so some points at a border come with the cell beside.
    assert (np.diff(cells[order]) != 0).sum() < 0.05 * len(order)
    parts = [part.mean() for part in np.array_split(cells[order], 20)]
    assert (np.diff(parts) > 0).all()
    assert parts[0] < 0.5
    assert parts[-1] > 14.5
    assert net.cells(points[:0]).shape == (0,)


def test_a_line_beside_a_piece_is_moved_into_it() -> None:
    def beside(points, pieces, count):
        return torch.zeros(count, dtype=torch.int64), torch.full((count,), 9.0).double()

    sample = unit(0, 1024)
    tree = learned.cut_tree(beside, sample)
    assert tree.axes[0] == int(np.ptp(sample[:, 1]) > np.ptp(sample[:, 0]))
    assert tree.offsets[0] == pytest.approx(sample[:, tree.axes[0]].mean())
    alike = learned.cut_tree(beside, np.full((600, 2), 0.25))
    assert np.array_equal(np.sort(alike.ranks), np.arange(len(alike.ranks)))


# --- the network and its training ---


def test_lines_move_with_their_pieces(net) -> None:
    points = torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pieces = torch.arange(200) % 2
    lines, logits = net(points, pieces, 3)
    assert lines.shape == (3, 2)
    assert torch.isfinite(lines).all(), "the third piece is empty"
    moved, same = net(points * 4 - 1, pieces, 3)
    torch.testing.assert_close(moved[:2], lines[:2] * 4 - 1, rtol=0, atol=1e-5)
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-5)
    mixed = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled, _ = net(points[mixed], pieces[mixed], 3)
    torch.testing.assert_close(shuffled, lines, rtol=0, atol=1e-6)


def test_its_cuts_beat_those_that_were_not_learned(net) -> None:
    from entropy_attn.benchmarks.entropy_net import ENTROPY_NET, gains

    pieces = training.random_pieces(net, 64, torch.Generator().manual_seed(5))
    found = gains(net, pieces)
    best = found.pop("the best of 50 lines")
    assert max(found, key=found.__getitem__) == ENTROPY_NET
    assert 0.9 * best < found[ENTROPY_NET] < best < np.log(2)


def test_the_gain_of_a_cut_by_hand() -> None:
    """Two ranges of two points each: a cut between them gains log 2, one through both nothing."""
    points = torch.tensor([[[0.0, 0], [0, 1], [9, 0], [9, 1]]]).double()
    anchors, alpha = torch.tensor([[[0.0, 0.5], [9, 0.5]]]).double(), torch.ones(1).double()
    inside = torch.ones(1, 4, dtype=torch.bool)
    pieces = training.Pieces(points, inside, anchors, alpha)
    sides = torch.tensor([[[0.0, 0, 1, 1]], [[0, 1, 0, 1]]]).double()
    gains = torch.cat([pieces.gain(each) for each in sides])
    torch.testing.assert_close(gains, torch.tensor([np.log(2), 0.0]), rtol=0, atol=1e-5)


def test_training_repeats_itself(tmp_path) -> None:
    first, again, other = (training.train(4, batch=4, seed=s, show=False) for s in (0, 0, 1))
    weights = first.state_dict()
    for name, value in weights.items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.of_pieces[2].weight, other.of_pieces[2].weight)
    first.save(tmp_path / "weights.safetensors")
    read = EntropyNet.from_file(tmp_path / "weights.safetensors").state_dict()
    assert weights.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in weights.items())


def test_the_weights_are_trained(net) -> None:
    """The loss of training on sets that it has not seen, and its gradient."""
    torch.manual_seed(0)
    fresh = EntropyNet()
    pieces = training.random_pieces(fresh, 32, torch.Generator().manual_seed(3))

    def gain(each: EntropyNet) -> torch.Tensor:
        return training.Cuts.of(each, pieces.points, pieces.inside).gain(pieces, 0.1).mean()

    assert gain(net) > gain(fresh) + 0.03
    gain(fresh).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fresh.parameters())


def test_the_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 50_000


def test_reading_the_weights_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    EntropyNet.pretrained()
    assert torch.equal(torch.rand(1), expected)


def test_the_command_that_makes_the_weights(tmp_path) -> None:
    out = tmp_path / "net.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "entropy_attn.geometry.train", "--steps", "2", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "gain" in done.stdout
    order = EntropyNet.from_file(out).order(unit(0, 500))
    assert np.array_equal(np.sort(order), np.arange(500))


def test_the_number_of_threads_comes_back_whoever_leaves_first(monkeypatch):
    monkeypatch.setattr(learned, "_THREADS", learned._Threads())  # of nobody yet
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = learned.one_thread(), learned.one_thread()
        with first:
            assert torch.get_num_threads() == 1
        first = learned.one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_weights_are_fp32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        net = ea.geometry.EntropyNet.pretrained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
