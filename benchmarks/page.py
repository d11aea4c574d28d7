"""The report: one HTML page that holds all of its pictures and needs nothing else.

It shows one machine, that of the last attention records unless another is named, and the newest
training runs. Suites that this machine did not run are shown as they ran elsewhere last, with the
machine's name; all that was measured elsewhere is in the tables of docs/.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt

from entropy_attn.benchmarks import (
    claims,
    figures,
    plots,
    report,
    report_finetune,
    report_models,
    report_vision,
)
from entropy_attn.benchmarks.baselines import OURS
from entropy_attn.benchmarks.prose import PARTS
from entropy_attn.benchmarks.registry import SUITES
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.tables import EMPTY, Newest, full_records, provenance, slug

Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Card:
    """A number that the page starts with."""

    value: str
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture as it stands in the page."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table that opens on a click."""

    title: str
    html: str


@dataclass
class Section:
    """A part of the page; it is left out where there is nothing to show."""

    title: str
    text: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def slug(self) -> str:
        return slug(self.title)


# Suites with a section of their own, which names the machine; pictures that no machine changes.
SEPARATE = ("vit", "llm", "decode", "reorder", "train", "masks")


class OneMachine(Store):
    """The records of one machine; of training runs, whose outcome is no speed, the newest.

    So it is with separate suites that this machine did not run.
    """

    def __init__(self, directory: Path, machine: str) -> None:
        super().__init__(directory)
        self.machine = machine

    def load(self, suite: str, **config) -> list[Record]:
        if suite in SUITES and SUITES[suite].trains:
            return Newest(self.directory).load(suite, **config)
        records = super().load(suite, **config)
        mine = [r for r in records if r.machine == self.machine]
        if not mine and suite in SEPARATE:
            return Newest(self.directory).load(suite, **config)
        return mine


def write_page(store: Store, path: Path, machine: str | None = None) -> bool:
    """Write the page of a machine; False, and no file, where there is nothing to show.

    Args:
        machine: its name as in the records, None for that of the last attention records.
    """
    records = full_records(store, "attention")
    if machine is None and records:
        machine = max(records, key=lambda r: r.time).machine
    if machine is None:
        return False
    shown = OneMachine(store.directory, machine)
    sections = [part for part in _sections(shown) if part.figures or part.tables or part.claims]
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        provenance=provenance(full_records(shown, "attention") or records).strip("*."),
        cards=_cards(shown),
        sections=sections,
    )
    path.write_text(page, encoding="utf-8")
    return True


# --- pieces -------------------------------------------------------------------------------------


def svg_of(draw: Draw) -> str:
    """A picture as an SVG element that takes the colour of the text around it."""
    with tempfile.TemporaryDirectory() as folder, plots.for_pages():
        path = Path(folder) / "picture.svg"
        draw(path)
        text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"#000000\b", "currentColor", text)


def _table(store: Store, name: str, title: str) -> list[Table]:
    found = report.TABLES[name](store)
    if found == EMPTY:
        return []
    return [Table(title, MarkdownIt("commonmark").enable("table").render(found))]


def _cards(store: Store) -> list[Card]:
    found = []
    for record in full_records(store, "attention", contestant=OURS, density=0.25, irregular=False):
        config = record.config
        is_main = config["length"] in (8192, 16384) and not {"pattern", "block_k"} & set(config)
        if is_main and (config["head_dim"], config["block"], config["is_causal"]) == (
            128,
            128,
            False,
        ):
            text = f"{config['direction']}, D=128, a quarter of the blocks, on visited tiles"
            found.append(Card(f"{record.result['tflops']:.0f} TFLOP/s", text))
    for times, text in report_models.cards(store):
        found.append(Card(times, text))
    quality = claims.judge_perplexity(store)
    if quality != claims.NOT_YET:
        found.append(Card(quality[0], "perplexity of SmolLM2, without training"))
    for record in full_records(store, "entropy", contestant="eager", anchors=64, dim=64):
        if (record.config["dtype"], record.config["direction"]) == ("bfloat16", "forward"):
            text = "faster than eager: the entropy of a million points"
            found.append(Card(f"{record.result['speedup']:.0f} x", text))
    tests = store.latest("test_gpu")
    if tests:
        result = tests[-1].result
        text = f"tests passed on this GPU, {result['failed']} failed, {result['skipped']} skipped"
        found.append(Card(str(result["passed"]), text))
    return found


def _sections(store: Store) -> list[Section]:
    return [_paper(store), _models(store), _speed(store), _lengths(store), _decode(store),
            _reorder(store), _quality(store), _finetune(store), _vision(store),
            _entropy(store), _training(store)]  # fmt: skip


def _paper(store: Store) -> Section:
    return Section(
        "The paper's claims",
        "The numbers of the abstract of arXiv 2509.03733. Where a claim was tried on a stand-in, "
        "only the order of the methods can be compared, not the number.",
        "entropy-attn bench all",
        claims=list(claims.rows(store)),
    )


def _speed(store: Store) -> Section:
    records = full_records(store, "attention")
    section = Section(
        "Speed of attention",
        "Every contestant's output is checked against the reference before it is timed; they take "
        "turns in one run. TFLOP/s count the tiles that are visited.",
        "entropy-attn bench attention",
    )
    for head_dim in (128, 64):
        curves = figures.speedups(records, head_dim)
        if curves:
            draw = partial(plots.speedup_against_density, curves, f"forward, D={head_dim}")
            caption = (
                "Time of the best dense attention over that of sparse attention with the same "
                "queries. The dotted line is what leaving out tiles could give at most."
            )
            section.figures.append(Figure(svg_of(draw), caption))
    for direction in ("forward", "backward"):
        mine = [r for r in records if r.config["direction"] == direction]
        if mine:
            draw = partial(report.speed_bars, mine, direction)
            section.figures.append(Figure(svg_of(draw), f"All cases, {direction}."))
    for name, title in (
        ("attention-forward", "Forward, all contestants"),
        ("attention-backward", "Backward, all contestants"),
        ("entropy-overhead", "What row and block entropy add"),
        ("selection", "What choosing the blocks costs"),
    ):
        section.tables += _table(store, name, title)
    return section


def _lengths(store: Store) -> Section:
    records = full_records(store, "crossover")
    section = Section(
        "Where sparse attention pays",
        "Short sequences run dense: choosing blocks costs more than it saves. What was measured "
        'here is what min_length="auto" goes by.',
        "entropy-attn bench crossover",
    )
    if records:
        curves = figures.times_by_length(records)
        draw = partial(plots.scaling, curves, "the best dense attention, and sparse attention")
        caption = (
            "Sparse at the lowest density that was measured of each length, selection included."
        )
        section.figures.append(Figure(svg_of(draw), caption))
    section.tables += _table(store, "crossover", "All lengths")
    return section


def _models(store: Store) -> Section:
    section = Section(
        "Whole models",
        "End to end, selection included. The row without attention is the limit of any attention: "
        "where attention is a small part of the time, as in images below 1024 pixels and short "
        "prompts, little can be gained, and the package runs dense by itself.",
        "entropy-attn bench vit; entropy-attn bench llm",
    )
    for machine, panels in report_models.panels(store).items():
        draw = partial(
            plots.up_to_a_limit, panels, report_models.LEFT_OUT, report_models.YLABEL, machine
        )
        caption = "Prefill of one prompt, and images; what no attention at all would give, dashed."
        section.figures.append(Figure(svg_of(draw), caption))
    section.tables += _table(store, "models-headline", "Over FlashAttention, and the limit")
    section.tables += _table(store, "vit", "ViT-B/16")
    section.tables += _table(store, "llm", "Prefill of language models")
    section.tables += _table(store, "llm-decoding", "Decoding of language models")
    return section


def _decode(store: Store) -> Section:
    section = Section(
        "Decoding",
        "One token a sequence against a long cache, as a share of the bandwidth of a copy, and of "
        "the speed of a sum over as many bytes. Where every key is read, SDPA is as fast; time is "
        "saved by the blocks that are left out.",
        "entropy-attn bench decode",
    )
    section.tables += _table(store, "decode", "All caches")
    return section


def _reorder(store: Store) -> Section:
    section = Section(
        "Sorting tokens",
        "What sorting the tokens of a bidirectional model costs, and how many blocks it saves.",
        "entropy-attn bench reorder",
    )
    section.tables += _table(store, "reordering", "Time")
    section.tables += _table(store, "reordering-density", "Blocks that hold 95 % of the mass")
    return section


def _training(store: Store) -> Section:
    section = Section(
        "Training for low entropy",
        "Whole steps with the regularizer, relative to steps without it.",
        "entropy-attn bench train",
    )
    section.tables += _table(store, "training", "What the regularizer adds to a step")
    return section


def _quality(store: Store) -> Section:
    section = Section(
        "Quality without training",
        "SmolLM2-135M reads prose of 8192 tokens through the drop-in. The oracle knows the true "
        "attention; the predictors guess it.",
        "entropy-attn bench quality; entropy-attn bench masks",
    )
    records = full_records(store, "quality", text=PARTS["held-out"])
    points = report.quality_points(records)
    if len({point.family for point in points}) > 1:
        draw = partial(plots.frontier, points, "held-out prose")
        caption = "Change of perplexity against the share of the blocks that is computed."
        section.figures.append(Figure(svg_of(draw), caption))
    heads = report.heads(store)
    if heads:
        draw = partial(plots.mask_heat_maps, heads, report.HEADS_TITLE)
        caption = (
            "Above the attention of four heads, unknown to the predictor; below what it chose."
        )
        section.figures.append(Figure(svg_of(draw), caption))
    section.tables += _table(store, "quality", "All predictors and texts")
    return section


def _finetune(store: Store) -> Section:
    records = full_records(store, report_finetune.SUITE, version=report_finetune.VERSION)
    section = Section(
        "Fine-tuning for sparsity",
        "SmolLM2-135M, fine-tuned with regularizers and with sparse attention in training.",
        "entropy-attn bench finetune",
    )
    if records:
        draw = partial(
            plots.perplexity_against_density, report_finetune.curves(records), "held-out prose"
        )
        section.figures.append(Figure(svg_of(draw), "Blocks chosen by the default predictor."))
    section.tables += _table(store, "finetune", "Densities at equal perplexity")
    section.tables += _table(store, "finetune-ratios", "Ratios to plain fine-tuning")
    return section


def _vision(store: Store) -> Section:
    section = Section(
        "Small vision transformers",
        "Trained from random weights by regularizer, on stand-ins for ImageNet.",
        "entropy-attn bench vision",
    )
    records = full_records(store, report_vision.SUITE, part="methods")
    for task in report_vision.tasks_of(records):
        curves = report_vision.curves(records, task)
        draw = partial(plots.accuracy_against_density, curves, f"{task}, blocks by true mass")
        section.figures.append(Figure(svg_of(draw), f"Accuracy on {task} under sparse attention."))
    for name, title in (
        ("vision-accuracy", "Accuracy under sparse attention"),
        ("vision-overlap", "Kept blocks and objects"),
        ("vision-robustness", "Corrupted images"),
        ("vision-ablation", "Ablation"),
    ):
        section.tables += _table(store, name, title)
    return section


def _entropy(store: Store) -> Section:
    attention, entropy = full_records(store, "attention"), full_records(store, "entropy")
    section = Section(
        "Entropies, and the limits of the machine",
        "The roof is the data sheet's tensor cores and the bandwidth of a copy in the same run.",
        "entropy-attn bench entropy",
    )
    found = figures.roofline(attention, entropy)
    if found is not None:
        draw = partial(plots.roofline, *found, "this package's kernels")
        section.figures.append(Figure(svg_of(draw), "Each point is a case of the tables."))
    section.tables += _table(store, "soft-entropy", "Range-partition entropy")
    return section
