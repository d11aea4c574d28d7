"""The demo as a suite, so that its table can stand in the result store."""

from __future__ import annotations

from collections.abc import Iterator

from entropy_attn.benchmarks.demo import run_demo
from entropy_attn.benchmarks.registry import Context, Row


def run(context: Context) -> Iterator[Row]:
    demo = run_demo(
        device=context.device,
        quick=context.quick or not context.on_gpu,
        out=context.out / "demo",
        progress=context.progress,
    )
    for record in demo.records():
        row = record.result
        text = (
            f"{record.config['name']}: density {row['density']:.3f}, perplexity "
            f"{row['perplexity']:.3f} ({row['change']:+.3f}), {row['median_ms']:.1f} ms"
        )
        yield Row({"form": context.form, **record.config}, row, text, is_ours=True)
