"""How long the command takes to answer, as a whole process.

python benchmarks/startup.py --out docs/startup.md
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from calledshot import machine

COMMANDS = (
    [sys.executable, "-c", "pass"],
    [sys.executable, "-m", "calledshot", "--help"],
    [sys.executable, "-m", "calledshot", "train", "--help"],
    [sys.executable, "-m", "calledshot", "recipe", "show", "demo", "--json"],
    [sys.executable, "-m", "calledshot", "recipe", "list"],
    [sys.executable, "-m", "calledshot", "runs"],
    [sys.executable, "-m", "calledshot", "doctor"],
    [sys.executable, "-c", "import torch"],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="", help="write the Markdown table there")
    arguments = parser.parse_args()
    times: list[list[float]] = [[] for _ in COMMANDS]
    for number in range(arguments.rounds + 1):
        for taken, command in zip(times, COMMANDS, strict=True):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            if number:
                taken.append(time.perf_counter() - start)
    lines = [
        "# Start-up\n",
        f"`python benchmarks/startup.py`: whole processes; {machine.describe()['cpu']['model']}; "
        f"median of {arguments.rounds} rounds.\n",
        "| | seconds |",
        "|---|--:|",
    ]
    for taken, command in zip(times, COMMANDS, strict=True):
        shown = " ".join(["python", *command[1:]]).replace("python -m calledshot", "shot")
        lines.append(f"| `{shown}` | {statistics.median(taken):.2f} ({min(taken):.2f}-{max(taken):.2f}) |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
