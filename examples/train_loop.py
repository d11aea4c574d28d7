"""Fine-tune a language model so that its attention needs fewer blocks: a plain PyTorch loop.

    python examples/train_loop.py                      SmolLM2-135M on prose that ships with Python
    python examples/train_loop.py --tiny --steps 20    a tiny model of random weights, in seconds

Prints density and perplexity on held-out prose before and after. `make demo` fetches SmolLM2.
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import track
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.model import load_model, perplexity, windows
from entropy_attn.benchmarks.prose import prose

BLOCK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks to need")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=None, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = options.length or (4096 if device.type == "cuda" else 512)
    torch.manual_seed(0)
    if options.tiny:
        model, training, held_out = tiny(device, min(length, 512))
    else:
        model, training, held_out = smollm2(device, length)

    report("before", model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    model.train()
    # The loop is yours; the regularizer needs three lines of it.
    with ea.EntropyRegularizer(
        model, target_density=options.density, block_size=BLOCK, warmup_steps=options.steps // 2
    ) as regularizer:
        for step in track(range(options.steps), "training"):
            ids = training[torch.randint(len(training), (options.batch,))]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids, labels=ids, use_cache=False).loss + regularizer.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            regularizer.step()
            if step % max(1, options.steps // 10) == 0:
                print(f"loss {loss.item():.3f} | {regularizer.stats()}")
    model.eval()
    report("after", model, held_out)


def report(when: str, model: nn.Module, ids: Tensor) -> None:
    """Density at the budget Perplexity(1.0), and perplexity with all blocks and with those."""
    with ea.observe(model, block_size=BLOCK) as observation, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    dense = perplexity(model, ids)
    config = ea.SparsityConfig(
        block_size=BLOCK, scorer=ea.TrueMass(), budget=ea.Perplexity(1.0), min_length=0
    )
    with ea.apply(model, config):
        sparse = perplexity(model, ids)
    print(
        f"{when}: density {observation.density:.3f}, perplexity {dense:.2f} dense, "
        f"{sparse:.2f} with those blocks only"
    )


def smollm2(device: torch.device, length: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, tokenizer = load_model(device, torch.float32)
    text = prose("development").text
    count = len(tokenizer(text)["input_ids"]) // length
    training = windows(tokenizer, text, length, count, device)
    return model, training, windows(tokenizer, prose("held-out").text, length, 2, device)


def tiny(device: torch.device, length: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Random weights, and sequences that repeat themselves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=length,
    )  # fmt: skip
    pieces = torch.randint(97, (32, length // 4), device=device)
    ids = pieces.repeat(1, 4)
    return LlamaForCausalLM(config).to(device), ids[:24], ids[24:]


if __name__ == "__main__":
    main()
