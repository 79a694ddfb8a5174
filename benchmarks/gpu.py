"""Everything that wants a GPU, in one call of less than ten minutes: speed, memory, and what only its kernels compute.

    python benchmarks/gpu.py --out docs/gpu-speed.md          # one H100 or H200
    python benchmarks/gpu.py --device cpu --tiny              # that it runs at all

Each part is a process of its own with a time limit; its lines are printed when it ends, and one that fails or takes too
long says so and stops no other. MFU is against the matmul peak probed in that process, by the FLOPs that `shot recipe
show` counts. Peers are used as their guides say: `transformers` compiled whole, with the attention that is quickest for
it, in bfloat16 with float32 masters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calledshot import machine
from calledshot.model.attention import Mask, attend, ready
from calledshot.objective import Batch
from calledshot.recipe import Recipe, cost, load_recipe
from calledshot.recipe.units import show_bytes
from calledshot.training.engine import Engine
from calledshot.training.probe import Machine
from calledshot.training.world import World

SHAPES = {
    "350M": {"layers": 24, "width": 1024, "heads": 16, "kv_heads": 4, "hidden": 2816, "vocabulary": 32_768},
    "1B": {"layers": 16, "width": 2048, "heads": 16, "kv_heads": 4, "hidden": 5632, "vocabulary": 65_536},
    "tiny": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 192, "vocabulary": 640},
}
BARS = {"350M": 0.55, "1B": 0.62}
"""MFU that we set ourselves."""
STEPS = 8
PEER_BAR = 1.15


def recipe_of(size: str, context: int, micro_tokens: int, *overrides: str) -> Recipe:
    """A Noam decoder that takes one micro-batch a step."""
    keys = [f"model.{key}={value}" for key, value in SHAPES[size].items()]
    return load_recipe(
        "demo",
        [
            *keys, f"model.context={context}", "model.tied_embeddings=true", f"batch.tokens={micro_tokens}",
            f"parallel.micro_tokens={micro_tokens}", f"duration.tokens={100 * micro_tokens}", "optimizer.name=adamw",
            *overrides,
        ],
    )  # fmt: skip


def random_batch(recipe: Recipe) -> Batch:
    """Tokens of two documents a row."""
    T, rows = recipe.model.context, recipe.batch.tokens // recipe.model.context
    ids = np.random.default_rng(0).integers(0, recipe.model.vocabulary, (rows, T + 1), dtype=np.int32)
    half = np.arange(T, dtype=np.int32) % (T // 2)
    documents = np.broadcast_to((np.arange(T) >= T // 2).astype(np.int32), (rows, T)).copy()
    return Batch(
        ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((rows, T), np.float32), documents,
        np.broadcast_to(half, (rows, T)).copy(), np.zeros((rows, T), np.int8), np.zeros(rows, np.int32),
    )  # fmt: skip


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of the first call, and the median of the others."""
    times = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[2:])


def report(name: str, tokens: int, flops: float, seconds: float, first: float, device: torch.device, more: str) -> None:
    """One row."""
    peaks = machine.matmul_peak("bfloat16", seconds=1.0, device=device.type)
    mfu = flops * tokens / seconds / max(peaks)
    held = show_bytes(torch.cuda.max_memory_allocated()) if device.type == "cuda" else "n/a"
    row = {
        "name": name,
        "tokens_per_second": tokens / seconds,
        "mfu": mfu,
        "memory": held,
        "first": first,
        "more": more,
    }
    print(json.dumps(row), flush=True)


def train(size: str, context: int, micro_tokens: int, *overrides: str) -> None:
    """Our step."""
    recipe = recipe_of(size, context, micro_tokens, *overrides)
    world = World.join()
    engine = Engine(recipe, Machine(world.device.type, "bfloat16", True, 1, micro_tokens), world, None, Path())  # ty: ignore
    batch, number, losses = random_batch(recipe), 0, []

    def step() -> None:
        nonlocal number
        number += 1
        losses.append(engine.update(batch, number, 0.1).loss)
        engine.optimizer.clear()

    first, seconds = timed(step, world.device)
    per_token = cost(recipe).flops_per_token.total
    name = " ".join(["calledshot", size, f"context {context}", *overrides])
    report(name, micro_tokens, per_token, seconds, first, world.device, f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def peer(size: str, context: int, micro_tokens: int) -> None:
    """`transformers`' Llama of the same shape."""
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    device, shape = World.join().device, SHAPES[size]
    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=context, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # flash attention, causal
    model = LlamaForCausalLM(config).to(device)
    masters = [p.detach().clone().float() for p in model.parameters()]
    model = model.bfloat16()
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    batch = random_batch(recipe_of(size, context, micro_tokens))
    inputs, targets = (torch.from_numpy(each.astype(np.int64)).to(device) for each in (batch.inputs, batch.targets))

    def compute() -> Any:
        return F.cross_entropy(model(input_ids=inputs).logits.float().flatten(0, 1), targets.flatten())

    compiled = torch.compile(compute)

    def step() -> None:
        compiled().backward()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        optimizer.zero_grad()

    first, seconds = timed(step, device)
    per_token = cost(recipe_of(size, context, micro_tokens)).flops_per_token.total
    report(f"transformers {size} context {context}", micro_tokens, per_token, seconds, first, device, "")


def masks(context: int) -> None:
    """Prefixes and packed documents by FlexAttention against plain products in float32."""
    device = World.join().device
    generator = torch.Generator().manual_seed(0)
    B, K, G, C = 2, 2, 2, 64
    q, k, v = (torch.randn(B, context, K, *more, C, generator=generator) for more in ((G,), (), ()))
    documents = (torch.arange(context) // (context // 3 + 1)).expand(B, context)
    regions = ((torch.arange(context) % (context // 3 + 1)) < context // 8).to(torch.int8).expand(B, context)
    for name, more in (("documents", {}), ("prefixes", {"regions_BT": regions})):
        here = Mask(context, context, documents_BT=documents, **more)
        expected = attend(q, k, v, ready(here, q.device, q.dtype, blocked=False))
        there = {key: value.to(device) for key, value in more.items()}
        mask = Mask(context, context, documents_BT=documents.to(device), **there)
        qd, kd, vd = (each.to(device).requires_grad_() for each in (q, k, v))
        found = attend(qd, kd, vd, ready(mask, device, q.dtype, blocked=False))
        found.sum().backward()
        difference = float((found.detach().cpu() - expected).abs().max())
        row = {"name": f"mask of {name}, context {context}", "more": f"largest difference {difference:.1e} (float32)"}
        print(json.dumps(row), flush=True)


def peaks() -> None:
    """What the matmuls and the memory can do."""
    device = World.join().device
    found = machine.matmul_peak("bfloat16", seconds=3.0, device=device.type)
    size = 2**30 if device.type == "cuda" else 2**26
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    _, seconds = timed(lambda: b.copy_(a), device)
    copied = 2 * size / seconds / 1e12
    more = f"{min(found) / 1e12:.3g} to {max(found) / 1e12:.3g} TFLOP/s bfloat16, copy {copied:.3g} TB/s"
    print(json.dumps({"name": "peaks", "more": more}), flush=True)


def decoding(size: str, rows: int) -> None:
    """Greedy decoding of 128 tokens after 128, ours and `transformers` with a static cache."""
    from generation import SIZES as KNOWN
    from generation import decoder, ours, theirs

    KNOWN.setdefault(size, {**SHAPES[size], "context": 2048})
    device = World.join().device
    model = decoder(size, "Llama", str(device)).bfloat16()
    prompts = [[(7 * row + place) % 500 for place in range(128)] for row in range(rows)]
    setting = "static cache, compiled" if device.type == "cuda" else "static cache"
    for name, complete in (
        ("calledshot", ours(model, prompts, 128)),
        ("transformers, static cache", theirs(model, "Llama", setting, prompts, 128)),
    ):
        first, seconds = timed(complete, device)
        row = {
            "name": f"{name} {size} batch {rows}",
            "tokens_per_second": rows * 128 / seconds,
            "first": first,
            "more": "",
        }
        print(json.dumps(row), flush=True)


def plan(tiny: bool) -> list[tuple[int, list[Any]]]:
    """(seconds at most, part with its arguments), the most wanted first."""
    if tiny:
        return [
            (60, ["peaks"]), (60, ["masks", 96]), (120, ["train", "tiny", 64, 256]), (120, ["peer", "tiny", 64, 256]),
            (120, ["train", "tiny", 64, 256, "model.experts=8", "model.top_k=2"]), (240, ["decoding", "tiny", 2]),
        ]  # fmt: skip
    experts = ("model.experts=8", "model.top_k=2")
    return [
        (20, ["peaks"]), (40, ["masks", 1024]),
        (60, ["train", "350M", 2048, 65_536]), (60, ["train", "1B", 2048, 32_768]),
        (60, ["peer", "350M", 2048, 32_768]), (60, ["peer", "1B", 2048, 16_384]),
        (60, ["train", "1B", 4096, 32_768]), (60, ["train", "1B", 2048, 32_768, "parallel.float8=true"]),
        (60, ["train", "350M", 2048, 32_768, *experts]), (60, ["train", "350M", 4096, 65_536]),
        (60, ["decoding", "350M", 1]), (60, ["decoding", "350M", 32]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=580.0, help="for all parts together")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        name, *arguments = asked.part
        globals()[name](*(int(each) if each.isdecimal() else each for each in arguments))
        return
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny shows that the parts run")
    end = time.monotonic() + asked.seconds
    described = machine.describe()
    where = ", ".join(gpu["name"] for gpu in described.get("gpus", [])) or machine.fingerprint()
    lines = [
        f"{where}, torch {torch.__version__}, `python benchmarks/gpu.py`.", "",
        "| | tokens/s | MFU | memory | first step | |", "|---|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    speeds: dict[str, float] = {}
    for limit, part in plan(asked.tiny):
        limit = min(limit, end - time.monotonic())
        words = list(map(str, part))
        nothing = [{"name": " ".join(words), "more": "no time was left"}]
        said = run(words, limit) if limit > 10 else nothing
        for row in said:
            speeds[row["name"]] = row.get("tokens_per_second", 0.0)
            line = shown(row)
            lines.append(line)
            print(line, flush=True)
    lines += ["", *verdicts(speeds)]
    print("\n".join(["", *verdicts(speeds)]))
    if asked.out:
        asked.out.write_text("# On a GPU\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def run(words: list[str], limit: float) -> list[dict[str, Any]]:
    """The rows of a part, or why there are none."""
    command = [sys.executable, __file__, "--part", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [{"name": " ".join(words), "more": f"took more than {limit:.0f} s"}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["said nothing"])[-1]
        rows.append({"name": " ".join(words), "more": f"failed: {last[:160]}"})
    return rows


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
    first = f"{row['first']:.0f} s" if "first" in row else ""
    return f"| {row['name']} | {speed} | {mfu} | {row.get('memory', '')} | {first} | {row['more']} |"


def verdicts(speeds: dict[str, float]) -> list[str]:
    """What the bars were, and whether they were reached."""
    found = []
    for name, speed in speeds.items():
        ours = speeds.get(name.replace("transformers", "calledshot"), 0.0)
        if name.startswith("transformers ") and "context" in name and speed:
            met = "met" if ours / speed >= PEER_BAR else "missed"
            found.append(
                f"{name.removeprefix('transformers ')}: {ours / speed:.2f} x transformers (bar {PEER_BAR}: {met})."
            )
    bars = ", ".join(f"{bar:.0%} at {size}" for size, bar in BARS.items())
    return [*found, f"Bars of MFU: {bars}; 40 % by active FLOPs with experts."]


if __name__ == "__main__":
    main()
