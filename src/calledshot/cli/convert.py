"""`shot export`: a run's model for other programs."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from calledshot.recipe import UsageError


def export(
    run: Annotated[str, Parameter(help="Name or folder of the run, or RUN@STEP.")],
    folder: Annotated[Path, Parameter(help="Where to write; made if it is not there.")],
    /,
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Parameter(help="Of the weights: float32 is what was trained, bfloat16 is half as large."),
    ] = "float32",
    step: Annotated[int | None, Parameter(help="Checkpoint; without it the newest.")] = None,
    force: Annotated[bool, Parameter(help="Replace the model in a folder that is not empty.", negative=())] = False,
) -> None:
    """Write the model as a Hugging Face folder: Qwen3 with QK-norm, Llama without.

    `transformers`, vLLM, llama.cpp's converter and whatever else reads such folders can use it.
    """
    import torch

    from calledshot.model.huggingface import architecture, export_huggingface
    from calledshot.rundir import find_lab, resolve_checkpoint
    from calledshot.training import load_model, run_recipe
    from calledshot.training.state import read_counters

    directory, named = resolve_checkpoint(run, find_lab())
    if None not in (named, step) and named != step:
        raise UsageError(f"--step {step}: {run} names another step already; write one of the two")
    architecture(run_recipe(directory).model)
    loaded = load_model(directory, named if step is None else step)
    tokens = read_counters(directory.checkpoint_path(loaded.step)).tokens
    files = export_huggingface(
        folder,
        loaded.recipe.model,
        loaded.model.state_dict(),
        loaded.tokenizer,
        dtype=getattr(torch, dtype),
        provenance=f"Run `{directory.name}` of calledshot, step {loaded.step:,}, {tokens:,} tokens.",
        force=force,
    )
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    call = f"pipeline('text-generation', {str(folder)!r})('Once', max_new_tokens=50)"
    code = f"from transformers import pipeline; print({call})"
    print(f'\n{architecture(loaded.recipe.model)}, step {loaded.step:,}, {dtype}. Next:\n  python -c "{code}"')
