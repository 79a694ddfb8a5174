"""`shot convert`, `shot import` and `shot export`: models changed in shape, brought in, and handed on."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from calledshot.recipe import RunError, UsageError

if TYPE_CHECKING:
    from calledshot.rundir import RunDirectory

app = App(name="convert", help="Make a run whose model is another run's with experts, fewer key heads or more context.")

Origin = Annotated[str, Parameter(help="Name or folder of the run, or RUN@STEP.")]
Name = Annotated[str, Parameter(help="What the new run is to be called.")]


@app.command
def upcycle(
    run: Origin,
    /,
    *,
    experts: Annotated[int, Parameter(help="Copies of each feed-forward.")],
    top_k: Annotated[int, Parameter(help="Experts that a token goes to.")] = 2,
    name: Name,
    dense_layers: Annotated[int, Parameter(help="First blocks whose feed-forward stays as it is.")] = 0,
    noise: Annotated[
        float, Parameter(help="Normal noise on each copy, in root mean squares of its matrix; 0 keeps the logits.")
    ] = 0.0,
    renormalize: Annotated[
        bool, Parameter(help="Let a token's weights sum to 1; without it the logits are other ones.")
    ] = True,
    keep_optimizer: Annotated[
        bool, Parameter(help="Repeat the optimizer's state too, instead of beginning anew.", negative=())
    ] = False,
) -> None:
    """Make a dense model sparse: every expert begins as a copy of the feed-forward, routers at random.

    The logits are the dense model's at first.
    """
    from calledshot.rundir import find_lab, resolve_checkpoint

    lab = find_lab()
    parent, step = resolve_checkpoint(run, lab)
    from calledshot.training import convert

    made = convert.upcycle(
        parent, step, lab, name, experts=experts, top_k=top_k, dense_layers=dense_layers,
        renormalize=renormalize, noise=noise, keep_optimizer=keep_optimizer,
    )  # fmt: skip
    tell(made)


@app.command(name="kv-heads")
def kv_heads(run: Origin, heads: Annotated[int, Parameter(help="Key heads that are left.")], /, *, name: Name) -> None:
    """Average neighbouring key and value heads: a smaller cache, after some more training (some 5 % of what it had)."""
    from calledshot.rundir import find_lab, resolve_checkpoint

    lab = find_lab()
    parent, step = resolve_checkpoint(run, lab)
    from calledshot.training import convert

    tell(convert.pool_kv_heads(parent, step, lab, name, heads))


@app.command
def extend(
    run: Origin,
    /,
    *,
    context: Annotated[int, Parameter(help="Tokens that the new run reads.")],
    method: Annotated[
        Literal["yarn", "ntk", "dynamic", "base"] | None,
        Parameter(help="What is done to RoPE: yarn unless said; base multiplies its base, to be trained on."),
    ] = None,
    factor: Annotated[
        float | None,
        Parameter(
            help="How far it is stretched; without it, as often as the context is longer, or as an imported model says."
        ),
    ] = None,
    name: Name,
) -> None:
    """Let a model read longer texts than it was trained on. Its weights stay as they are."""
    from calledshot.rundir import find_lab, resolve_checkpoint

    lab = find_lab()
    parent, step = resolve_checkpoint(run, lab)
    from calledshot.training import convert

    tell(convert.extend(parent, step, lab, name, context, method, factor))


def import_(
    source: Annotated[
        str, Parameter(help="A folder with config.json, safetensors and tokenizer.json, or hf:OWNER/NAME.")
    ],
    /,
    *,
    name: Name,
    context: Annotated[
        int, Parameter(help="Tokens that it reads; 0 takes the model's own, at most 32,768 unless asked for.")
    ] = 0,
) -> None:
    """Make a run of a Llama, Qwen3, Qwen3-MoE, Mixtral or T5 model, to train on, evaluate or convert.

    Its own begin, end and padding tokens keep their rows; those that the lab needs besides get new ones.
    """
    from calledshot.rundir import find_lab

    lab = find_lab()
    from calledshot.training import convert

    made = convert.import_model(source, lab, name, context)
    lineage = made.load("lineage")
    for theirs, ours in lineage["renamed_tokens"].items():
        if "sentinel" not in ours:
            print(f"{theirs} is {ours}")
    print(f"{lineage['new_rows']} new rows in the embedding")
    recipe = convert.run_recipe(made)
    own, read = lineage["context"], recipe.model.context
    if read < own and not context:
        print(f"it reads {read:,} of the {own:,} tokens that the model names; --context N takes more or fewer")
    tell(
        made,
        f"batch.tokens={recipe.batch.tokens} optimizer.learning_rate={recipe.optimizer.learning_rate:g} "
        "data.sources.0.path=FILE ",
    )


def tell(run: RunDirectory, settings: str = "") -> None:
    """What was made, and how to train on from it; `settings` are overrides that show what may be changed."""
    parameters = run.load("summary")["parameters"]
    total, active = parameters["total"], parameters["active"]
    sparse = f" ({active:,} active)" if active != total else ""
    print(f"{run.path}: {total:,} parameters{sparse}. Next:")
    command = f"shot train {run.path / 'recipe.toml'} --from {run.name}@0 --name NEW"
    print(f"  {command} {settings}duration.tokens=...")


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
    """Write the model as a Hugging Face folder: Qwen3 or Qwen3-MoE with QK-norm, Llama or Mixtral without, or T5.

    `transformers`, vLLM, llama.cpp's converter and whatever else reads such folders can use it.
    """
    import torch

    from calledshot.model.huggingface import architecture, export_huggingface
    from calledshot.rundir import find_lab, record_export, resolve_checkpoint
    from calledshot.training import load_model, run_recipe
    from calledshot.training.state import read_counters

    directory, named = resolve_checkpoint(run, find_lab())
    if None not in (named, step) and named != step:
        raise UsageError(f"--step {step}: {run} names another step already; write one of the two")
    recipe = run_recipe(directory)
    name = architecture(recipe.model, recipe)
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
    with suppress(RunError):  # a run on a read-only disk can be exported too
        record_export(directory.path, loaded.step, folder)
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    topology = loaded.recipe.model.topology
    if topology == "prefix":
        print(
            f"A prefix that was seen both ways in training is not in {name}, unless a 4-D additive mask says so: "
            "others serve it causally.",
            file=sys.stderr,
        )
    print(f'\n{name}, step {loaded.step:,}, {dtype}. Next:\n  python -c "{example(name, str(folder))}"')


def example(name: str, folder: str) -> str:
    """A line of Python that loads a folder and generates."""
    if name == "T5ForConditionalGeneration":  # transformers 5 has no pipeline for it
        return (
            f"from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T; f = {folder!r}; "
            "t, m = T.from_pretrained(f), M.from_pretrained(f); "
            "print(t.decode(m.generate(**t('Once', return_tensors='pt'), max_new_tokens=50)[0]))"
        )
    call = f"pipeline('text-generation', {folder!r})('Once', max_new_tokens=50)"
    return f"from transformers import pipeline; print({call})"
