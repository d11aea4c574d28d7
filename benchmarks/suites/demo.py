"""The demo as a suite, so that its table can stand in the result store."""

from __future__ import annotations

from collections.abc import Iterator

from entropy_attn.benchmarks.demo import run_demo
from entropy_attn.benchmarks.registry import Context, Row


def run(context: Context) -> Iterator[Row]:
    if context.is_measured({"form": context.form}):  # its records are written together
        return
    demo = run_demo(
        device=context.device,
        quick=context.quick or not context.on_gpu,
        out=context.out / "demo",
        progress=context.progress,
    )
    for record in demo.records():
        row = record.result
        parts = [f"density {row['density']:.3f}"]
        if row["change"] is not None:
            parts.append(f"perplexity {row['perplexity']:.3f} ({row['change']:+.3f})")
        if row["median_ms"] is not None:
            parts.append(f"{row['median_ms']:.1f} ms")
        text = f"{record.config['name']}: {', '.join(parts)}"
        yield Row({"form": context.form, **record.config}, row, text, is_ours=True)
