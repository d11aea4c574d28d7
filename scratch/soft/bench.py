"""Variants of the range entropy kernels on one GPU, beside the kernels as they were.

Names of variants: rows x warps, stages, tma = copy engine, f = no first kernel, o = the last kernel
starts early, 96r = at most 96 registers a thread, then programs.

    PYTHONUNBUFFERED=1 python3 scratch/soft/bench.py [--seconds 0.5] [--only bfloat16.forward,...]

First all variants are compiled by processes of their own. Then for each dtype and direction: the
time of the whole op with a cold L2, interleaved with a copy; its bytes over its time as a share of
the copy's bandwidth, as the suite counts; its worst error over what the tolerance rule allows
(below 1 is good; plain PyTorch is fp32 throughout, as in the suite); then the time line of the
kernels inside the op for the best variant and the old one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
START = time.perf_counter()
N, D, K = 1_000_000, 64, 64


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f}] {text}", flush=True)


def variants() -> dict[str, dict[str, object]]:
    """By "dtype.direction": the configurations by name; None is that of the old kernels."""
    from entropy_attn.kernels.range_primitives import RangeConfig as C

    found: dict[str, dict[str, object]] = {}
    #         rows k  d  out warps stages programs
    plain = C(64, 64, 64, 0, 4, 4, 528, fast=True)
    tma = replace(plain, copy_engine=True)
    best = replace(tma, fused=True, overlap=True)
    found["bfloat16.forward"] = {
        "old": None,
        "old shape": C(128, 64, 64, 0, 8, 3, 264, terms=3),
        "old shape, 2 terms": C(128, 64, 64, 0, 8, 3, 264),
        "old shape, 2 terms, fast": C(128, 64, 64, 0, 8, 3, 264, fast=True),
        "64x4 s4": plain,
        "64x4 s4 f 128r": replace(plain, fused=True, registers=128),
        "64x4 s4 fo 128r": replace(plain, fused=True, overlap=True, registers=128),
        "64x4 s4 tma": tma,
        "64x4 s4 tma f": replace(tma, fused=True),
        "64x4 s4 tma fo": best,
        "64x4 s3 tma fo 3 terms": replace(best, terms=3, num_stages=3, registers=128),
        "64x4 s3 tma fo": replace(best, num_stages=3),
        "64x4 s5 tma fo 396": replace(best, num_stages=5, programs=396),
        "64x4 s6 tma fo 396": replace(best, num_stages=6, programs=396),
        "64x4 s3 tma fo 96r 660": replace(best, registers=96, programs=660, num_stages=3),
        "64x4 s3 fo 96r 660": replace(
            best, registers=96, programs=660, copy_engine=False, num_stages=3
        ),
        "128x8 s3 tma fo": replace(best, block_m=128, num_warps=8, num_stages=3, programs=264),
        "128x8 s4 tma fo": replace(best, block_m=128, num_warps=8, programs=264),
        "128x8 s3 tma fo 80r 396": replace(
            best, block_m=128, num_warps=8, num_stages=3, registers=80, programs=396
        ),
        "128x4 s3 tma fo 168r 396": replace(
            best, block_m=128, num_stages=3, registers=168, programs=396
        ),
        "128x4 s4 tma fo 264": replace(best, block_m=128, programs=264),
        "256x8 s3 tma fo 132": replace(
            best, block_m=256, num_warps=8, num_stages=3, programs=132
        ),
    }
    plain = C(64, 64, 64, 64, 4, 3, 264, fast=True)
    tma = replace(plain, copy_engine=True)
    best = replace(tma, fused=True, overlap=True)
    found["bfloat16.backward"] = {
        "old": None,
        "64x4 s2 3 terms": replace(plain, terms=3, num_stages=2),
        "64x4 s2": replace(plain, num_stages=2),
        "64x4 s3": plain,
        "64x4 s3 fo": replace(plain, fused=True, overlap=True),
        "64x4 s4 fo": replace(plain, fused=True, overlap=True, num_stages=4),
        "64x4 s3 fo 168r 396": replace(best, copy_engine=False, registers=168, programs=396),
        "64x4 s3 tma": tma,
        "64x4 s2 tma fo": replace(best, num_stages=2),
        "64x4 s3 tma fo": best,
        "64x4 s3 tma fo 3 terms": replace(best, terms=3),
        "64x4 s3 tma fo unrounded": replace(best, unrounded=True),
        "64x4 s3 tma fo 168r 396 unrounded": replace(
            best, registers=168, programs=396, unrounded=True
        ),
        "64x4 s4 tma fo": replace(best, num_stages=4),
        "64x4 s3 tma 168r 396": replace(tma, registers=168, programs=396),
        "64x4 s3 tma fo 168r 396": replace(best, registers=168, programs=396),
        "64x4 s4 tma fo 168r 396": replace(best, registers=168, programs=396, num_stages=4),
        "64x4 s2 tma fo 168r 396": replace(best, registers=168, programs=396, num_stages=2),
        "128x8 s3 tma fo 132": replace(best, block_m=128, num_warps=8, programs=132),
        "128x8 s3 tma fo 128r 264": replace(
            best, block_m=128, num_warps=8, registers=128, programs=264
        ),
    }
    plain = C(64, 64, 64, 0, 4, 3, 396, fast=True)
    tma = replace(plain, copy_engine=True)
    best = replace(tma, fused=True, overlap=True)
    found["float32.forward"] = {
        "old": None,
        "old shape": replace(plain, fast=False, registers=168),
        "64x4 s3": replace(plain, registers=168),
        "64x4 s3 fo": replace(best, copy_engine=False, registers=168),
        "64x4 s4 fo 264": replace(best, copy_engine=False, num_stages=4, programs=264),
        "64x4 s2 fo 128r 528": replace(
            best, copy_engine=False, num_stages=2, programs=528, registers=128
        ),
        "64x4 s3 tma": tma,
        "64x4 s3 tma fo": replace(best, registers=168),
        "64x4 s4 tma fo 264": replace(best, num_stages=4, programs=264),
        "64x4 s2 tma fo 128r 528": replace(best, num_stages=2, programs=528, registers=128),
        "128x8 s3 tma fo 132": replace(best, block_m=128, num_warps=8, programs=132),
        "128x8 s2 tma fo 128r 264": replace(
            best, block_m=128, num_warps=8, num_stages=2, registers=128, programs=264
        ),
    }
    plain = C(64, 64, 64, 64, 4, 3, 264, fast=True)
    tma = replace(plain, copy_engine=True)
    best = replace(tma, fused=True, overlap=True)
    found["float32.backward"] = {
        "old": None,
        "64x4 s1": replace(plain, num_stages=1),
        "64x4 s2": replace(plain, num_stages=2),
        "64x4 s3": plain,
        "64x4 s3 fo": replace(plain, fused=True, overlap=True),
        "64x4 s4 fo": replace(plain, fused=True, overlap=True, num_stages=4),
        "64x4 s3 tma": tma,
        "64x4 s2 tma fo": replace(best, num_stages=2),
        "64x4 s3 tma fo": best,
        "64x4 s2 168r 396": replace(plain, num_stages=2, registers=168, programs=396),
        "32x4 s3 168r 396": replace(plain, block_m=32, registers=168, programs=396),
        "32x4 s3 fo 264": replace(best, block_m=32, copy_engine=False),
        "128x8 s2 tma fo 132": replace(best, block_m=128, num_warps=8, num_stages=2, programs=132),
    }
    return found


def modules(config):
    """The (forward, backward) modules that run a configuration."""
    if config is None:
        import old_range_entropy as forward
        import old_range_gradients as backward
    else:
        from entropy_attn.kernels import range_entropy as forward
        from entropy_attn.kernels import range_gradients as backward
    return forward, backward


def inputs(dtype: str, n: int = N, d: int = D, k: int = K):
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    points = torch.randn(1, 1, n, d, device="cuda", generator=generator).to(getattr(torch, dtype))
    # As the suite has them: rounded like the points, in their dtype.
    anchors = torch.randn(1, 1, k, d, device="cuda", generator=generator).to(points.dtype)
    return points, anchors, torch.full((1, 1), 0.5 / d, device="cuda")


def calls(which: str, configs: dict, given) -> dict:
    """By name, a function that runs the op once."""
    import torch

    points, anchors, alpha = given
    forward, _ = modules(None)
    entropy, mass, lse, _ = forward.range_mass(points, anchors, alpha, None, False)
    one = torch.ones_like(entropy)

    def call(config):
        forward, backward = modules(config)
        if which.endswith("forward"):
            return lambda: forward.range_mass(points, anchors, alpha, None, False, config)
        return lambda: backward.range_gradients(
            one, points, anchors, alpha, None, entropy, mass, lse, True, True, False, config
        )

    return {name: call(config) for name, config in configs.items()}


def compile_one(task: tuple[str, str]) -> tuple[str, str, str]:
    """In a process of its own: run a variant on few points, which leaves it in Triton's cache."""
    import torch

    which, name = task
    try:
        given = inputs(which.split(".")[0], n=4096)
        calls(which, {name: variants()[which][name]}, given)[name]()
        torch.cuda.synchronize()
    except Exception as error:
        return which, name, f"{type(error).__name__}: {str(error)[:160]}"
    return which, name, ""


def reference(given):
    """entropy, dx, dc, dalpha of the definition in fp64 and in fp32, and magnitudes, as the suite."""
    import torch

    from entropy_attn.benchmarks.suites.entropy import definition

    def results(dtype):
        leaves = [t[0, 0].detach() for t in given]
        leaves = [t.to(dtype).requires_grad_() for t in leaves]
        value = definition(*leaves, dtype=dtype)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    exact, plain = results(torch.float64), results(torch.float32)
    with torch.no_grad():
        points, anchors, alpha = (t[0, 0].double() for t in given)
        distances = torch.cdist(points, anchors).square()
        p = (-alpha * distances).softmax(-1)
        surprise = -p.mean(-2).log()
        flow = p * (surprise - (p * surprise).sum(-1, keepdim=True)).abs()
        size = (flow * distances).sum(-1).mean().item()
    # Plain gradients come back in the dtype of what they are gradients of.
    plain[1:] = [g.to(t.dtype) for g, t in zip(plain[1:], given, strict=True)]
    return exact, plain, [0.0, 0.0, 0.0, size]


def ratio(got, plain, exact, magnitude: float) -> float:
    """The error over what is allowed, the worse of the largest and the root mean square."""
    import torch

    from entropy_attn.testing import rounding

    got, dtype = got.reshape(exact.shape), got.dtype
    slack = rounding(exact.double(), dtype) + torch.finfo(torch.float32).eps * magnitude
    error, allowed = ((t.double() - exact).abs() for t in (got, plain))
    if not torch.isfinite(error).all():
        return float("inf")
    kinds = (lambda t: t.max(), lambda t: t.square().mean().sqrt())
    return max((kind(error) / (2 * kind(allowed) + slack)).item() for kind in kinds)


def timeline(call, cold) -> str:
    """Kernels of one call in the order of their start: microseconds, and the gaps between."""
    import statistics

    import torch
    from torch.profiler import ProfilerActivity, profile

    runs = 12
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            cold.zero_()
            torch.cuda._sleep(1_000_000)
            call()
        torch.cuda.synchronize()
    found = sorted(
        (e.start_ns(), e.duration_ns(), e.name())
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    )
    rounds: list[list] = []
    for start, duration, name in found:
        if "spin" in name or "sleep" in name.lower():
            rounds.append([])
        elif rounds and not ("FillFunctor" in name or "emset" in name):
            rounds[-1].append((start, duration, name))
    rounds = [r for r in rounds[2:] if len(r) == len(rounds[-1])]
    if not rounds:
        return "no kernels seen: " + ", ".join(sorted({n[:40] for *_, n in found}))
    parts = []
    for i in range(len(rounds[-1])):
        if i:
            gap = statistics.median(r[i][0] - r[i - 1][0] - r[i - 1][1] for r in rounds)
            parts.append(f"gap {gap / 1e3:.1f}")
        parts.append(f"{rounds[-1][i][2][:24]} {statistics.median(r[i][1] for r in rounds) / 1e3:.1f}")
    whole = statistics.median(r[-1][0] + r[-1][1] - r[0][0] for r in rounds)
    return " | ".join(parts) + f" | first to last {whole / 1e3:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    options = parser.parse_args()
    every = variants()
    if options.only:
        every = {w: v for w, v in every.items() if w in options.only.split(",")}
    tasks = [(which, name) for which, configs in every.items() for name in configs]
    unfinished = set(tasks)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = pool.imap_unordered(compile_one, tasks)
        while unfinished:
            try:
                which, name, error = results.next(timeout=50)
            except multiprocessing.TimeoutError:
                break  # one hangs
            unfinished.discard((which, name))
            if error:
                say(f"left out {which} {name}: {error}")
                del every[which][name]
    for which, name in unfinished:
        say(f"left out {which} {name}: it did not end")
        del every[which][name]
    say(f"compiled {len(tasks)} variants")

    import torch

    from entropy_attn.benchmarks.timing import measure

    out = open(Path(os.environ.get("OUT", ".")) / "soft.jsonl", "a")
    device = torch.cuda.get_device_properties(0)
    cold = torch.empty(4 * device.L2_cache_size, dtype=torch.uint8, device="cuda")
    say(f"{device.name}, torch {torch.__version__}")

    def record(**entries) -> None:
        out.write(json.dumps({"gpu": device.name, **entries}) + "\n")
        out.flush()

    given = known = None
    for which, configs in every.items():
        dtype, direction = which.split(".")
        if given is None or str(given[0].dtype) != f"torch.{dtype}":
            given = known = None
            given = inputs(dtype)
            known = reference(given)
            torch.cuda.empty_cache()
        functions = calls(which, configs, given)
        ratios = {}
        for name, function in functions.items():
            got = function()
            got = [got[0]] if direction == "forward" else list(got[:3])
            place = slice(0, 1) if direction == "forward" else slice(1, 4)
            ratios[name] = [ratio(*each) for each in zip(got, *(k[place] for k in known[1::-1]), known[2][place], strict=True)]
        target = torch.empty_like(given[0])
        functions["copy"] = lambda: target.copy_(given[0])
        timings = measure({n: [f] for n, f in functions.items()}, seconds=options.seconds)
        size = given[0].numel() * given[0].element_size()
        copied = 2 * size / timings["copy"].median_ms
        say(f"{which}: copy {copied / 1e6:.0f} GB/s, {timings['copy'].rounds} rounds")
        order = sorted(configs, key=lambda name: timings[name].median_ms)
        for name in order:
            t = timings[name]
            moved = size if direction == "forward" else 2 * size
            share = moved / t.median_ms / copied
            errors = " ".join(f"{r:.2f}" for r in ratios[name])
            say(
                f"  {name:34} {t.median_ms * 1e3:7.1f} us ({t.p20_ms * 1e3:.1f} to "
                f"{t.p80_ms * 1e3:.1f})  {share:5.1%} of the copy   error/allowed {errors}"
            )
            record(
                which=which, variant=name, median_us=t.median_ms * 1e3, p20_us=t.p20_ms * 1e3,
                p80_us=t.p80_ms * 1e3, bandwidth=share, copy_gb_s=copied / 1e6,
                error_over_allowed=ratios[name],
                config=None if configs[name] is None else asdict(configs[name]),
            )  # fmt: skip
        for name in dict.fromkeys((*order[:2], "old")):
            try:
                line = timeline(functions[name], cold)
            except Exception as error:
                line = f"{type(error).__name__}: {error}"
            say(f"  {name}: {line}")
            record(which=which, variant=name, timeline=line)
        target = functions = None
    others(record)
    say("done")


def others(record) -> None:
    """The default configuration beside the old kernels on other shapes, small ones too."""
    from entropy_attn.benchmarks.timing import measure

    shapes = [("float32", 1_000_000, 3, 64), ("bfloat16", 20_000, 64, 64), ("float32", 20_000, 16, 16)]
    for dtype, n, d, k in shapes:
        if time.perf_counter() - START > 80:
            say("no time left for other shapes")
            return
        given = inputs(dtype, n, d, k)
        for direction in ("forward", "backward"):
            functions = calls(direction, {"old": None}, given)
            points, anchors, alpha = given
            forward, backward = modules(0)
            if direction == "forward":
                functions["new"] = lambda: forward.range_mass(points, anchors, alpha, None, False)
            else:
                import torch

                saved = forward.range_mass(points, anchors, alpha, None, False)
                one = torch.ones_like(saved[0])
                functions["new"] = lambda: backward.range_gradients(
                    one, *given, None, *saved[:3], True, True, False
                )
            timings = measure({n: [f] for n, f in functions.items()}, seconds=0.2)
            text = ", ".join(f"{name} {t.median_ms * 1e3:.1f} us" for name, t in timings.items())
            say(f"n={n} d={d} k={k} {dtype} {direction}: {text}")
            record(shape=[dtype, n, d, k], direction=direction, **{n: t.median_ms for n, t in timings.items()})


if __name__ == "__main__":
    main()
