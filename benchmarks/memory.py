"""What whole steps hold against what `recipe.memory` says they do, over a grid of shapes.

    python benchmarks/memory.py --out docs/memory.md
    python benchmarks/memory.py --only "experts, top 2 (bfloat16)" --places 30

Every case runs in processes of its own, one a rank: the training engine as `shot train` builds it, three updates of
random tokens. On a CPU an allocator around PyTorch's (`live_bytes.cpp`) counts each allocation and release of a
tensor's memory, whoever makes it in whichever thread: operators, what autograd keeps, compiled code, outputs passed in,
what travels between ranks. The most that lives at one time in the third update is the peak. On a GPU that is
`torch.cuda.max_memory_allocated`. Numbers are of the rank that holds most.

`--places` tells where it was asked for instead, by PyTorch's profiler, which does not see what other threads release.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `shot` sets it

import numpy as np
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from calledshot.data import Tokenizer
from calledshot.model import loss
from calledshot.objective import Batch, Encoded
from calledshot.recipe import Recipe, layout, load_recipe, shape
from calledshot.recipe.memory import Footprint, Setting, footprint
from calledshot.training.engine import Engine
from calledshot.training.probe import Machine
from calledshot.training.world import World

WARM = 2
"""Updates before the one that is measured: what is kept from step to step is there by then."""
BASE = (
    "model.layers=6", "model.width=256", "model.heads=4", "model.kv_heads=2", "model.context=256",
    "model.vocabulary=4096", "optimizer.name=adamw",
)  # fmt: skip


class Count:
    """The allocator that counts; to be made before the first tensor is."""

    def __init__(self) -> None:
        torch_folder, here = Path(torch.__file__).parent, Path(__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "live_bytes.so"
            command = [
                os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
                str(here / "live_bytes.cpp"), f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(built),
            ]  # fmt: skip
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(built))
        self._library.peak.restype = ctypes.c_int64
        self._library.install()

    def begin(self) -> None:
        """Forget what lived at most until now."""
        self._library.forget_peak()

    @property
    def peak(self) -> int:
        """Bytes that lived at most since."""
        return self._library.peak()


@dataclass(frozen=True)
class Case:
    """A recipe on so many ranks, computed one way."""

    name: str
    overrides: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    compiled: bool = False
    rows: int = 4
    """Of the batch."""
    micro_rows: int = 4
    ranks: int = 1

    @property
    def key(self) -> str:
        """Tells it from all others."""
        kind = f"{self.dtype}{', compiled' if self.compiled else ''}"
        return f"{self.name} ({kind}{f', {self.ranks} ranks' if self.ranks > 1 else ''})"

    def recipe(self) -> Recipe:
        """With a batch of `rows` sequences."""
        keys = [f"parallel.dtype={self.dtype}", f"parallel.compile={'on' if self.compiled else 'off'}", *self.overrides]
        base = load_recipe("demo", [*BASE, *keys], checked=False)
        positions = shape(base.model).row_positions
        sizes = [f"batch.tokens={self.rows * positions}", f"parallel.micro_tokens={self.micro_rows * positions}"]
        return load_recipe("demo", [*BASE, *keys, *sizes, f"duration.tokens={self.rows * positions}"])


def make_batch(recipe: Recipe, rows: int) -> Batch:
    """Random tokens, three documents a row; of a prefix LM's the first half is seen both ways."""
    model, generator = shape(recipe.model), np.random.default_rng(0)

    def side(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        size = -(-length // 3)
        tokens = generator.integers(0, model.vocabulary, (rows, length), dtype=np.int32)
        return tokens, place // size, place % size

    inputs, documents, positions = side(model.context)
    regions = np.zeros_like(inputs, dtype=np.int8)
    if model.topology == "prefix":
        regions[positions < model.context // 6] = 1
    encoded = None
    if model.encoder_context:
        read, their_documents, places = side(model.encoder_context)
        encoded = Encoded(read, their_documents, places)
    weights = np.ones_like(inputs, dtype=np.float32)
    sources = np.zeros(rows, dtype=np.int32)
    return Batch(inputs, np.roll(inputs, -1, 1), weights, documents, positions, regions, sources, encoded)


class Steps:
    """An engine that is warm."""

    def __init__(self, case: Case, world: World) -> None:
        loss._workspace.cache_clear()  # an earlier case's
        recipe = case.recipe()
        threads = torch.get_num_threads()
        chosen = Machine(world.device.type, case.dtype, case.compiled, threads, recipe.parallel.micro_tokens)
        self.engine = Engine(recipe, chosen, world, Tokenizer.train(["a b"], 1024), Path())
        start, stop = self.engine.rows
        self.batch = make_batch(recipe, stop - start)
        self.number = 0
        for _ in range(WARM):
            self.step()

    def step(self) -> None:
        """One update."""
        self.number += 1
        self.engine.update(self.batch, self.number, 1.0)
        self.engine.optimizer.clear()


def measure(case: Case, count: Count | None) -> int:
    """Bytes that live at most during an update of this rank."""
    world = World.join()
    world.arrange(layout(case.recipe(), world.size))
    steps = Steps(case, world)
    if count is None:
        torch.cuda.reset_peak_memory_stats()
    else:
        count.begin()
    steps.step()
    found = torch.cuda.max_memory_allocated() if count is None else count.peak
    world.leave()
    return found


def places(case: Case) -> list[tuple[int, str]]:
    """What lives at the fullest moment of an update: bytes, and the profiler's ranges in which they were asked for."""
    world = World.join()
    world.arrange(layout(case.recipe(), world.size))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps = Steps(case, world)
        with record_function("measured"):
            steps.step()
    world.leave()
    events, stack = [], [(event, ()) for event in profiler.profiler.kineto_results.experimental_event_tree()]  # ty: ignore
    while stack:
        event, path = stack.pop()
        if event.typed[0] == _EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1], path))
        stack += [(child, (*path, event.name)) for child in event.children]
    events.sort(key=lambda each: each[0])
    peak = max((what for _, what, path in events if "measured" in path), key=lambda what: what.total_allocated)
    live: dict[int, tuple[int, str]] = {}
    for _, what, path in events:
        if what.alloc_size > 0:
            live[what.ptr] = what.alloc_size, " > ".join(path)
        else:
            live.pop(what.ptr, None)
        if what is peak:
            break
    total: Counter[str] = Counter()
    for size, path in live.values():
        total[path] += size
    return [(size, path) for path, size in total.most_common()]


def predicted(case: Case, device: str) -> Footprint:
    """What the arithmetic says of it."""
    recipe = case.recipe()
    how = Setting(device, 2 if case.dtype == "bfloat16" else 4, case.compiled, recipe.parallel.activation_checkpointing)
    return footprint(recipe, layout(recipe, case.ranks), recipe.parallel.micro_tokens, how)


def in_processes(case: Case, *arguments: str, file: str = __file__) -> list[str]:
    """What a file's ranks print of a case, the last line of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(case.ranks):
        place = {
            "RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": case.ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        environment = os.environ | ({key: str(value) for key, value in place.items()} if case.ranks > 1 else {})
        command = [sys.executable, file, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case.name}: a rank failed")
    return [answer.splitlines()[-1] for answer in answers]


def model(**keys: object) -> tuple[str, ...]:
    """Overrides of the section."""
    return tuple(f"model.{key}={value}" for key, value in keys.items())


MUON, RECOMPUTED = ("optimizer.name=muon",), "parallel.activation_checkpointing="
PREFIX, BOTH = (
    ("model.topology=prefix", "objective.kind=prefix"),
    ("model.topology=encoder-decoder", "objective.kind=span"),
)
DRAWN = "drawn "
WIDE = model(width=768, heads=12, kv_heads=4, layers=8)

EAGER = (
    Case("decoder", dtype="float32"),
    Case("decoder"),
    Case("decoder, Muon", MUON),
    Case("decoder, Muon", MUON, "float32"),
    Case("3 micro-batches", rows=6, micro_rows=2),
    Case("2 micro-batches", dtype="float32", rows=4, micro_rows=2),
    Case("width 128, context 2048", model(width=128, context=2048), rows=1, micro_rows=1),
    Case("width 128, context 2048", model(width=128, context=2048), "float32", rows=1, micro_rows=1),
    Case("width 512, 8,192 tokens", model(width=512, heads=8, layers=4), rows=32, micro_rows=32),
    Case("width 768, one row, Muon", (*WIDE, *MUON), rows=1, micro_rows=1),
    Case("width 768, one row", WIDE, "float32", rows=1, micro_rows=1),
    Case("vocabulary 32,768", model(vocabulary=32_768), rows=8, micro_rows=8),
    Case("tied, GELU, sandwich", model(tied_embeddings="true", feed_forward="gelu", norm_placement="sandwich")),
    Case("no QK-norm, cap, MQA", model(qk_norm="false", softcap=30, kv_heads=1), "float32"),
    Case("post norm, LayerNorm, ReLU²", model(norm="layernorm", norm_placement="post", feed_forward="relu2")),
    Case("T5 positions, MHA", model(positions="t5", kv_heads=4)),
    Case("prefix, context 1,024", (*PREFIX, *model(context=1024))),
    Case("encoder-decoder", (*BOTH, *model(layers=4))),
    Case(
        "encoder-decoder, pooled",
        (*BOTH, *model(layers=4, encoder_pooling=2, encoder_context=1024)),
        "float32",
        rows=2,
        micro_rows=2,
    ),
    Case("8 experts, top 2", model(experts=8)),
    Case("8 experts, top 2, Muon", (*model(experts=8), *MUON), rows=8, micro_rows=2),
    Case("64 experts, top 8, shared", model(experts=64, top_k=8, shared_expert_hidden=128, dense_layers=1), "float32"),
    Case("selective", (RECOMPUTED + "selective",)),
    Case("full", (RECOMPUTED + "full",)),
)
COMPILED = (
    Case("decoder", dtype="float32"),
    Case("decoder, Muon", MUON),
    Case("width 512, 8,192 tokens", model(width=512, heads=8, layers=4), rows=32, micro_rows=32),
    Case("width 768, Muon", (*WIDE, *MUON), rows=4, micro_rows=4),
    Case("width 128, context 2048", model(width=128, context=2048, kv_heads=4), rows=2, micro_rows=1),
    Case("context 4096", model(layers=2, context=4096), rows=1, micro_rows=1),
    Case("vocabulary 32,768", model(vocabulary=32_768), rows=8, micro_rows=8),
    Case("prefix, tied, sandwich", (*PREFIX, *model(tied_embeddings="true", norm_placement="sandwich"))),
    Case("encoder-decoder, T5 positions", (*BOTH, *model(layers=4, positions="t5"))),
    Case("8 experts, top 2", model(experts=8, context=1024)),
    Case("selective", (RECOMPUTED + "selective",)),
    Case("full", (RECOMPUTED + "full",)),
)
SHARED = (
    Case("replicas", ranks=2),
    Case("replicas, Muon", MUON, "float32", ranks=2),
    Case("replicas, one row", (*WIDE, *MUON), ranks=2, rows=2, micro_rows=1),
    Case("shards", ("parallel.shard=2",), ranks=2),
    Case("shards, one row", ("parallel.shard=2", *WIDE), ranks=2, rows=2, micro_rows=1),
    Case("shards, Muon, one row", ("parallel.shard=2", *WIDE, *MUON), ranks=2, rows=2, micro_rows=1),
    Case("shards, 3 micro-batches", ("parallel.shard=2",), ranks=2, rows=12, micro_rows=2),
    Case("shards, Muon", ("parallel.shard=2", *MUON), "float32", ranks=2),
    Case("shards", ("parallel.shard=3",), ranks=3, rows=6, micro_rows=2),
    Case("shards, compiled, full", ("parallel.shard=2", RECOMPUTED + "full"), compiled=True, ranks=2),
    Case("2 × 2, Muon", ("parallel.shard=2", "parallel.replicate=2", *MUON), ranks=4, rows=8, micro_rows=2),
    Case("tensor", ("parallel.tensor=2",), ranks=2),
    Case("tensor, Muon", ("parallel.tensor=2", *MUON), "float32", ranks=2),
    Case("tensor, compiled", ("parallel.tensor=2",), compiled=True, ranks=2),
    Case("context", ("parallel.context=2",), ranks=2),
    Case("context, compiled", ("parallel.context=2", *model(context=1024)), compiled=True, ranks=2),
    Case("experts", ("parallel.expert=2", *model(experts=8)), ranks=2, rows=8),
)
CASES = (*EAGER, *(replace(case, compiled=True) for case in COMPILED), *SHARED)


def drawn(number: int, compiled: bool) -> Case:
    """A case that nobody chose."""
    draw = random.Random(number)
    width, heads = draw.choice(((128, 2), (192, 3), (256, 4), (384, 6), (512, 8), (768, 12)))
    kv_heads = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    context = draw.choice((128, 256, 384, 512, 1024, 2048))
    keys = {
        "width": width, "heads": heads, "kv_heads": kv_heads, "context": context, "layers": draw.randint(2, 8),
        "vocabulary": draw.choice((1024, 5000, 16_384, 50_257)), "tied_embeddings": draw.choice(("true", "false")),
        "qk_norm": draw.choice(("true", "false")), "feed_forward": draw.choice(("swiglu", "geglu", "gelu", "relu2")),
        "norm": draw.choice(("rmsnorm", "layernorm")), "positions": draw.choice(("rope", "rope", "t5", "none")),
        "norm_placement": draw.choice(("pre", "pre", "post", "sandwich")), "softcap": draw.choice((0, 0, 20)),
    }  # fmt: skip
    if draw.random() < 0.3:
        keys |= {"experts": draw.choice((4, 16)), "top_k": draw.choice((1, 2)), "renormalize": "false"}
        keys |= {"shared_expert_hidden": draw.choice((0, 128)), "dense_layers": draw.choice((0, 1))}
    objective = draw.choice(((), (), PREFIX, BOTH))
    optimizer = f"optimizer.name={draw.choice(('adamw', 'muon'))}"
    recomputed = RECOMPUTED + draw.choice(("none", "none", "selective", "full"))
    micro_rows = draw.choice([n for n in (1, 2, 4, 8, 16) if n * context <= 4096])
    rows, dtype = micro_rows * draw.choice((1, 1, 2, 3)), draw.choice(("float32", "bfloat16"))
    return Case(
        f"{DRAWN}{number}", (*objective, *model(**keys), optimizer, recomputed), dtype, compiled, rows, micro_rows
    )


def find(key: str) -> Case:
    """The case of a key."""
    if key.startswith(DRAWN):
        return drawn(int(key.removeprefix(DRAWN).partition(" ")[0]), "compiled" in key)
    return {case.key: case for case in CASES}[key]


def report(cases: list[Case], device: str) -> list[str]:
    """The table, a line as soon as it is known."""
    lines = [
        "| | ranks | type | blocks | tokens | measured, MiB | predicted | error | fullest in |",
        "|---|--:|---|---|--:|--:|--:|--:|---|",
    ]
    print("\n".join(lines))
    for case in cases:
        said = predicted(case, device)
        most = max(map(int, in_processes(case, "--measure", case.key)))
        tokens = case.recipe().parallel.micro_tokens
        lines.append(
            f"| {case.name} | {case.ranks} | {case.dtype} | {'compiled' if case.compiled else 'eager'} | {tokens:,} | "
            f"{most / 2**20:,.1f} | {said.peak / 2**20:,.1f} | {said.peak / most - 1:+.1%} | {said.moment} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose keys hold this")
    parser.add_argument("--places", type=int, default=0, help="so many places that hold most, instead of the table")
    parser.add_argument("--drawn", type=int, default=0, help="so many shapes drawn at random, and a quarter compiled")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--list-places", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(find(arguments.measure), None if torch.cuda.is_available() else Count()))
        return
    if arguments.list_places:
        print(json.dumps(places(find(arguments.list_places))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.cuda.device_count() if device == "cuda" else 4
    chosen = [case for case in CASES if arguments.only in case.key and case.ranks <= most]
    if arguments.drawn:
        chosen = [drawn(number, number % 4 == 3) for number in range(arguments.drawn)]
    if arguments.places:
        for case in chosen:
            print(case.key)
            for size, path in json.loads(in_processes(case, "--list-places", case.key)[0])[: arguments.places]:
                print(f"{size:>14,}  {path[-200:]}")
        return
    lines = report(chosen, device)
    if arguments.out:
        # What is around the table was written by hand.
        text = arguments.out.read_text(encoding="utf-8")
        begin, end = text.index(lines[0][:20]), text.rindex("|\n") + 2
        arguments.out.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
