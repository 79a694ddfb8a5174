"""`shot data`: build, inspect and show what a model is trained on."""

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from calledshot.recipe import Recipe, UsageError, cost, from_dict, load_recipe
from calledshot.rundir import RunDirectory, find_lab, resolve_run

from .arguments import Json, Override, RecipeName, print_json, table
from .progress import bar

app = App(name="data", help="Prepare a recipe's data, look at what is in them, see what the model sees.")

RunName = Annotated[str, Parameter(name="--run", help="A run, by name or folder, instead of a recipe.")]
Step = Annotated[int, Parameter(help="As the log counts them, from 1.")]
STYLES = ("on grey11", "on grey19")
"""Neighbouring tokens alternate between them."""
PIECES = ("cyan", "green", "yellow", "magenta")
"""Pieces of a row take turns."""
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as pictures of themselves: a document must not command the terminal."""
BRACKETS = {"given": "⟦⟧", "both ways": "⟪⟫", "encoder": "«»"}
"""Around what has no loss: seen in order, seen both ways, read by the encoder."""
STYLE_NAMES = {"given": "dim", "both ways": "dim underline", "encoder": "italic"}
"""The same on a terminal with colours."""


@app.command
def build(recipe: RecipeName, /, *overrides: Override, json: Json = False) -> None:
    """Read the sources, train or load the tokenizer, write token shards. What is there already is reused."""
    from calledshot.data import prepare
    from calledshot.data.inspection import summary

    loaded = load_recipe(recipe, overrides)
    with bar() as progress:
        prepared = prepare(loaded, find_lab(), progress)
    tell(summary(prepared, loaded), json)


@app.command
def inspect(
    recipe: Annotated[str, Parameter(help="A preset, a TOML file, or a folder of prepared data.")],
    /,
    *overrides: Override,
    verify: Annotated[bool, Parameter(help="Check the hash of every shard, whatever the size.", negative=())] = False,
    json: Json = False,
) -> None:
    """Documents, tokens, bytes a token, packing loss, languages and held-out share of prepared data."""
    from calledshot.data.inspection import find_prepared, summary

    lab = find_lab()
    loaded = None if Path(recipe).is_dir() else load_recipe(recipe, overrides)
    prepared = find_prepared(loaded or Path(recipe), lab, verify or None)
    tell({**summary(prepared, loaded), **({"verified": True} if verify else {})}, json)


@app.command
def show(
    recipe: Annotated[str, Parameter(help="A preset or a TOML file; none with --run.")] = "",
    /,
    *overrides: Override,
    run: RunName = "",
    step: Step = 1,
    rows: Annotated[int, Parameter(help="How many of the batch's rows; 0 shows 4 of a recipe's, all as JSON.")] = 0,
    json: Json = False,
) -> None:
    """Decoded batches as the model sees them: boundaries of documents, tokens, loss weights.

    With --run, the documents that the step was trained on: what lies under a spike.
    """
    from calledshot.data import Batches, prepare
    from calledshot.data.inspection import run_batches

    if bool(recipe) == bool(run) or (run and overrides):
        raise UsageError("shot data show: name a recipe, or a run with --run R")
    if step < 1:
        raise UsageError(f"--step {step}: steps count from 1")
    if rows < 0:
        raise UsageError(f"--rows {rows}: must be 0, which leaves it to the verb, or more")
    if run:
        directory = resolve_run(run)
        last = directory.status().get("total_steps")
        if last and step > last:
            raise UsageError(f"--step {step}: {directory.path} ends at step {last}")
        batches = run_batches(directory, recipe_of(directory))
    else:
        loaded = load_recipe(recipe, overrides)
        with bar() as progress:
            prepared = prepare(loaded, find_lab(), progress)
        batches = Batches(prepared, loaded, steps=cost(loaded).steps if loaded.duration.flops else None)
    rows = rows or (batches.size(step - 1) if run or json else 4)
    show_step(batches, step, rows, documents_only=bool(run), json=json)


def recipe_of(run: RunDirectory) -> Recipe:
    """The recipe that a run keeps."""
    text = run.recipe_toml()
    if not text:
        raise UsageError(f"{run.path}: has no recipe.toml; only runs of `shot train` can be looked into")
    return from_dict(tomllib.loads(text), file=str(run.path / "recipe.toml"))


def tell(found: dict[str, Any], json: bool) -> None:
    """Print what `summary` found."""
    if json:
        print_json(found)
        return
    print(found["folder"])
    tokenizer = found["tokenizer"]
    print(
        f"tokenizer: {tokenizer['size']:,} entries, {tokenizer['special']} of them special; by {tokenizer['encoder']}"
    )
    rows = [("source", "split", "documents", "tokens", "bytes", "B/token", "packing loss")]
    for source in found["sources"]:
        packing = f"{source['packing_loss']:.2%}" if "packing_loss" in source else ""
        for split, label in (("train", "train"), ("held_out", f"held out {source['held_out_share']:.1%}")):
            counts = source[split]
            ratio = f"{counts['bytes'] / counts['tokens']:.2f}" if counts["tokens"] else ""
            numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
            rows.append((source["name"], label, *numbers, ratio, packing if split == "train" else ""))
    print(table(rows, right=(2, 3, 4, 5, 6)))
    for source in found["sources"]:
        languages = source["train"]["languages"]
        total = sum(counts["bytes"] for counts in languages.values()) or 1
        shares = ", ".join(f"{name} {counts['bytes'] / total:.1%}" for name, counts in list(languages.items())[:12])
        skipped = ", ".join(f"{count} {reason}" for reason, count in source["skipped"].items())
        print(f"{source['name']}: {shares}" + (f"; left out: {skipped}" if skipped else ""))
    if found.get("verified"):
        print("every hash is the manifest's")


def show_step(batches: Any, step: int, rows: int, documents_only: bool, json: bool) -> None:
    """Print the first rows of a step's batch."""
    from calledshot.data.inspection import segments

    batch, origins = batches.rows(step - 1, 0, min(rows, batches.size(step - 1))), batches.origins(step - 1)
    tokenizer = batches.prepared.tokenizer
    number = batches.number(step - 1)
    if json:
        print_json(
            {
                "step": step,
                "batch": number,
                "rows_in_batch": batches.size(step - 1),
                "rows": [
                    [
                        {**vars(origin), **piece_texts(batch, row, piece, tokenizer)}
                        for piece, origin in enumerate(origins[row])
                    ]
                    for row in range(len(batch.inputs))
                ],
            }
        )
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    colour = console.is_terminal
    frame = batches.denoising.frame
    width = f"{frame.encoder_context} + {frame.context}" if frame.encoder_context else f"{frame.context}"
    size = f"{batches.size(step - 1)} rows of {width}"
    console.print(Text(f"step {step}: batch {number}, {size}; data.skip = [{number}] leaves it out"))
    for row in range(len(batch.inputs)):
        padding = int((batch.documents[row] < 0).sum())
        if batch.encoded is not None:
            padding += int((batch.encoded.documents[row] < 0).sum())
        console.print(Text(f"row {row}" + (f" ({padding} of padding)" if padding else ""), "bold"))
        parts = list(segments(batch, row, tokenizer))
        for piece, origin in enumerate(origins[row]):
            where = f"tokens {origin.start:,}–{origin.start + origin.pairs - 1:,}, pass {origin.epoch + 1}"
            task = "" if origin.denoiser == "causal" else f"; {origin.denoiser}"
            title = f"── {origin.source}: {origin.document} ({origin.language}; {where}{task})"
            console.print(Text(title.translate(VISIBLE), PIECES[piece % len(PIECES)]))
            mine = [part for part in parts if part.piece == piece]
            if documents_only:
                excerpt = "".join(token for part in mine for token in part.tokens)
                console.print(Text("   " + " ".join(excerpt.split())[:160].translate(VISIBLE)))
                continue
            console.print(decorated(mine, colour))
    if not documents_only:
        console.print(Text(legend(batch, colour), "italic"))


def legend(batch: Any, colour: bool) -> str:
    """What the marks mean, of those that the batch needs."""
    marks = {"given": "0"}
    if batch.regions.any():
        marks["both ways"] = "0, seen both ways"
    if batch.encoded is not None:
        marks["encoder"] = "0, read by the encoder"
    if not colour:
        named = [f"{BRACKETS[name][0]}…{BRACKETS[name][1]} is {what}" for name, what in marks.items()]
    else:
        named = [f"{STYLE_NAMES[name]} is {what}" for name, what in marks.items()]
    return f"loss weights: {', '.join(named)}, plain 1"


def piece_texts(batch: Any, row: int, piece: int, tokenizer: Any) -> dict[str, str]:
    """A piece of a row from its first input to its last target, and what the encoder reads of it."""
    places = batch.documents[row] == piece
    text = [*batch.inputs[row, places][:1].tolist(), *batch.targets[row, places].tolist()]
    if batch.encoded is None:
        return {"text": tokenizer.decode(text)}
    read = batch.encoded.inputs[row, batch.encoded.documents[row] == piece].tolist()
    return {"inputs": tokenizer.decode(read), "text": tokenizer.decode(text)}


def decorated(parts: Any, colour: bool) -> Any:
    """The tokens of a piece: shades and styles on a terminal, brackets around what has no loss elsewhere."""
    from rich.text import Text

    text = Text()
    shade = 0
    for part in parts:
        name = "encoder" if part.encoded else "both ways" if part.region else "given"
        if not colour:
            plain = "".join(part.tokens).translate(VISIBLE)
            text.append(plain if part.weight else plain.join(BRACKETS[name]))
        for token in part.tokens if colour else ():
            shade = 1 - shade
            weight = STYLE_NAMES[name] if part.weight == 0 else "" if part.weight == 1 else "bold"
            text.append(token.translate(VISIBLE), f"{weight} {STYLES[shade]}".strip())
        if part.encoded:
            text.append("\n")
    return text
