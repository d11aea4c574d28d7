"""Tables and pictures of the suites ``vit`` and ``llm``: whole models by attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites import llm, vit
from entropy_attn.benchmarks.tables import (
    EMPTY,
    by_machine,
    full_records,
    markdown,
    provenance,
    slug,
)
from entropy_attn.benchmarks.whole_models import CUDNN, FLASH, LEFT_OUT, OURS, SDPA, Attention

HEADLINE_MODEL = "LLaMA-2-7B"
YLABEL = f"times as fast as {FLASH}"
Curves = dict[str, list[tuple[float, float]]]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """How a suite is shown.

    Attributes:
        rate: what it counts a second, in results. unit: the same for people.
        column: of a configuration; order: of the columns.
        attentions: of a configuration, whose records are shown; those of plugins are too.
        phase: of the records that are shown.
        yardstick: the contestant that the others are compared with.
    """

    suite: str
    rate: str
    unit: str
    column: Callable[[Config], str]
    order: Callable[[Config], tuple]
    attentions: Callable[[Config], tuple[Attention, ...]]
    phase: str = llm.PREFILL
    yardstick: str = FLASH

    def records(self, store: Store) -> list[Record]:
        """The full records that are shown, in the order of the columns."""
        found = [r for r in full_records(store, self.suite) if self._is_shown(r)]
        return sorted(found, key=lambda r: (r.machine, self.order(r.config)))

    def _is_shown(self, record: Record) -> bool:
        if record.config.get("phase", llm.PREFILL) != self.phase:
            return False
        names = {attention.name for attention in self.attentions(record.config)}
        return record.config["contestant"] in names or "version" in record.result


def _library(config: Config) -> str:
    return config.get("library", vit.TRANSFORMERS)


VIT = Shown(
    "vit", "images_per_s", "images/s",
    lambda c: f"{c['batch']} x {c['size']} px" + (", timm" if _library(c) == vit.TIMM else ""),
    lambda c: (_library(c) == vit.TIMM, c["size"]),
    lambda c: vit.attentions("full", _library(c)),
)  # fmt: skip
LLM = Shown(
    "llm", "tokens_per_s", "tokens/s",
    lambda c: f"{c['model']}, {c['tokens'] // 1024}k" + (llm.GRAPH if "captured" in c else ""),
    lambda c: (list(llm.MODELS).index(c["model"]), c["tokens"], "captured" in c),
    lambda c: llm.attentions("full"),
)  # fmt: skip
DECODING = Shown(
    "llm", "tokens_per_s", "tokens/s",
    lambda c: f"{c['model']}, {c['batch']} x {c['tokens'] // 1024}k",
    lambda c: (list(llm.MODELS).index(c["model"]), c["batch"], c["tokens"]),
    lambda c: llm.decoding_attentions("full"), llm.DECODE, SDPA.name,
)  # fmt: skip


def ratio(records: Sequence[Record], record: Record, yardstick: str = FLASH) -> float | None:
    """How many times faster than a contestant in the same case, None without it."""
    same = {**record.config, "contestant": yardstick, "sparsity": 0.0}
    for other in records:
        if (other.config, other.machine) == (same, record.machine):
            return other.result["median_ms"] / record.result["median_ms"]
    return None


def _table(shown: Shown) -> Callable[[Store], str]:
    def table(records: list[Record]) -> str:
        columns = list(dict.fromkeys(shown.column(r.config) for r in records))
        cells: dict[str, dict[str, str]] = {}
        for record in records:
            name, times = record.config["contestant"], ratio(records, record, shown.yardstick)
            if record.config["sparsity"]:
                name += f" ({record.config['sparsity']:.0%} sparse)"
            text = _rate(shown, record)
            text += "" if times is None else f" ({times:.2f} x)"
            cells.setdefault(name, {})[shown.column(record.config)] = text
        rows = [
            [name, *(row.get(column, "–") for column in columns)] for name, row in cells.items()
        ]
        setup = (
            f"{shown.unit}; in brackets how many times {shown.yardstick} alone. "
            f'Selection is part of it. "{LEFT_OUT}" leaves it out: no attention is faster.'
        )
        return f"{setup}\n\n{markdown(['attention', *columns], rows)}"

    def tables(store: Store) -> str:
        machines = by_machine(shown.records(store))
        return "\n\n".join(f"{provenance(r)}\n\n{table(r)}" for _, r in machines) or EMPTY

    return tables


def _rate(shown: Shown, record: Record) -> str:
    dense = " dense" if record.result.get("sparse_calls") == 0 else ""
    return f"{record.result[shown.rate]:,.0f}{dense}"


# --- the headline -------------------------------------------------------------------------------


def _cases(shown: Shown, records: list[Record]) -> dict[str, dict[str, Record]]:
    """By case, then by contestant."""
    cases: dict[str, dict[str, Record]] = {}
    for r in records:
        cases.setdefault(shown.column(r.config), {})[r.config["contestant"]] = r
    return cases


def _headline_records(store: Store) -> list[tuple[Shown, list[Record]]]:
    """Prefill of one language model, and the ViT of transformers."""
    return [
        (LLM, [r for r in LLM.records(store) if r.config["model"] == HEADLINE_MODEL]),
        (VIT, [r for r in VIT.records(store) if _library(r.config) == vit.TRANSFORMERS]),
    ]


def _headline(store: Store) -> str:
    """What is left of a kernel's speed in a whole model, beside what could be left at most."""
    parts = []
    for shown, records in _headline_records(store):
        for _, mine in by_machine(records):
            rows = [
                _headline_row(shown, case, by_name)
                for case, by_name in _cases(shown, mine).items()
                if {FLASH, OURS, LEFT_OUT} <= by_name.keys()
            ]
            header = [shown.unit, FLASH, CUDNN.name, OURS, LEFT_OUT]
            header += [f"over {FLASH}", "over the fastest dense"]
            parts.append(f"{provenance(mine)}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) or EMPTY


def _headline_row(shown: Shown, case: str, by_name: dict[str, Record]) -> list[str]:
    ms = {name: record.result["median_ms"] for name, record in by_name.items()}
    dense = _fastest_dense(by_name)
    cells = [
        _rate(shown, by_name[name]) if name in by_name else "–"
        for name in (FLASH, CUDNN.name, OURS, LEFT_OUT)
    ]
    gains = [
        f"{slow / ms[OURS]:.2f} x, limit {slow / ms[LEFT_OUT]:.2f} x" for slow in (ms[FLASH], dense)
    ]
    return [case, *cells, *gains]


def _fastest_dense(by_name: dict[str, Record]) -> float:
    """Milliseconds of the fastest one that computes all of attention."""
    return min(r.result["median_ms"] for name, r in by_name.items() if name not in (OURS, LEFT_OUT))


TABLES: dict[str, Callable[[Store], str]] = {
    "vit": _table(VIT),
    "llm": _table(LLM),
    "llm-decoding": _table(DECODING),
    "models-headline": _headline,
}


def cards(store: Store) -> list[tuple[str, str]]:
    """(how many times FlashAttention, what of) of the largest case of each suite that is shown."""
    found = []
    for machine, by_panel in panels(store).items():
        for label, curves in by_panel.items():
            (size, times), (_, limit) = curves[OURS][-1], curves[LEFT_OUT][-1]
            text = f"the speed of {FLASH}, at most {limit:.2f} x; {label}: {size}; {machine}"
            found.append((f"{times:.2f} x", text))
    return found


def panels(store: Store) -> dict[str, dict[str, Curves]]:
    """By machine and panel, how many times as fast as FlashAttention-2: (size, times) by name."""
    found: dict[str, dict[str, Curves]] = {}
    titles = {
        LLM.suite: f"{HEADLINE_MODEL}, prefill, tokens of the prompt",
        VIT.suite: "ViT-B/16, pixels of a side",
    }
    for shown, records in _headline_records(store):
        for machine, mine in by_machine(records):
            for by_name in _cases(shown, mine).values():
                if not {FLASH, OURS, LEFT_OUT} <= by_name.keys():
                    continue
                config = by_name[OURS].config
                ms = {name: by_name[name].result["median_ms"] for name in (OURS, FLASH, LEFT_OUT)}
                ms["the fastest dense"] = _fastest_dense(by_name)
                flash = ms.pop(FLASH)
                curves = found.setdefault(machine, {}).setdefault(titles[shown.suite], {})
                for name, t in ms.items():
                    point = (config["tokens" if shown is LLM else "size"], flash / t)
                    curves.setdefault(name, []).append(point)
    return found


def draw(store: Store, folder: Path) -> list[Path]:
    """Draw the gain in whole models, one picture a machine; returns the files."""
    from entropy_attn.benchmarks import plots

    drawn = []
    for machine, found in panels(store).items():
        drawn.append(folder / f"models_{slug(machine)}.png")
        plots.up_to_a_limit(found, LEFT_OUT, YLABEL, machine, drawn[-1])
    return drawn


# --- the paper ----------------------------------------------------------------------------------


def judge_vit(store: Store) -> tuple[str, str] | None:
    """(what was measured, the verdict) on the paper's 2.07 x with FlashAttention over eager."""
    records = [r for r in VIT.records(store) if _library(r.config) == vit.TRANSFORMERS]
    newest = max(records, key=lambda r: r.time).machine if records else None
    records = [r for r in records if r.machine == newest]
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
    verdict = "holds at some sizes" if max(over_flash) >= 2.07 / 1.63 else "does not hold"
    return f"{'; '.join(texts)} ({_machines(records)})", verdict


def judge_llm(store: Store) -> tuple[str, str] | None:
    """(what was measured, the verdict) on the paper's 1.48 to 1.60 x for 7B models."""
    records = [r for r in LLM.records(store) if r.config["model"].endswith("7B")]
    ours = [r for r in records if r.config["contestant"] == OURS]
    found = [(LLM.column(r.config), ratio(records, r)) for r in ours]
    known = [(name, times) for name, times in found if times is not None]
    if not known:
        return None
    text = "; ".join(f"{name}: {times:.2f} x" for name, times in known)
    verdict = "holds at the longest" if max(t for _, t in known) >= 1.48 else "does not hold"
    return f"{text} {FLASH} ({_machines(records)})", verdict


def _machines(records: list[Record]) -> str:
    return ", ".join(dict.fromkeys(r.machine for r in records))
