"""Tables of the suites ``vit`` and ``llm``: whole models by attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites import llm, vit
from entropy_attn.benchmarks.tables import full_records, markdown, per_machine
from entropy_attn.benchmarks.whole_models import FLASH, OURS, SDPA, Attention


@dataclass(frozen=True)
class Shown:
    """How a suite is shown: its columns, and what it counts a second.

    Attributes:
        config: of the records that count.
        yardstick: the contestant that the others are compared with.
    """

    suite: str
    rate: str
    unit: str
    column: Callable[[dict], str]
    attentions: tuple[Attention, ...]
    config: Mapping[str, str] = field(default_factory=dict)
    yardstick: str = FLASH


VIT = Shown(
    "vit", "images_per_s", "images/s", lambda c: f"{c['batch']} x {c['size']} px",
    vit.attentions("full"),
)  # fmt: skip
LLM = Shown(
    "llm", "tokens_per_s", "tokens/s", lambda c: f"{c['model']}, {c['tokens'] // 1024}k",
    llm.attentions("full"), {"phase": llm.PREFILL},
)  # fmt: skip
DECODING = Shown(
    "llm", "tokens_per_s", "tokens/s",
    lambda c: f"{c['model']}, {c['batch']} x {c['tokens'] // 1024}k",
    llm.decoding_attentions("full"), {"phase": llm.DECODE}, SDPA.name,
)  # fmt: skip


def ratio(records: Sequence[Record], record: Record, yardstick: str = FLASH) -> float | None:
    """How many times faster than a contestant in the same case, None without it."""
    same = {**record.config, "contestant": yardstick, "sparsity": 0.0}
    for other in records:
        if other.config == same:
            return other.result["median_ms"] / record.result["median_ms"]
    return None


def _table(shown: Shown) -> Callable[[Store], str]:
    def table(records: list[Record]) -> str:
        names = [attention.name for attention in shown.attentions]
        records = [r for r in records if r.config["contestant"] in names]
        columns = list(dict.fromkeys(shown.column(r.config) for r in records))
        cells: dict[str, dict[str, str]] = {}
        for record in records:
            name, times = record.config["contestant"], ratio(records, record, shown.yardstick)
            if record.config["sparsity"]:
                name += f" ({record.config['sparsity']:.0%} sparse)"
            text = f"{record.result[shown.rate]:,.0f}"
            text += "" if times is None else f" ({times:.2f} x)"
            if record.result.get("sparse_calls") == 0:
                text += " dense"
            cells.setdefault(name, {})[shown.column(record.config)] = text
        rows = [
            [name, *(row.get(column, "–") for column in columns)] for name, row in cells.items()
        ]
        setup = (
            f"{shown.unit}; in brackets how many times {shown.yardstick} alone. "
            "Selection is part of it. The last row leaves attention out: no attention is faster."
        )
        return f"{setup}\n\n{markdown(['attention', *columns], rows)}"

    return lambda store: per_machine(store, shown.suite, table, **shown.config)


TABLES: dict[str, Callable[[Store], str]] = {
    "vit": _table(VIT),
    "llm": _table(LLM),
    "llm_decoding": _table(DECODING),
}


def judge_vit(store: Store) -> tuple[str, str] | None:
    """(what was measured, the verdict) on the paper's 2.07 x with FlashAttention over eager."""
    records = full_records(store, "vit")
    best: dict[tuple[int, str], float] = {}
    for r in records:
        key = (r.config["size"], r.config["contestant"])
        best[key] = r.result["median_ms"]
    texts, over_flash = [], []
    for size in sorted({size for size, _ in best}):
        ours, flash, eager = (best.get((size, name)) for name in (OURS, FLASH, "eager"))
        if ours and flash and eager:
            texts.append(f"{size} px: {eager / ours:.2f} x eager, {flash / ours:.2f} x {FLASH}")
            over_flash.append(flash / ours)
    if not texts:
        return None
    return "; ".join(texts), "holds at some sizes" if max(over_flash) >= 2.07 / 1.63 else (
        "does not hold"
    )


def judge_llm(store: Store) -> tuple[str, str] | None:
    """(what was measured, the verdict) on the paper's 1.48 to 1.60 x for 7B models."""
    records = full_records(store, "llm", contestant=OURS, **LLM.config)
    everything = full_records(store, "llm", **LLM.config)
    found = [(LLM.column(r.config), ratio(everything, r)) for r in records]
    known = [(name, times) for name, times in found if times is not None]
    if not known:
        return None
    text = "; ".join(f"{name}: {times:.2f} x" for name, times in known)
    return f"{text} {FLASH}", "holds at the longest" if max(t for _, t in known) >= 1.48 else (
        "does not hold"
    )
