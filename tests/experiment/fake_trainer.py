"""A trainer of somebody else's, that keeps its records through the shim: `train`, `convert`, `generate`, `eval`.

Arms called `fails` fail unless FAKE_MENDED is set; each of the 10 steps takes FAKE_SECONDS. The held-out loss is 1.5,
less 0.1 for an arm called `good`, and moves by 0.001 with the seed.
"""

import json
import os
import runpy
import signal
import sys
import time
import tomllib
from pathlib import Path

Shim = runpy.run_path(str(Path(__file__).parents[2] / "src" / "calledshot" / "rundir" / "shim.py"))["Shim"]
STEPS = 10


def train(file: str, name: str) -> int:
    recipe = tomllib.loads(Path(file).read_text())
    path = Path("runs", name)
    rows = (path / "metrics.jsonl").read_text().splitlines() if path.exists() else []
    begin = max((json.loads(row)["step"] for row in rows if row), default=0)
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.toml").write_text(Path(file).read_text())
    if "--from" in sys.argv:
        (path / "lineage.json").write_text(json.dumps({"parent": sys.argv[sys.argv.index("--from") + 1]}))
    with open("started", "a") as log:
        log.write(f"{name} {begin} {time.time()}\n")
    run = Shim(str(path))
    if "fails" in name and "FAKE_MENDED" not in os.environ:
        run.end("failed", "the weights are not finite")
        print("shot: the weights are not finite", file=sys.stderr)
        return 1
    tokens, loss = recipe["duration"]["tokens"], 1.5 - 0.1 * ("good" in name) + 0.001 * recipe["seed"]
    for step in range(begin + 1, STEPS + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        share = step / STEPS
        run.step(step, loss=2.0, tokens=share * tokens, flops=share * tokens * 1e6, lr=0.02, tokens_per_second=1e4)
        if stopped:
            run.end("interrupted")
            return 130
    row = {"bits_per_byte": loss, "bytes_evaluated": 1000}
    rate = 1e4 / recipe["model"]["layers"]
    summary = {"final": {"text": row}, "tokens_per_second": rate, "peak_memory_bytes": 1e8}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "checkpoints" / f"step-{STEPS:07d}").mkdir(parents=True)
    run.end()
    with open("ended", "a") as log:
        log.write(f"{name} {time.time()} {recipe['parallel']['threads']}\n")
    return 0


verb, first, *rest = sys.argv[1:]
if verb == "train":
    sys.exit(train(first, rest[rest.index("--name") + 1]))
elif verb == "convert":
    made = Path("runs", rest[-1])
    made.mkdir()
    (made / "status.json").write_text(json.dumps({"state": "done", "made": [first, *rest]}))
elif verb == "generate":
    tokens = int(rest[rest.index("--tokens") + 1])
    seed = int(rest[rest.index("--seed") + 1])
    print(json.dumps({"completions": [{"tokens": tokens if seed else 3}], "tokens_per_second": 100.0 + seed}))
elif "nonsense" in rest:
    sys.exit("shot: --predict nonsense: there is no such question")
else:
    far = 1.0 * (Path("runs", first, "status.json").read_text().count("extend") > 0)
    sources = {"a": {"bits_per_byte": 1.0 + far, "bytes": 100}, "b": {"bits_per_byte": 2.0 + far, "bytes": 300}}
    print(json.dumps([{"run": first, "sources": sources}]))
