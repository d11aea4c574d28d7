"""EntropyNet: a small set network that cuts a set of points in two, again and again.

It looks at one piece of a set and answers with a line across or along. Both sides are pieces again,
so the same weights make a k-d tree of cells (`learned_order`). Training makes each line lower the
range-partition entropy of the two sides as far as it can (`entropy_attn.geometry.train`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entropy_attn.geometry.learned_order import learned_cells, learned_order
from entropy_attn.geometry.points import check_seed, finite_points, sortable

WEIGHTS = Path(__file__).with_name("entropy_net.safetensors")
_WIDTH = 32


class EntropyNet(nn.Module):
    """Where to cut each piece of a set: a network for points, pooling, a network for pieces.

    A piece is seen relative to its mean and its root mean square radius, so moving and scaling a
    set moves and scales its lines. Pooling is by mean and maximum: the order of points says
    nothing. New networks are random; `EntropyNet.pretrained` has the weights of the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_points = nn.Sequential(
            nn.Linear(2, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU()
        )
        self.of_pieces = nn.Sequential(
            nn.Linear(2 * _WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 3)
        )

    @classmethod
    def pretrained(cls) -> EntropyNet:
        """The network with the weights that come with the package, for inference.

        Raises:
            ImportError: safetensors is not installed.
        """
        return cls.from_file(WEIGHTS)

    @classmethod
    def from_file(cls, path: Path | str) -> EntropyNet:
        """The network with weights from a safetensors file, as `save` writes it, for inference."""
        with torch.random.fork_rng(devices=[]):  # what it starts with is random, and replaced
            net = cls().to("cpu", torch.float32)  # whatever the caller's defaults are
        net.load_state_dict(_safetensors().load_file(path))
        return net.eval().requires_grad_(False)

    def save(self, path: Path | str) -> None:
        """Write the weights as safetensors."""
        _safetensors().save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path)

    def forward(self, points: Tensor, pieces: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Two lines for each piece, and which of them to take.

        Args:
            points: (m, 2) float64.
            pieces: (m,) int64, the piece of each point, from 0 to count - 1; pieces may be empty.
            count: number of pieces.

        Returns:
            lines: (count, 2) float64, the lines {x : x[0] = lines[0]} and {x : x[1] = lines[1]}.
            logits: (count,) float64, above 0 where the second is the better one.
        """
        sizes = points.new_zeros(count).index_add(0, pieces, points.new_ones(len(points)))
        sizes = sizes.clamp(min=1)[:, None]

        def mean(values: Tensor) -> Tensor:
            sums = values.new_zeros(count, values.shape[1]).index_add(0, pieces, values)
            return sums / sizes.to(values.dtype)

        centre = mean(points)
        moved = points - centre[pieces]
        radius = mean(moved.square()).sum(1, keepdim=True).sqrt()
        radius = torch.where(radius > 0, radius, 1.0)
        seen = self.of_points((moved / radius[pieces]).float())
        most = seen.new_zeros(count, _WIDTH).scatter_reduce(
            0, pieces[:, None].expand_as(seen), seen, "amax"
        )
        said = self.of_pieces(torch.cat((mean(seen), most), 1)).double()
        return centre + radius * said[:, :2].tanh(), said[:, 2]

    def cut(self, points: Tensor, pieces: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The better line of each piece: axes (count,) int64 and offsets (count,) float64."""
        lines, logits = self(points, pieces, count)
        axes = (logits > 0).long()
        return axes, lines.gather(1, axes[:, None])[:, 0]

    def order(self, points: Any, *, seed: int = 0) -> np.ndarray:
        """`entropy_order` by the cells of this network.

        Args:
            points: (n, 2) floats or integers, n below 2^32.
            seed: of the sample that the network sees.

        Returns:
            (n,) int64: take ``points[order]``.

        Raises:
            TypeError, ValueError: an argument is not allowed; the message names it.
        """
        return learned_order(self.cut, sortable(finite_points(points, dims=(2,))), check_seed(seed))

    def cells(self, points: Any, *, seed: int = 0) -> np.ndarray:
        """(n,) int64, the cell of each point; cells are numbered along the path of `order`.

        The order takes squares of a curve to cells, so at a border a point may come with its
        neighbour.

        Args:
            points, seed: see `order`.
        """
        return learned_cells(self.cut, finite_points(points, dims=(2,)), check_seed(seed))


@cache
def pretrained() -> EntropyNet:
    """`EntropyNet.pretrained`, read once."""
    return EntropyNet.pretrained()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "the weights of EntropyNet are in a safetensors file: pip install safetensors"
        ) from error
    return safetensors.torch
