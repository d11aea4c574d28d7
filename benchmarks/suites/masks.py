"""Where a real model looks, and which blocks are chosen without knowing it: pictures, no times.

Four heads of SmolLM2 from simple to complex attention, on prose. It runs on the CPU, in full.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from entropy_attn.benchmarks.demo import (
    BUDGET,
    CONTEXT_CPU,
    PREDICTOR,
    QUICK_CONTEXT_CPU,
    heads_to_show,
)
from entropy_attn.benchmarks.mask_pictures import encoded
from entropy_attn.benchmarks.model import (
    MODEL_NAME,
    KeptMass,
    Setting,
    load_model,
    sparsify,
    windows,
)
from entropy_attn.benchmarks.prose import prose
from entropy_attn.benchmarks.registry import Context, Row, short

BLOCK = 32


def run(context: Context) -> Iterator[Row]:
    tokens = QUICK_CONTEXT_CPU if context.quick else CONTEXT_CPU
    source = prose("held-out")
    config = {
        "form": context.form, "model": MODEL_NAME, "text": source.name, "tokens": tokens,
        "block": BLOCK, "scorer": short(PREDICTOR), "budget": short(BUDGET),
    }  # fmt: skip
    if context.is_measured(config):  # its records are written together
        return
    context.progress(f"loading {MODEL_NAME}")
    model, tokenizer = load_model(torch.device("cpu"), torch.float32)
    ids = windows(tokenizer, source.text, tokens, 1, torch.device("cpu"))
    context.progress(f"reading {tokens} tokens")
    probe = KeptMass(PREDICTOR, BUDGET, keep_tiles=True)
    setting = Setting("default", PREDICTOR, BUDGET, BLOCK)
    with torch.inference_mode(), sparsify(model, setting, scorer=probe):
        model.base_model(input_ids=ids, use_cache=False)
    for number, picture in enumerate(heads_to_show(probe.tiles)):
        result = {"status": "ok", **encoded(picture)}
        name = picture.title.replace("\n", ", ")
        text = (
            f"{name}: {result['density']:.0%} of the tiles, {result['kept_mass']:.1%} of the mass"
        )
        yield Row({**config, "number": number}, result, text)
