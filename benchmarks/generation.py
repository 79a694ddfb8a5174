"""Generation speed, side by side with transformers' `generate` on the same weights.

    python benchmarks/generation.py --sizes 10M 50M --out docs/generation-speed.md
    python benchmarks/generation.py --device cuda --sizes 350M --dtypes bfloat16

Everybody completes the same prompts greedily, in one process, in turns: A B C A B C ... transformers appears once for
each of its settings (cache, attention, torch.compile); ratios are taken, round by round, against the best of them.
In float32 the tokens must be the same. The time is that of the whole call, reading the prompt included; what the first
call took, compilation above all, stands apart.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from calledshot import machine
from calledshot.model import Decoder, Request, Sampling, generate
from calledshot.model.huggingface import to_huggingface
from calledshot.recipe import schema

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SIZES = {
    "10M": {"layers": 6, "width": 384, "heads": 6, "kv_heads": 2, "hidden": 1024, "vocabulary": 8192, "context": 512},
    "50M": {"layers": 7, "width": 768, "heads": 12, "kv_heads": 4, "hidden": 2048, "vocabulary": 8192, "context": 512},
    "350M": {
        "layers": 24, "width": 1024, "heads": 16, "kv_heads": 4, "hidden": 2816, "vocabulary": 32_768, "context": 2048,
    },
    "tiny": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 192, "vocabulary": 512, "context": 256},
}  # fmt: skip
KINDS = {"Llama": False, "Qwen3": True}
"""Class of transformers, and whether queries and keys are normalised."""
SETTINGS = {
    "growing cache": {},
    "growing cache, eager attention": {"attention": "eager"},
    "static cache": {"cache": "static"},
    "static cache, eager attention": {"cache": "static", "attention": "eager"},
    "static cache, compiled": {"cache": "static", "compile": True},
    "static cache, eager attention, compiled": {"cache": "static", "attention": "eager", "compile": True},
}
Complete = Callable[[], list[list[int]]]


@dataclass
class Contestant:
    """Somebody who completes the prompts."""

    name: str
    complete: Complete
    first: float
    """Seconds of the first call."""
    times: list[float]


def decoder(size: str, kind: str, device: str) -> Decoder:
    """Random weights, none of them zero."""
    config = schema.Model(**SIZES[size], tied_embeddings=True, qk_norm=KINDS[kind])
    model = Decoder(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 2 * parameter.size(-1) ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
    model.blocked_attention = False  # as `load_model` gives it
    return model.to(device)


def ours(model: Decoder, prompts: list[list[int]], count: int) -> Complete:
    """This package's `generate`."""
    requests = [Request(tuple(prompt), count, Sampling(0)) for prompt in prompts]
    model = model.packed()
    return lambda: [each.tokens for each in generate(model, requests, rows=len(requests))]


def theirs(model: Decoder, kind: str, setting: str, prompts: list[list[int]], count: int) -> Complete:
    """transformers' `generate` in one of its settings."""
    import transformers

    options = SETTINGS[setting]
    config = model.config
    settings = getattr(transformers, f"{kind}Config")(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=model.derived.head_width, intermediate_size=config.hidden,
        vocab_size=config.vocabulary, max_position_embeddings=config.context, rms_norm_eps=config.norm_epsilon,
        rope_theta=config.rope_base, tie_word_embeddings=True, attn_implementation=options.get("attention", "sdpa"),
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peer = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    peer.load_state_dict(dict(to_huggingface(config, model.state_dict())), strict=False)
    peer.tie_weights()
    peer = peer.to(model.embedding_VD.device, model.embedding_VD.dtype)
    more = {"cache_implementation": "static"} if options.get("cache") else {}
    if options.get("compile"):
        compiled = transformers.CompileConfig(fullgraph=False, mode="default")
        compiled._compile_all_devices = True  # CPUs are left out otherwise
        more["compile_config"] = compiled
    elif options.get("cache"):
        more["disable_compile"] = True
    ids = torch.tensor(prompts, device=peer.device)

    def complete() -> list[list[int]]:
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **more)
        return out[:, ids.size(1) :].tolist()

    return complete


def race(size: str, kind: str, dtype: str, batch: int, arguments: argparse.Namespace) -> list[Contestant]:
    """Everybody in turn; ourselves first in the list."""
    torch._dynamo.reset()
    model = decoder(size, kind, arguments.device).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, model.config.vocabulary, (batch, arguments.prompt), generator=generator).tolist()
    ways = {"calledshot": ours(model, prompts, arguments.tokens)}
    for setting in arguments.settings or SETTINGS:
        ways[f"transformers, {setting}"] = theirs(model, kind, setting, prompts, arguments.tokens)
    contestants, answers = [], {}
    for name, complete in ways.items():
        start = time.perf_counter()
        answers[name] = complete()
        contestants.append(Contestant(name, complete, time.perf_counter() - start, []))
        complete()  # compilers may begin anew once they have seen a second length
    if dtype == "float32":
        different = [name for name, answer in answers.items() if answer != answers["calledshot"]]
        assert not different, f"other tokens: {different}"
    for _ in range(arguments.rounds):
        for one in contestants:
            start = time.perf_counter()
            one.complete()
            one.times.append(time.perf_counter() - start)
    return contestants


def table(title: str, contestants: list[Contestant], made: int) -> str:
    """The contestants, quickest first, and what the best peer comes to."""
    mine, *peers = contestants
    lines = [
        f"**{title}**",
        "",
        "| | tokens/s (median) | calledshot / it, by round | first call |",
        "|---|--:|--:|--:|",
    ]
    for one in sorted(contestants, key=lambda each: statistics.median(each.times)):
        ratios = sorted(their / my for my, their in zip(mine.times, one.times, strict=True))
        lines.append(
            f"| {one.name} | {made / statistics.median(one.times):,.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | {one.first:.1f} s |"
        )
    best = min(peers, key=lambda each: statistics.median(each.times))
    ratio = statistics.median(their / my for my, their in zip(mine.times, best.times, strict=True))
    return "\n".join([*lines, "", f"Against the best peer setting ({best.name}): {ratio:.2f} x."])


def main() -> None:
    """Measure, print, and write the tables on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10M", "50M"], choices=list(SIZES))
    parser.add_argument("--kinds", nargs="+", default=["Llama"], choices=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--settings", nargs="+", default=[], choices=list(SETTINGS), help="of transformers; all")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate after each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    here = machine.describe()
    parts = [
        "# Generation speed",
        f"`python benchmarks/generation.py --sizes {' '.join(arguments.sizes)}`: {here['cpu']['model']}, "
        f"{arguments.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"allocator {here['allocator']}, {arguments.device}. Greedy, {arguments.prompt} tokens of prompt, "
        f"{arguments.tokens} new ones, {arguments.rounds} rounds in turn.",
    ]
    print(parts[1], flush=True)
    for size in arguments.sizes:
        for kind in arguments.kinds:
            for dtype in arguments.dtypes:
                for batch in arguments.batches:
                    title = f"{size}, {kind}, {dtype}, batch {batch}"
                    parts.append(table(title, race(size, kind, dtype, batch, arguments), batch * arguments.tokens))
                    print(f"\n{parts[-1]}", flush=True)
    if arguments.out:
        arguments.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
