"""Train EntropyNet, from nothing, in a few minutes on a CPU:

    python -m entropy_attn.geometry.train

writes the weights that come with the package, `entropy_net.safetensors` (``--out`` for another
place). The same seed gives the same weights on the same machine and versions.

A piece of a set has ranges: balls around some of its points. An order that passes through one side
of the network's line and then through the other has, seen through windows that are the two sides,
the entropy ``sum_side share(side) H(side)`` (`soft_order_entropy`, its windows learned), H the
range-partition entropy of a side (`range_entropy`, points weighted by how far they belong to
it). That is the loss, relative to H of the whole piece: a line lowers it by at most log 2, if it
halves the set and tears no range.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entropy_attn.geometry.entropy_net import WEIGHTS, EntropyNet
from entropy_attn.geometry.learned_order import one_thread
from entropy_attn.partition import range_entropy
from entropy_attn.partition.anchors import median_alpha

# Points of a set, ranges of a piece, and the least points of a piece that is learned from.
_POINTS, _RANGES, _LEAST = 256, 16, 32
# A training set is cut this often before the piece that is learned from, at most.
_CUTS = 3


@dataclass(frozen=True)
class Pieces:
    """Pieces of different sets, one a row.

    Attributes:
        points: (batch, n, 2) float64. inside: (batch, n) bool, which points belong to the piece.
        anchors: (batch, k, 2) float64 centres of the ranges. alpha: (batch,) their sharpness.
    """

    points: Tensor
    inside: Tensor
    anchors: Tensor
    alpha: Tensor

    @classmethod
    def of(cls, points: Tensor, inside: Tensor, generator: torch.Generator) -> Pieces:
        """With ranges around random points of each piece: dense parts have more of them."""
        draws = torch.rand(inside.shape, generator=generator, dtype=torch.float64)
        chosen = torch.where(inside, draws, -1.0).topk(_RANGES, 1).indices
        anchors = points.gather(1, chosen[..., None].expand(-1, -1, 2))
        alphas = [median_alpha(x[m], a) for x, m, a in zip(points, inside, anchors, strict=True)]
        return cls(points, inside, anchors, torch.tensor(alphas, dtype=torch.float64))

    def entropy(self, weights: Tensor) -> Tensor:
        """(batch,) range-partition entropy of the points with these weights (batch, n)."""
        return range_entropy(
            self.points.float(), self.anchors.float(), self.alpha.float(), weights.float()
        )

    def gain(self, sides: Tensor) -> Tensor:
        """(batch,) nats by which a cut lowers the entropy.

        Args:
            sides: (batch, n) how far a point belongs to the second side, 0 to 1.
        """
        weights = self.inside.double()
        second, first = weights * sides, weights * (1 - sides)
        share = second.sum(1) / weights.sum(1)
        after = share * self.entropy(second) + (1 - share) * self.entropy(first)
        return self.entropy(weights) - after


@dataclass(frozen=True)
class Cuts:
    """What a network says of pieces.

    Attributes:
        distances: (batch, n, 2) signed distances of the points to both lines, over the radius of
            their piece.
        second: (batch,) how far the second line is taken, 0 to 1.
    """

    distances: Tensor
    second: Tensor

    @classmethod
    def of(cls, net: EntropyNet, points: Tensor, inside: Tensor) -> Cuts:
        pieces = torch.arange(len(points))[:, None].expand_as(inside)[inside]
        lines, logits = net(points[inside], pieces, len(points))
        weights = inside.double()[..., None]
        mean = (points * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        moved = (points - mean) * weights
        radius = (moved.square().sum((1, 2)) / weights.sum((1, 2))).sqrt().clamp(min=1e-12)
        return cls((points - lines[:, None]) / radius[:, None, None], torch.sigmoid(logits))

    def gain(self, pieces: Pieces, softness: float) -> Tensor:
        """(batch,) nats by which the lines lower the entropy, each as far as it is taken."""
        first, second = (
            pieces.gain(torch.sigmoid(each / softness)) for each in self.distances.unbind(-1)
        )
        return (1 - self.second) * first + self.second * second

    def sides(self) -> Tensor:
        """(batch, n) bool, the points beyond the better line."""
        better = (self.second > 0.5).long()[:, None, None].expand(*self.distances.shape[:2], 1)
        return self.distances.gather(2, better)[..., 0] > 0


def random_sets(count: int, generator: torch.Generator) -> Tensor:
    """(count, n, 2) float64: boxes, normal clouds, clusters, rings, waves and lattices, turned and
    stretched at random."""
    return torch.stack([_random_set(generator) for _ in range(count)])


def _random_set(generator: torch.Generator) -> Tensor:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind = int(torch.randint(6, (), generator=generator))
    along = 2 * math.pi * uniform(_POINTS)
    if kind == 0:
        points = uniform(_POINTS, 2)
    elif kind == 1:
        points = normal(_POINTS, 2)
    elif kind == 2:
        count = int(torch.randint(2, 13, (), generator=generator))
        shares = uniform(count) + 0.1
        member = torch.multinomial(shares, _POINTS, replacement=True, generator=generator)
        spread = 0.02 + 0.15 * uniform(count, 1)
        points = uniform(count, 2)[member] + spread[member] * normal(_POINTS, 2)
    elif kind == 3:
        points = torch.stack((along.cos(), along.sin()), 1) * (1 + 0.1 * normal(_POINTS, 1))
    elif kind == 4:
        wave = (1 + 3 * uniform(1)) * along / 2 + 6 * uniform(1)
        points = torch.stack((along / 4, wave.sin()), 1) + 0.05 * normal(_POINTS, 2)
    else:
        points = (12 * uniform(_POINTS, 2)).round() + 0.02 * normal(_POINTS, 2)
    turn = 2 * math.pi * uniform(1)
    c, s = turn.cos(), turn.sin()
    stretch = torch.stack((torch.ones(1).double(), 0.2 + 0.8 * uniform(1)), 1)
    return (points * stretch) @ torch.stack((torch.cat((c, -s)), torch.cat((s, c))))


def random_pieces(net: EntropyNet, count: int, generator: torch.Generator) -> Pieces:
    """Pieces as the network itself makes them: sets after some of its cuts, sides at random."""
    points = random_sets(count, generator)
    inside = torch.ones(points.shape[:2], dtype=torch.bool)
    cuts = torch.randint(_CUTS + 1, (count,), generator=generator)
    with torch.no_grad():
        for turn in range(_CUTS):
            side = torch.randint(2, (count, 1), generator=generator) > 0
            smaller = inside & (Cuts.of(net, points, inside).sides() == side)
            is_cut = (turn < cuts) & (smaller.sum(1) >= _LEAST)
            inside = torch.where(is_cut[:, None], smaller, inside)
    return Pieces.of(points, inside, generator)


def train(
    steps: int = 1500, batch: int = 32, rate: float = 3e-3, seed: int = 0, show: bool = True
) -> EntropyNet:
    """A trained network. Lines start soft, over a third of a piece's radius, and end sharp."""
    torch.manual_seed(seed)
    with one_thread():
        return _train(steps, batch, rate, seed, show)


def _train(steps: int, batch: int, rate: float, seed: int, show: bool) -> EntropyNet:
    generator = torch.Generator().manual_seed(seed)
    net = EntropyNet()
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        pieces = random_pieces(net, batch, generator)
        softness = 0.3 * 0.1 ** (step / steps)
        gain = Cuts.of(net, pieces.points, pieces.inside).gain(pieces, softness).mean()
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
        schedule.step()
        recent = gain.item() if step == 0 else 0.98 * recent + 0.02 * gain.item()
        if show and (step % 100 == 99 or step == steps - 1):
            spent = time.perf_counter() - began
            print(f"step {step + 1}: gain {recent:.3f} of {math.log(2):.3f} nats, {spent:.0f} s")
    return net.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train EntropyNet and write its weights.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.steps, seed=options.seed).save(options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
