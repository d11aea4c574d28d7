"""EntropyRegularizer with two processes: what they learn together is what one learns alone."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from integration_models import build, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import entropy_attn as ea

WORLD = 2
STEPS = 3
# No warm-up: the steered weight counts from the second step on.
OPTIONS = {
    "target_density": 0.3, "block_size": 16, "layer_fraction": 1.0, "warmup_steps": 0, "rate": 0.3
}  # fmt: skip
LENGTH = 100


def batch_of(step: int, rank: int) -> Tensor:
    return tokens(1, LENGTH, seed=10 * step + rank)


def train(model: nn.Module, wrapped: nn.Module, regularizer, batches: list[list[Tensor]]) -> None:
    """A step for each list of micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for parts in batches:
        for ids in parts:
            loss = wrapped(ids, labels=ids, use_cache=False).loss + regularizer.penalty()
            (loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        regularizer.step()


def make(fraction: float):
    model = build("llama").double().train()
    return model, ea.EntropyRegularizer(model, tile_fraction=fraction, **OPTIONS)


def run(rank: int, port: int, kind: str, fraction: float, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    model, regularizer = make(fraction)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        if kind == "fsdp, checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
    train(model, wrapped, regularizer, [[batch_of(step, rank)] for step in range(STEPS)])
    parameters = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in model.named_parameters()
    }
    stats = regularizer.stats()
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    torch.save((saved, stats.density, stats.weight), f"{folder}/{rank}.pt")
    dist.barrier()  # one that leaves first breaks the other off
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, checkpointing"])
def test_two_processes_learn_what_one_does(kind, fraction, tmp_path):
    mp.spawn(run, (free_port(), kind, fraction, str(tmp_path)), nprocs=WORLD)
    (first, density, weight), second = (torch.load(tmp_path / f"{r}.pt") for r in range(WORLD))
    assert (density, weight) == second[1:]

    model, regularizer = make(fraction)
    batches = [[batch_of(step, rank) for rank in range(WORLD)] for step in range(STEPS)]
    train(model, model, regularizer, batches)
    assert density == pytest.approx(regularizer.stats().density, rel=1e-5)
    assert weight == pytest.approx(regularizer.stats().weight, rel=1e-4)
    assert weight > 0
    start = dict(build("llama").double().named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(first[name], second[0][name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], p.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(p.detach(), start[name])
