"""Runs made from other runs' models, or from other people's, instead of by training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from calledshot.data import Tokenizer
from calledshot.data.hub import download_model
from calledshot.model import surgery
from calledshot.model.huggingface import architecture, import_huggingface
from calledshot.recipe import Recipe, UsageError, check, conversion, cost, identity, schema, shape, to_toml
from calledshot.rundir import RunDirectory, atomic_write, is_run
from calledshot.rundir.drafts import draft_folder
from calledshot.rundir.files import write_failure
from calledshot.training import state
from calledshot.training.load import run_recipe, sized
from calledshot.training.optimizer import KNOWN
from calledshot.training.pieces import Piece
from calledshot.training.tensorfiles import bytes_of, lay_out
from calledshot.training.train import check_name, reference

IMPORTED_OPTIMIZER = schema.Optimizer(name="adamw", learning_rate=1e-4, transfer="none")
"""For a model whose own rates nobody knows: what is usual for going on with one."""
IMPORTED_CONTEXT = 32_768
"""Longest context that an imported model gets without being asked: some name a million tokens, or as good as none."""
IMPORTED_BATCH = 131_072
"""Tokens of an imported run's batch, as far as they are 8 sequences at least and 64 at most."""
IMPORTED_STEPS = 1000
"""Updates of its recipe, until somebody says more."""
BYTES_AT_ONCE = 2**29
"""Of a checkpoint that is written anew, in memory."""


def upcycle(
    parent: RunDirectory,
    step: int | None,
    lab: Path,
    name: str,
    *,
    experts: int,
    top_k: int,
    dense_layers: int = 0,
    renormalize: bool = True,
    noise: float = 0.0,
    keep_optimizer: bool = False,
) -> RunDirectory:
    """A run whose experts are copies of a dense run's feed-forwards (`surgery.upcycle`)."""
    if not 0.0 <= noise < float("inf"):
        raise UsageError(f"--noise {noise:g}: must be 0 or more")

    def change(model: schema.Model) -> schema.Model:
        return conversion.upcycled_model(
            model, experts=experts, top_k=top_k, dense_layers=dense_layers, renormalize=renormalize
        )

    settings = {
        "experts": experts, "top_k": top_k, "dense_layers": dense_layers, "renormalize": renormalize, "noise": noise,
    }  # fmt: skip
    return _converted(
        parent, step, lab, name, {"conversion": "upcycle", **settings}, change,
        lambda model, tensors: surgery.upcycle(model, tensors, noise=noise),
        surgery.upcycle_optimizer if keep_optimizer else None,
    )  # fmt: skip


def pool_kv_heads(parent: RunDirectory, step: int | None, lab: Path, name: str, kv_heads: int) -> RunDirectory:
    """A run with fewer key heads, each the mean of a group (`surgery.pool_kv_heads`), and a fresh optimizer."""
    return _converted(
        parent, step, lab, name, {"conversion": "kv-heads", "kv_heads": kv_heads},
        lambda model: conversion.pooled_model(model, kv_heads), surgery.pool_kv_heads, None,
    )  # fmt: skip


def extend(
    parent: RunDirectory,
    step: int | None,
    lab: Path,
    name: str,
    context: int,
    method: conversion.Method | None = None,
    factor: float | None = None,
) -> RunDirectory:
    """A run that reads more tokens (`recipe.conversion.extended`), with the same weights and optimizer."""
    settings = {"context": context, "method": method, "factor": factor}
    return _converted(
        parent, step, lab, name, {"conversion": "extend", **settings},
        lambda model: conversion.extended(model, context, method, factor),
        lambda model, tensors: dict(tensors), lambda model, tensors: dict(tensors),
    )  # fmt: skip


def import_model(source: str, lab: Path, name: str, context: int = 0) -> RunDirectory:
    """A run from a Hugging Face folder, or `hf:OWNER/NAME[@REVISION]` (`model.huggingface.import_huggingface`).

    Its recipe holds the model's shape, RoPE and tokenizer, AdamW at 1e-4 with `transfer = "none"`, some sequences a
    batch, and for an encoder-decoder T5's objective; data and duration are anyone's. `context` is what it reads; 0
    takes the model's own, at most `IMPORTED_CONTEXT`.
    """
    path = _free(lab, name)
    folder, origin = Path(source), source
    if source.startswith("hf:"):
        folder, commit = download_model(source)
        origin = f"{source.partition('@')[0]}@{commit}"
    elif not folder.is_dir():
        raise UsageError(f"{source}: no such folder; a model is a folder with a config.json, or hf:OWNER/NAME")
    found = import_huggingface(folder)
    model = _reading(found.model, context)
    row = shape(model).row_positions
    batch = row * min(max(IMPORTED_BATCH // row, 8), 64)
    recipe = Recipe(
        name=name,
        data=schema.Data(tokenizer=str(Path("runs", name, "tokenizer.json"))),
        model=model,
        objective=schema.Objective(kind="span" if model.topology == "encoder-decoder" else "causal"),
        optimizer=IMPORTED_OPTIMIZER,
        batch=schema.Batch(tokens=batch),
        duration=schema.Duration(tokens=IMPORTED_STEPS * batch),
    )
    check(recipe, source)
    lineage = {
        "parent": origin, "step": 0, "fresh_optimizer": True, "conversion": "import",
        "class": architecture(model), "context": found.model.context, "renamed_tokens": found.renamed,
        "new_rows": found.new_rows,
    }  # fmt: skip
    return _made(path, recipe, found.tokenizer.to_json(), lineage, found.state)


def _reading(model: schema.Model, context: int) -> schema.Model:
    """An imported model with the context asked for, or else one that can be trained."""
    if context < 0:
        raise UsageError(f"--context {context}: must be 1 or more, or 0 for the model's own")
    if context > model.context and model.positions == "rope":
        raise UsageError(
            f"--context {context}: the model reads {model.context:,} tokens; import it as it is, and let "
            "`shot convert extend` make more of it"
        )
    if context and context < model.rope_original_context:
        raise UsageError(
            f"--context {context}: its RoPE is scaled from {model.rope_original_context:,} tokens, so it is no less"
        )
    return replace(model, context=context or min(model.context, max(IMPORTED_CONTEXT, model.rope_original_context)))


def average(parent: RunDirectory, steps: Sequence[int], lab: Path, name: str) -> RunDirectory:
    """A run whose weights are the mean of several of a run's checkpoints, taken in float64 (Izmailov et al. 2018,
    arXiv 1803.05407; of one run's last checkpoints, Vaswani et al. 2017), with a fresh optimizer. What is not a
    floating-point number comes from the last of them.
    """
    path = _free(lab, name)
    if len(set(steps)) < 2:
        raise UsageError("an average needs at least two checkpoints; `shot checkpoint list` shows which there are")
    recipe = replace(run_recipe(parent), name=name)
    tokenizer = (parent.path / "tokenizer.json").read_text(encoding="utf-8")
    recipe = sized(recipe, Tokenizer.from_json(tokenizer, str(parent.path / "tokenizer.json")))
    folders = [found.path for step in sorted(set(steps)) if (found := state.find(parent, step)) is not None]

    def mean(name: str, shape: tuple[int, ...]) -> Tensor:
        wanted = {name: Piece.whole(shape)}
        newest = state.read_pieces(folders[-1], state.MODEL, wanted)[name]
        if not newest.is_floating_point():
            return newest
        total = newest.double()
        for folder in folders[:-1]:
            total += state.read_pieces(folder, state.MODEL, wanted)[name]
        return (total / len(folders)).to(newest.dtype)

    tensors = {name: mean(name, shape) for name, shape in state.stored(folders[-1], state.MODEL).items()}
    lineage = {
        "parent": reference(parent, lab), "step": max(steps), "steps": sorted(set(steps)),
        "tokens": state.read_counters(folders[-1]).tokens, "fresh_optimizer": True, "conversion": "average",
    }  # fmt: skip
    return _made(path, recipe, tokenizer, lineage, tensors, parent=parent)


def consolidate(run: RunDirectory, step: int | None) -> tuple[int, int]:
    """Replaces a checkpoint (the newest whole one) that several ranks wrote by one of single files, as one rank writes
    them; its step, and how many ranks there were. The run's lock is held. A kill leaves the one or the other.

    UsageError when the run has no checkpoint; RunError when the one asked for is damaged.
    """
    found = state.find(run, step)
    if found is None:
        raise UsageError(f"{run.path}: has no checkpoint yet; `shot resume {run.name}` trains on")
    writers = len(state.files(found.path, state.MODEL))
    if writers > 1:
        incarnation = int(run.manifest(found.step).get("incarnation") or 0)
        with run.checkpoint_writer(found.step, incarnation, latest=False) as folder:
            for kind in (state.MODEL, state.OPTIMIZER):
                run.write_checkpoint_file(found.step, kind, _single(found.path, kind))
            atomic_write(folder / state.COUNTERS, (found.path / state.COUNTERS).read_bytes())
    return found.step, writers


def _single(folder: Path, kind: str) -> Iterator[bytes | memoryview]:
    """A kind of tensors as the bytes of one safetensors file, a few of them in memory at a time."""
    wholes = state.stored(folder, kind)
    dtypes = state.dtypes(folder, kind)
    header, places = lay_out({name: (dtypes[name], shape) for name, shape in wholes.items()})
    yield header
    names: list[str] = []
    for number, (name, (_, end)) in enumerate(places.items(), 1):
        names.append(name)
        if end - places[names[0]][0] >= BYTES_AT_ONCE or number == len(places):
            tensors = state.read_pieces(folder, kind, {one: Piece.whole(wholes[one]) for one in names})
            yield from (bytes_of(tensors[one]).data for one in names)
            names.clear()


def _converted(
    parent: RunDirectory,
    step: int | None,
    lab: Path,
    name: str,
    settings: Mapping[str, Any],
    change: Callable[[schema.Model], schema.Model],
    operate: Callable[[schema.Model, Mapping[str, Tensor]], dict[str, Tensor]],
    operate_optimizer: Callable[[schema.Model, Mapping[str, Tensor]], dict[str, Tensor]] | None,
) -> RunDirectory:
    """A new run at step 0 from a checkpoint of another; without `operate_optimizer` its optimizer begins anew."""
    path = _free(lab, name)
    before = run_recipe(parent)
    after = _fitting(replace(before, name=name, model=change(before.model)))
    check(after, name)
    found = state.find(parent, step)
    if found is None:
        raise UsageError(f"{parent.path}: has no checkpoint yet; `shot resume {parent.name}` trains on")
    tokenizer = (parent.path / "tokenizer.json").read_text(encoding="utf-8")
    after = sized(after, Tokenizer.from_json(tokenizer, str(parent.path / "tokenizer.json")))
    counters = state.read_counters(found.path)
    optimizer = {}
    if operate_optimizer is not None:
        optimizer = operate_optimizer(after.model, state.read_tensors(found.path / state.OPTIMIZER))
    lineage = {
        "parent": reference(parent, lab), "step": found.step, "tokens": counters.tokens,
        "fresh_optimizer": operate_optimizer is None, **settings,
    }  # fmt: skip
    return _made(
        path, after, tokenizer, lineage, operate(after.model, state.read_tensors(found.path / state.MODEL)),
        optimizer, counters.updates if optimizer else 0, parent,
    )  # fmt: skip


def _fitting(recipe: Recipe) -> Recipe:
    """Batch and duration raised to what longer rows need, without the ramp of smaller batches."""
    row = shape(recipe.model).row_positions
    if all(one.tokens % row == 0 for one in (recipe.batch, *recipe.batch.ramp)):
        return recipe
    tokens = -(-recipe.batch.tokens // row) * row
    duration = replace(recipe.duration, tokens=max(recipe.duration.tokens, tokens) if recipe.duration.tokens else 0)
    parallel = replace(recipe.parallel, micro_tokens=0)
    return replace(recipe, batch=schema.Batch(tokens=tokens), duration=duration, parallel=parallel)


def _free(lab: Path, name: str) -> Path:
    """Where a run of that name goes. UsageError when something is there."""
    check_name(name)
    path = lab / "runs" / name
    if path.exists():
        what = "is a run already" if is_run(path) else "exists and is not a run"
        raise UsageError(f"{path}: {what}; choose another --name")
    return path


def _made(
    path: Path,
    recipe: Recipe,
    tokenizer: str,
    lineage: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None = None,
    updates: int = 0,
    parent: RunDirectory | None = None,
) -> RunDirectory:
    """A run with a checkpoint of step 0, whole or not at all."""
    own = [] if recipe.optimizer.name in KNOWN or parent is None else [recipe.optimizer.name.partition(":")[0]]
    try:
        with draft_folder(path) as draft:
            run = RunDirectory.create(
                draft / path.name,
                recipe_toml=to_toml(recipe),
                identity=identity(recipe),
                lineage=lineage,
                files=[parent.path / Path(file).name for file in own],  # ty: ignore
            )
            atomic_write(run.path / "tokenizer.json", tokenizer)
            if parent is not None and (data := parent.load("data")):
                run.save("data", data)
            state.save(run, state.Counters(updates=updates), tensors, optimizer or {})
            parameters = cost(recipe).parameters
            counts = {key: getattr(parameters, key) for key in ("total", "non_embedding", "active")}
            run.save("summary", {"parameters": counts, "tokens": 0, "flops": 0.0, "final": {}})
            run.set_status(state="done", step=0, tokens=0, message=f"{lineage['conversion']} of {lineage['parent']}")
            run.path.rename(path)
    except OSError as error:
        raise write_failure(path, error) from error
    return RunDirectory(path)
