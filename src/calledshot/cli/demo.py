"""`shot demo`: the public commands one after another, and nothing else."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

PROMPTS = ("def read_lines(path):\n", "class Queue:\n")


def demo(
    *, minutes: Annotated[float | None, Parameter(help="Minutes to train; without it the recipe's.")] = None
) -> int:
    """Train a small model on this interpreter's standard library, evaluate it, sample from it and write its report.

    Everything lands in the current folder: runs/demo, data/ and report.html.
    """
    name = "demo" if minutes is None else f"demo-{minutes:g}min"
    override = [] if minutes is None else [f"duration.minutes={minutes:g}"]
    report = Path("report.html" if minutes is None else f"report-{name}.html")
    steps: list[tuple[str, list[str]]] = [
        ("What it will be", ["recipe", "show", "demo", *override]),
        ("Text to tokens", ["data", "build", "demo"]),
        ("Training", ["train", "demo", "--name", name, *override]),
        ("Held-out text, beside a compressor", ["eval", name, "--compressors"]),
        *(("A sample", ["generate", name, prompt, "--tokens", "80", "--seed", "1"]) for prompt in PROMPTS),
        ("The report", ["report", name, "-o", str(report)]),
    ]
    begun = time.monotonic()
    for title, arguments in steps:
        print(f"\n== {title}: {shown(arguments)}", file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", "calledshot", *arguments], check=False).returncode
        if code:
            print(f"shot: that ended with exit code {code}; the same `shot demo` goes on from there", file=sys.stderr)
            return code if code > 0 else 128 - code
    spent = time.monotonic() - begun
    lines = [
        f"\nDone in {spent / 60:.1f} minutes. The run is in runs/{name}, its report in {report}. Next:",
        f"  {shown(['chat', name]):<58} a prompt to talk to it",
        f"  {shown(['generate', name, 'class Stack:']):<58} what it makes of your own prompt",
        f"  {shown(['serve', name]):<58} an OpenAI-compatible endpoint",
        f"  {shown(['export', name, f'{name}-hf']):<58} a Hugging Face folder",
        f"  {shown(['data', 'show', 'demo']):<58} what the model saw",
        f"  {shown(['recipe', 'show', '125M']):<58} what a bigger one would cost",
    ]
    print("\n".join(lines))
    return 0


def shown(arguments: list[str]) -> str:
    """A command as it can be typed here: with the interpreter's own folder where `shot` is not on the PATH."""
    return f"{program()} {shlex.join(arguments)}"


def program() -> str:
    """`shot`, or where it is."""
    here = Path(sys.executable).with_name("shot")
    found = shutil.which("shot")
    if found and Path(found).resolve() == here.resolve():
        return "shot"
    if here.exists():
        return shlex.quote(os.path.relpath(here))
    return f"{shlex.quote(sys.executable)} -m calledshot"
