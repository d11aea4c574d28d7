"""Correctness, then speed, of the Hopper forward kernel beside the portable one.

    PYTHONUNBUFFERED=1 python3 scratch/hopper/bench.py [--variants] [--only WORD] [--skip-checks]

Cases run in worker processes that print one JSON line a case; a worker that is silent for 25 s is
killed and the next case starts in a fresh one. Checks run in parallel (they mostly compile, into
a shared cache), timings alone. Results: JSON lines in $OUT/hopper.jsonl.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SILENCE = 25.0  # seconds
START = time.time()

BLOCKS = ((128, 128), (128, 64), (64, 64))
KINDS = [(dim, block) for block in BLOCKS for dim in (128, 64)]


def check_cases(dim, block):
    """Small problems; each entry is what differs from the defaults of `check`."""
    tag = f"D={dim} {block[0]}x{block[1]}"
    cases = [
        dict(note="plain"),
        dict(note="large scores", sharp=8.0),
        dict(note="many items", batch=2, heads=16, kv_heads=4, q_len=4096, kv_len=4096),
        dict(note="causal", is_causal=True),
        dict(note="odd lengths", q_len=1000, kv_len=911),
        dict(note="causal, odd, more queries than keys", is_causal=True, q_len=1031, kv_len=777),
        dict(note="causal, odd, more keys than queries", is_causal=True, q_len=333, kv_len=1500),
        dict(note="one query, few keys", q_len=1, kv_len=7, density=1.0),
        dict(note="dense", lists=False),
        dict(note="causal, dense, many", lists=False, is_causal=True, q_len=2048, kv_len=2048),
    ]
    if dim == 128 and block != (64, 64):
        cases.append(dict(note="fp16, causal", dtype="float16", is_causal=True, sharp=4.0))
        cases.append(dict(note="D=80", dim=80))
    return [dict(kind="check", tag=tag, dim=case.get("dim", dim), block=block) | case
            for case in cases]  # fmt: skip


def time_cases(variants):
    cases = []

    def add(dim, block, density, **more):
        case = dict(kind="time", dim=dim, block=block, density=density, batch=2, heads=16,
                    length=16384, irregular=False, is_causal=False, names=["default"])  # fmt: skip
        case |= more
        case["tag"] = f"D={dim} {block[0]}x{block[1]}"
        case["note"] = (
            f"N={case['length']} density {density}"
            + (" irregular" if case["irregular"] else "")
            + (" causal" if case["is_causal"] else "")
        )
        cases.append(case)

    names = ["default"]
    if variants:
        names += MODES
    add(128, (128, 128), 0.25, names=names)
    add(64, (128, 128), 0.25, names=names)
    add(128, (128, 128), 0.5)
    add(128, (128, 128), 0.1)
    add(128, (128, 128), 0.25, irregular=True)
    add(128, (128, 128), 0.25, length=4096)
    add(128, (128, 64), 0.25)
    add(64, (128, 128), 0.5)
    add(64, (128, 128), 0.1)
    add(128, (64, 64), 0.25)
    add(64, (64, 64), 0.25, names=["default", *PAIRS] if variants else ["default"])
    add(64, (128, 64), 0.25)
    add(128, (128, 128), 0.25, length=2048)
    add(128, (128, 128), 0.25, length=4096, irregular=True, batch=1)
    add(64, (128, 128), 0.25, length=4096)
    add(128, (128, 128), 1.0, length=8192)
    add(128, (128, 128), 0.5, is_causal=True)
    add(64, (128, 128), 0.5, is_causal=True)
    return cases


MODES = ["plain", "pp", "pp+qreg", "pp+pin", "pin", "qreg+pin", "pp+qreg+pin"]
PAIRS = ["n128", "n128+qreg+pin", "3 programs"]


def compile_cases(variants):
    """What the timings need compiled, so that no compilation counts as silence."""
    cases = []
    for dim, block in KINDS:
        tag = f"D={dim} {block[0]}x{block[1]}"
        names = [["portable", "portable causal"]]
        if variants and block == (128, 128):
            names += [MODES[:4], MODES[4:]]
        if variants and (dim, block) == (64, (64, 64)):
            names += [PAIRS]
        cases += [dict(kind="compile", tag=tag, note="compile " + " ".join(n), dim=dim, block=block,
                       names=n) for n in names]  # fmt: skip
    return cases


VARIANTS = {  # changes to the default
    "plain": dict(ping_pong=False, query_registers=False, pin=False),
    "pp": dict(ping_pong=True, query_registers=False, pin=False),
    "pp+qreg": dict(ping_pong=True, query_registers=True, pin=False),
    "pp+pin": dict(ping_pong=True, query_registers=False, pin=True),
    "pin": dict(ping_pong=False, query_registers=False, pin=True),
    "qreg+pin": dict(ping_pong=False, query_registers=True, pin=True),
    "pp+qreg+pin": dict(ping_pong=True, query_registers=True, pin=True),
    "3 programs": dict(programs=3, stages=2),
    "n128": dict(block_n=128, stages=2),
    "n128+qreg+pin": dict(block_n=128, stages=2, query_registers=True, pin=True),
}


# Worker


def check(case):
    import torch

    from entropy_attn.kernels.hopper.forward import hopper_forward
    from entropy_attn.masks import BlockMask

    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30 + 7)

    torch.empty = poisoned
    case = dict(batch=2, heads=4, kv_heads=2, q_len=1024, kv_len=1024, density=0.4, sharp=1.0,
                dtype="bfloat16", is_causal=False, lists=True) | case  # fmt: skip
    dtype, dim, block = getattr(torch, case["dtype"]), case["dim"], tuple(case["block"])
    batch, heads, q_len, kv_len = (case[k] for k in ("batch", "heads", "q_len", "kv_len"))
    query = torch.randn(batch, q_len, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    query = query * case["sharp"]
    key, value = (torch.randn(batch, case["kv_heads"], kv_len, dim, device="cuda", dtype=dtype)
                  for _ in range(2))  # fmt: skip
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    if case["lists"]:
        # Every row its own share of blocks, some empty, some with all.
        share = torch.rand(batch, heads, rows, 1, device="cuda") * 2 * case["density"]
        dense = torch.rand(batch, heads, rows, columns, device="cuda") < share
        if rows > 3:
            dense[:, 0, 1] = False
            dense[:, -1, -1] = False
            dense[:, 1, 2] = True
        if case["density"] == 1.0:
            dense[:] = True
        mask = BlockMask.from_dense(dense, block, q_len, kv_len)
        counts, indices = mask.kv_num_blocks, mask.kv_indices
    else:
        mask = BlockMask.full(batch, heads, q_len, kv_len, block, device="cuda")
        counts = indices = None
    scale = dim**-0.5
    out, lse = hopper_forward(query, key, value, counts, indices, block, case["is_causal"], scale)
    torch.cuda.synchronize()

    group = heads // case["kv_heads"]
    visible = mask.to_token_mask(is_causal=case["is_causal"], max_elements=1 << 31)
    k, v = (t.float().repeat_interleave(group, 1) for t in (key, value))
    worst = dict(out=0.0, own=0.0, lse=0.0, largest=0.0)
    wrong_empty = bad = 0
    for b in range(batch):
        scores = (query[b].float() @ k[b].transpose(-1, -2)) * scale
        seen = visible[b % visible.shape[0]].expand_as(scores)
        scores = scores.masked_fill(~seen, float("-inf"))
        true_lse = scores.logsumexp(-1)
        p = torch.softmax(scores, -1).nan_to_num(0.0)
        truth = p @ v[b]
        own = (p.to(dtype).float() @ v[b]).to(dtype).float()
        unseen = ~seen.any(-1)
        bad += int((~torch.isfinite(out[b])).sum())
        worst["out"] = max(worst["out"], (out[b].float() - truth).abs().max().item())
        worst["own"] = max(worst["own"], (own - truth).abs().max().item())
        worst["largest"] = max(worst["largest"], truth.abs().max().item())
        difference = (lse[b] - true_lse)[~unseen]
        if difference.numel():
            worst["lse"] = max(worst["lse"], difference.abs().max().item())
        wrong_empty += int((out[b][unseen] != 0).sum() + (lse[b][unseen] != float("-inf")).sum())
    rounding = torch.finfo(dtype).eps * worst["largest"]
    ok = worst["out"] <= 2 * worst["own"] + rounding and worst["lse"] < 2e-3
    ok = ok and not bad and not wrong_empty and bool(torch.isfinite(torch.tensor(worst["lse"])))
    return dict(ok=ok, **{k: round(x, 6) for k, x in worst.items()}, bad=bad, empty=wrong_empty)


def measure(case):
    from dataclasses import replace
    from functools import partial

    import torch
    from triton.testing import do_bench, do_bench_cudagraph

    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward
    from entropy_attn.kernels.hopper import forward, order
    from entropy_attn.masks import BlockMask

    torch.manual_seed(0)
    dim, block, length = case["dim"], tuple(case["block"]), case["length"]
    batch, heads, causal = case["batch"], case["heads"], case["is_causal"]
    query, key, value = (torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)
                         for _ in range(3))  # fmt: skip
    mask = BlockMask.random(batch, heads, length, length, case["density"], block, device="cuda",
                            irregular=case["irregular"], is_causal=causal)  # fmt: skip
    lists = mask.kv_num_blocks, mask.kv_indices
    visited = mask.kv_num_blocks.expand(batch, heads, -1).sum().item()
    flops = 4 * dim * block[0] * block[1] * visited
    scale = dim**-0.5

    def hopper(config, items=None):
        return forward.hopper_forward(
            query, key, value, *lists, block, causal, scale, config, items
        )

    def portable():
        return block_sparse_forward(
            query, key, value, *lists, None, None, block, causal, 0, scale, False, False
        )

    default = forward.hopper_config(dim, block)
    limits = forward._device_limits(0)

    def work(l2_bytes):
        return order.work_order(
            query, key, *lists, block, 64 * default.warpgroups, causal, l2_bytes
        )

    items = work(limits[1])
    functions = {"portable": portable}
    for name in case["names"]:
        config = default
        if name != "default":
            config = replace(default, **VARIANTS[name])
        functions[name] = lambda config=config: hopper(config)
    if case["names"] == ["default"]:
        functions["order kept"] = lambda: hopper(default, items)
    if case["irregular"]:  # one head at a time, twice as many heads as by default, all heads
        for name, l2_bytes in (("1 head", 1), ("2x heads", 2 * limits[1]), ("all", 1 << 60)):
            functions[f"order {name}"] = partial(hopper, default, work(l2_bytes))
    expected = portable()[0].float()
    difference = (functions["default"]()[0].float() - expected).abs().max().item()
    times = {name: [] for name in functions}
    for _ in range(2):
        for name, function in functions.items():
            times[name].append(do_bench(function, warmup=20, rep=80, return_mode="median"))
    milliseconds = {name: sum(t) / len(t) for name, t in times.items()}
    if length <= 4096:  # launches from Python take longer than the kernel: time them as a graph
        for name in ("portable", "default", "order kept"):
            if name not in functions:
                continue
            milliseconds[f"graph, {name}"] = do_bench_cudagraph(
                functions[name], rep=40, return_mode="median"
            )
    return dict(
        ok=difference < 0.05,
        difference=round(difference, 5),
        tflops={name: round(flops / t / 1e9, 1) for name, t in milliseconds.items()},
        ms={name: [round(x, 4) for x in t] for name, t in times.items()},
        mean_blocks=round(visited / mask.kv_num_blocks.expand(batch, heads, -1).numel(), 1),
    )


def compile_ahead(case):
    from dataclasses import replace

    import torch

    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward
    from entropy_attn.kernels.hopper import forward
    from entropy_attn.masks import BlockMask

    dim, block = case["dim"], tuple(case["block"])
    query = torch.zeros(1, 2, 1024, dim, device="cuda", dtype=torch.bfloat16)
    mask = BlockMask.random(1, 2, 1024, 1024, 0.5, block, device="cuda")
    given = query, query, query, mask.kv_num_blocks, mask.kv_indices
    for name in case["names"]:
        if name.startswith("portable"):
            block_sparse_forward(*given, None, None, block, "causal" in name, 0, 0.1, False, False)
        else:
            config = replace(forward.hopper_config(dim, block), **VARIANTS[name])
            forward.hopper_forward(*given, block, False, 0.1, config)
        torch.cuda.synchronize()
    return dict(ok=True)


def worker():
    """Read cases from stdin, one JSON a line; answer each with one line."""
    import torch

    torch.zeros(1, device="cuda")
    print(json.dumps(dict(ready=True)), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        begin = time.time()
        try:
            work = {"check": check, "time": measure, "compile": compile_ahead}
            result = work[case["kind"]](case)
        except Exception as error:  # the driver goes on with the next case
            result = dict(ok=False, error=f"{type(error).__name__}: {error}"[-600:])
            if "CUDA" in str(error) or "illegal" in str(error):
                print(json.dumps(result), flush=True)
                os._exit(1)  # the context is lost
        result["seconds"] = round(time.time() - begin, 1)
        print(json.dumps(result), flush=True)


# Driver


class Worker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.answer(2 * SILENCE)

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        for _ in range(99):  # one for every question that may still come
            self.lines.put(dict(ok=False, error="the worker ended"))

    def answer(self, seconds):
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            self.kill()
            return dict(ok=False, error=f"silent for {seconds} s: killed")

    def ask(self, case, seconds):
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        except OSError:
            return dict(ok=False, error="the worker is gone")
        return self.answer(seconds)

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        if self.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Lane:
    """Cases one after the other, in a worker that is replaced when it hangs or dies."""

    lock, results = threading.Lock(), []

    def __init__(self, log):
        self.log, self.worker, self.stopped = log, None, False

    def run(self, case, seconds):
        if self.worker is None or not self.worker.is_alive():
            self.worker = Worker()
        result = self.worker.ask(case, seconds)
        if "worker" in result.get("error", "") or "silent" in result.get("error", ""):
            self.worker.kill()
        with self.lock:
            self.results.append((case, result))
            shown = {k: v for k, v in result.items() if k != "ms"}
            print(f"{time.time() - START:5.0f} s {case['tag']:14} {case['note']:36} "
                  + json.dumps(shown), flush=True)  # fmt: skip
            self.log.write(json.dumps(dict(case=case, result=result)) + "\n")
            self.log.flush()

    def run_all(self, cases, seconds):
        for case in cases:
            if not self.stopped:
                self.run(case, seconds)
        self.stop()

    def stop(self):
        self.stopped = True
        if self.worker:
            self.worker.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--variants", action="store_true", help="time all ways to build the kernel")
    parser.add_argument("--only", default="", help="cases whose tag and note contain this")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--budget", type=float, default=118, help="seconds for everything")
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    out = Path(os.environ.get("OUT", "."))

    def chosen(cases):
        return [c for c in cases if arguments.only in f"{c['tag']} {c['note']}"]

    with (out / "hopper.jsonl").open("a") as log:
        groups = []
        if not arguments.skip_checks:
            # Two workers a kind: without and with the causal mask, to compile side by side.
            for kind in KINDS:
                cases = chosen(check_cases(*kind))
                for part in (False, True):
                    groups.append([c for c in cases if c.get("is_causal", False) == part])
        groups += [[case] for case in chosen(compile_cases(arguments.variants))]
        lanes = [Lane(log) for group in groups if group]
        threads = [
            threading.Thread(target=lane.run_all, args=(group, 2 * SILENCE), daemon=True)
            for lane, group in zip(lanes, filter(None, groups), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.1, START + 0.55 * arguments.budget - time.time()))
        for lane in lanes:  # timings want the GPU for themselves
            lane.stop()
        with Lane.lock:
            wrong = [(c["tag"], c["note"]) for c, r in Lane.results if not r["ok"]]
            print(f"checks: {len(Lane.results)} done, {len(wrong)} wrong: {wrong}", flush=True)
        with Lane.lock:
            hung = {c["tag"] for c, r in Lane.results if "silent" in r.get("error", "")}
        lane = Lane(log)
        for case in chosen(time_cases(arguments.variants)):
            left = arguments.budget - (time.time() - START)
            if left < 4:
                print("out of time", flush=True)
                break
            if case["tag"] in hung:
                print(f"{case['tag']} {case['note']}: not timed, its checks hung", flush=True)
                continue
            lane.run(case, min(SILENCE, left))
        lane.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
