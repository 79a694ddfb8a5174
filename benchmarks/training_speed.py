"""Training speed, memory and share of the matmul peak, side by side with other people's models.

    python benchmarks/training_speed.py --sizes 10M 50M --out docs/training-speed.md
    python benchmarks/training_speed.py --nanogpt ~/nanoGPT --device cuda

Every contestant is a process of its own, trains the same shape on the same random tokens with the same batch, context,
optimizer (AdamW, fused where it has one), clipping, dtype, threads and allocator, and works only when it is its turn: A
B C A B C ..., with the matmul peak probed in between. A peer appears once for each of its settings; ratios are taken,
round by round, against the best of them. Peers that are not installed are left out and named (pip install transformers
litgpt x-transformers).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    context: int
    rows: int


SIZES = {
    "10M": Size(6, 384, 6, 2, 1024, 8192, 512, 4),
    "50M": Size(7, 768, 12, 4, 2048, 8192, 512, 4),
    "350M": Size(24, 1024, 16, 4, 2816, 32_768, 2048, 8),
    "tiny": Size(2, 64, 2, 1, 192, 512, 64, 2),
}
CONTESTANTS = (
    "calledshot",
    "transformers eager attention, autocast",
    "transformers eager attention, bf16 + master",
    "transformers sdpa, autocast",
    "transformers sdpa, bf16 + master",
    "litgpt, autocast",
    "litgpt, bf16 + master",
    "x-transformers, autocast",
    "x-transformers, bf16 + master",
    "nanoGPT, autocast",
)


def tokens(size: Size, device: str) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, size.vocabulary, (size.rows, size.context + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def calledshot(size: Size, device: str) -> tuple[Callable[[], float], int]:
    """The step as `shot train` does it: document masks, float32 masters, norms and all."""
    import torch

    from calledshot.model import Decoder
    from calledshot.recipe import Recipe, schema
    from calledshot.training.optimizer import Optimizer
    from calledshot.training.slots import make_slots

    model_keys = schema.Model(
        layers=size.layers, width=size.width, heads=size.heads, kv_heads=size.kv_heads, hidden=size.hidden,
        vocabulary=size.vocabulary, context=size.context, tied_embeddings=True, qk_norm=False,
    )  # fmt: skip
    recipe = Recipe(model=model_keys, optimizer=schema.Optimizer(name="adamw", learning_rate=1e-3))
    with torch.device(device):
        model = Decoder(model_keys)
    model.initialise(torch.Generator(device).manual_seed(SEED))
    masters = {name: parameter.data for name, parameter in model.named_parameters()}
    model.bfloat16()
    model.blocked_attention = device == "cpu"
    model.compile_blocks()
    optimizer = Optimizer(make_slots(model, masters), recipe, compiled=True)
    inputs, targets = tokens(size, device)
    weights = torch.ones(inputs.shape, device=device)
    positions = torch.arange(size.context, device=device, dtype=torch.int32).expand_as(inputs)
    documents = torch.zeros_like(positions)
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        loss, z_loss = model.loss(
            inputs, targets, weights, 1 / weights.sum(), 0.0, positions_BT=positions, documents_BT=documents
        )
        (loss + z_loss).backward()
        for slot in optimizer.slots:
            slot.collect()
        optimizer.step(number, optimizer.gradient_norm(), 1.0)
        optimizer.clear()
        return float(loss)

    return step, sum(p.numel() for p in model.parameters())


def peer(size: Size, device: str, name: str, nanogpt: str) -> tuple[Callable[[], float], int]:
    import torch
    import torch.nn.functional as F

    inputs, targets = tokens(size, device)
    library, _, settings = name.partition(" ") if name.startswith("transformers") else name.partition(", ")
    if library == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.context, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        config._attn_implementation = "eager" if settings.startswith("eager") else "sdpa"
        model: Any = LlamaForCausalLM(config)
        forward = lambda m: m(input_ids=inputs).logits  # noqa: E731
    elif library == "litgpt":
        from litgpt import GPT, Config

        model = GPT(
            Config(
                name="", block_size=size.context, n_layer=size.layers, n_head=size.heads, n_embd=size.width,
                n_query_groups=size.kv_heads, head_size=size.width // size.heads, padded_vocab_size=size.vocabulary,
                vocab_size=size.vocabulary, rotary_percentage=1.0, parallel_residual=False, bias=False,
                norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=size.hidden,
            )
        )  # fmt: skip
        model.lm_head.weight = model.transformer.wte.weight
        forward = lambda m: m(inputs)  # noqa: E731
    elif library == "x-transformers":
        from x_transformers import Decoder as Layers
        from x_transformers import TransformerWrapper

        model = TransformerWrapper(
            num_tokens=size.vocabulary, max_seq_len=size.context, use_abs_pos_emb=False, tie_embedding=True,
            attn_layers=Layers(
                dim=size.width, depth=size.layers, heads=size.heads, attn_kv_heads=size.kv_heads,
                attn_dim_head=size.width // size.heads, use_rmsnorm=True, ff_swish=True, ff_glu=True, ff_no_bias=True,
                ff_mult=size.hidden / size.width, rotary_pos_emb=True, attn_flash=True,
            ),
        )  # fmt: skip
        forward = lambda m: m(inputs)  # noqa: E731
    else:
        sys.path.insert(0, nanogpt)
        from model import GPT as NanoGPT  # type: ignore[import-not-found]
        from model import GPTConfig  # type: ignore[import-not-found]

        model = NanoGPT(
            GPTConfig(
                block_size=size.context, vocab_size=size.vocabulary, n_layer=size.layers, n_head=size.heads,
                n_embd=size.width, dropout=0.0, bias=False,
            )
        )  # fmt: skip
        forward = lambda m: m(inputs, targets)[0]  # noqa: E731
    model = model.to(device)
    count = sum(p.numel() for p in model.parameters())
    master = "master" in settings
    if master:
        originals = [p.detach().clone().float().requires_grad_() for p in model.parameters()]
        model = model.bfloat16()
    else:
        originals = list(model.parameters())
    optimizer = torch.optim.AdamW(originals, lr=1e-3, fused=True)

    # The loss is compiled with the model: that is what its users' guides do, and the quickest for every peer here.
    def compute() -> Any:
        logits = forward(model)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    compiled = torch.compile(compute)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=not master):
            loss = compiled()
        loss.backward()
        if master:
            for parameter, original in zip(model.parameters(), originals, strict=True):
                original.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(originals, 1.0)
        optimizer.step()
        if master:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), originals)
        optimizer.zero_grad()
        return float(loss)

    return step, count


def work(name: str, size: Size, device: str, threads: int, nanogpt: str) -> None:
    """A contestant's process: one line of JSON for each line read, which says how many steps to do."""
    import torch

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some peers print
    if device == "cpu":
        torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    begun = time.perf_counter()
    step, count = calledshot(size, device) if name == "calledshot" else peer(size, device, name, nanogpt)
    first = step()
    print(json.dumps({"parameters": count, "first": time.perf_counter() - begun, "loss": first}), file=out, flush=True)
    for line in sys.stdin:
        times, loss = [], 0.0
        reset_peak(device)
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()  # reading the loss waits for the device
            times.append(time.perf_counter() - start)
        print(json.dumps({"times": times, "loss": loss, "memory": peak(device)}), file=out, flush=True)


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes at the most since `reset_peak`: resident memory of the process on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def available(name: str, nanogpt: str) -> bool:
    module = {"transformers": "transformers", "litgpt": "litgpt", "x-transformers": "x_transformers"}
    library = name.replace(",", " ").split()[0]
    return name == "calledshot" or bool(nanogpt if library == "nanoGPT" else importlib.util.find_spec(module[library]))


def race(label: str, size: Size, names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of all contestants in turn; one row each."""
    from calledshot.cli import SPIN_COUNT
    from calledshot.machine import matmul_peak

    processes: dict[str, subprocess.Popen[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    peaks: list[float] = []

    def answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        """The next line of a contestant; one that has died is named and leaves the race."""
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        print(f"{label} {name}: gave up: {process.stderr.read().strip().splitlines()[-1:]}", file=sys.stderr)
        processes.pop(name, None)
        rows.pop(name, None)
        return None

    for name in names:
        command = [sys.executable, __file__, "--work", name, "--sizes", label, "--device", arguments.device]
        command += ["--threads", str(arguments.threads), "--nanogpt", arguments.nanogpt]
        pipe = subprocess.PIPE
        environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ}  # as `shot` sets it: for everybody
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        if ready := answer(name, process):
            processes[name] = process
            rows[name] = {"name": name, **ready, "times": [], "memory": 0}
            print(f"{label} {name}: ready after {ready['first']:.0f} s", file=sys.stderr, flush=True)
    for number in range(arguments.rounds + 1):
        for name, process in list(processes.items()):
            assert process.stdin is not None
            process.stdin.write(f"{arguments.steps}\n")
            process.stdin.flush()
            done = answer(name, process)
            if done and number:  # the first round warms up
                rows[name]["times"].append(statistics.median(done["times"]))
                rows[name]["memory"] = max(rows[name]["memory"], done["memory"])
        peaks += matmul_peak("bfloat16", seconds=0.3, device=arguments.device)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
    batch = size.rows * size.context
    for row in rows.values():
        row["tokens_per_second"] = batch / statistics.median(row["times"])
        row["peaks"] = (min(peaks), max(peaks))
    return list(rows.values())


def table(label: str, size: Size, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    from calledshot.machine import mfu_range
    from calledshot.recipe import Recipe, cost, schema

    model = schema.Model(
        layers=size.layers, width=size.width, heads=size.heads, kv_heads=size.kv_heads, hidden=size.hidden,
        vocabulary=size.vocabulary, context=size.context, tied_embeddings=True, qk_norm=False,
    )  # fmt: skip
    duration = schema.Duration(tokens=1)
    flops = cost(Recipe(model=model, duration=duration, batch=schema.Batch(tokens=size.context))).flops_per_token.total
    peers = [row for row in rows if row["name"] != "calledshot"]
    ours = next(row for row in rows if row["name"] == "calledshot")
    lines = [
        f"**{label}**: {size.layers} layers, width {size.width}, {size.heads} heads on {size.kv_heads}, "
        f"hidden {size.hidden}, vocabulary {size.vocabulary}, tied; {size.rows} x {size.context} tokens an update; "
        f"{arguments.rounds} rounds of {arguments.steps} steps in turn.",
        "",
        "| | parameters | tokens/s (median) | calledshot / it, by round | matmul peak used | memory | first step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row["tokens_per_second"]):
        ratios = sorted(theirs / mine for mine, theirs in zip(ours["times"], row["times"], strict=True))
        low, high, _ = mfu_range(row["tokens_per_second"] * flops, row["peaks"])
        share = "-".join("n/a" if end is None else f"{end:.0%}" for end in (low, high))
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.2f}M | {row['tokens_per_second']:,.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | {share} | "
            f"{row['memory'] / 2**20:,.0f} MiB | {row['first']:.0f} s |"
        )
    if peers:
        best = max(peers, key=lambda row: row["tokens_per_second"])
        ratios = [theirs / mine for mine, theirs in zip(ours["times"], best["times"], strict=True)]
        lines += ["", f"Against the best peer setting ({best['name']}): {statistics.median(ratios):.2f} x."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10M", "50M"], choices=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[], help="contestants whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT (its MHA has more parameters than GQA)")
    parser.add_argument("--out", default="", help="write the Markdown table there")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, SIZES[arguments.sizes[0]], arguments.device, arguments.threads, arguments.nanogpt)
        return
    names = [name for name in CONTESTANTS if not arguments.only or any(part in name for part in arguments.only)]
    missing = [name for name in names if not available(name, arguments.nanogpt)]
    if missing:
        print(f"left out, not installed: {'; '.join(missing)}", file=sys.stderr)
    names = [name for name in names if name not in missing]
    import torch

    from calledshot import machine

    here = machine.describe()
    parts = [
        "# Training speed\n",
        f"`python benchmarks/training_speed.py --sizes {' '.join(arguments.sizes)}`: {here['cpu']['model']}, "
        f"{arguments.threads} threads, torch {torch.__version__}, allocator {here['allocator']}, {arguments.device}.",
    ]
    for label in arguments.sizes:
        parts.append(table(label, SIZES[label], race(label, SIZES[label], names, arguments), arguments))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
