"""How fast text becomes ids on one core: tiktoken's path and the `tokenizers` one, with the same merges.

    python benchmarks/encoding.py [--vocabulary 8192] [--rounds 5] [--out docs/encoding.md]

Both encode the same documents of the standard library in turns, in one process on one thread; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

# Before tokenizers starts its threads.
os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from calledshot.data.readers import read
from calledshot.data.shards import dtype_for
from calledshot.data.sources import resolve
from calledshot.data.tokenizer import Tokenizer, as_array
from calledshot.machine import describe
from calledshot.recipe.schema import Data


def main() -> None:
    """Measure, print, and write the table on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as folder:
        (corpus,) = resolve(Data(), Path(folder))
    texts = [doc.text for chunk in corpus.chunks() for doc in read(chunk, corpus.source, Counter())]
    start = time.perf_counter()
    fast = Tokenizer.train(texts, options.vocabulary)
    training = time.perf_counter() - start
    slow = fast.without_tiktoken()
    ids = [slow.encode(text) for text in texts]
    assert fast.encoder == "tiktoken" and ids == [fast.encode(text) for text in texts], "the encoders disagree"
    tokens, size = sum(map(len, ids)), sum(len(text.encode()) for text in texts)

    dtype = dtype_for(fast.size)
    ways: dict[str, Callable[[str], object]] = {
        "tiktoken": fast.encode,
        "tiktoken, as stored in shards": lambda text: as_array(fast, text, dtype),
        "tokenizers": slow.encode,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, encode in ways.items():
            start = time.perf_counter()
            for text in texts:
                encode(text)
            seconds[name].append(time.perf_counter() - start)

    lines = [
        f"{date.today()}: {len(texts)} documents of the standard library, {size / 1e6:.1f} MB, {tokens / 1e6:.2f}M "
        f"tokens at a vocabulary of {fast.size}; one core ({describe()['cpu']['model']}), {options.rounds} rounds in "
        f"turns. The ids are identical. Training the tokenizer took {training:.1f} s on that core.",
        "",
        "| encoder | Mtok/s a core, median | lowest to highest | MB/s |",
        "|---|---|---|---|",
    ]
    for name, measured in seconds.items():
        median = statistics.median(measured)
        spread = f"{tokens / max(measured) / 1e6:.2f} to {tokens / min(measured) / 1e6:.2f}"
        lines.append(f"| {name} | {tokens / median / 1e6:.2f} | {spread} | {size / median / 1e6:.1f} |")
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(
            f"# Encoding\n\n`python benchmarks/encoding.py --vocabulary {options.vocabulary}`\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
