"""`shot recipe`: what there is, what it says, what it costs, whether it fits."""

import shlex
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from calledshot.recipe import (
    Cost,
    Memory,
    Recipe,
    Shape,
    UsageError,
    cost,
    difference,
    documented,
    enough_ranks,
    identity,
    load_recipe,
    memory,
    optimizer_groups,
    presets,
    problems,
    to_dict,
    to_toml,
    units,
)

from .arguments import Json, Override, RecipeName, print_json, table

app = App(name="recipe", help="List, show, check, size up and compare recipes.")


def unit(parser: Any) -> Any:
    """A converter for cyclopts from one of `recipe.units`."""

    def convert(kind: type, tokens: Any) -> float:
        del kind
        return parser(tokens[0].value)

    return convert


Share = Annotated[float, Parameter(converter=unit(units.share), show_default="{:.0%}".format)]
Peak = Annotated[float, Parameter(converter=unit(units.flops), show_default=units.show_count)]
Size = Annotated[int, Parameter(converter=unit(units.bytes_), show_default=units.show_bytes)]
Speed = Annotated[float, Parameter(converter=unit(lambda text: float(units.count(text))))]


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """Presets that come with the package."""
    found = presets()
    if json:
        print_json([{"name": one.name, "path": str(one.path), "summary": one.summary} for one in found])
    else:
        print(table([(one.name, one.summary) for one in found]))


@app.command
def keys(*, json: Json = False) -> None:
    """Every key of a recipe, with its default and what it does."""
    found = documented()
    if json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        print(f"{one.name}  ({one.type}, default {one.default!r})\n    {one.doc}")


@app.command
def show(
    recipe: RecipeName,
    /,
    *overrides: Override,
    mfu: Share = 0.4,
    peak: Peak = 989e12,
    gpus: int = 1,
    price: float | None = None,
    speed: Speed | None = None,
    json: Json = False,
) -> None:
    """The resolved recipe and its cost, computed. The text is a valid recipe itself.

    Parameters
    ----------
    mfu
        Share of the peak that the run is assumed to reach.
    peak
        Peak of one GPU in FLOP/s; an H100 SXM has 989T in dense bfloat16.
    gpus
        GPUs that share the work.
    price
        Price of a GPU hour.
    speed
        Tokens a second, which tells what a duration in minutes amounts to.
    """
    positive(mfu=mfu, peak=peak, gpus=gpus, price=price, speed=speed)
    if mfu > 1:
        raise UsageError(f"--mfu {mfu:g}: more than the peak; write a share (0.45 or 45%)")
    found = load_recipe(recipe, overrides)
    costs = cost(found, speed)
    hours = costs.hours(mfu, peak, gpus)
    money = None if price is None else costs.money(price, mfu, peak, gpus)
    if json:
        assumed = {"mfu": mfu, "peak": peak, "gpus": gpus, "price": price, "tokens_per_second": speed}
        print_json(
            {
                "recipe": to_dict(found),
                "identity": identity(found),
                "cost": asdict(costs) | {"hours": hours, "money": money},
                "assumed": assumed,
                "learning_rates": optimizer_groups(found),
            }
        )
        return
    rows = cost_rows(costs)
    rows.append(("", "", ""))
    if costs.minutes is not None:
        rows.append(("time", units.show_hours(costs.minutes / 60), "as asked"))
    elif hours is not None:
        count = f"{gpus} GPUs" if gpus > 1 else "one GPU"
        assumption = f"computed, not measured: {mfu:.0%} of {units.show_count(peak)}FLOP/s on {count}"
        rows.append(("time", units.show_hours(hours), assumption))
    if money is not None:
        rows.append(("money", f"{money:,.2f}", f"at {price:g} a GPU hour"))
    rates = [(f"learning rate, {group}", f"{rate:.4g}", "") for group, rate in optimizer_groups(found).items()]
    print(to_toml(found))
    print(table([*rows, ("", "", ""), *rates], right=(1,), prefix="# "))


def cost_rows(costs: Cost) -> list[tuple[str, str, str]]:
    """What, how much, remark."""
    parameters, flops, sizes = costs.parameters, costs.flops_per_token, costs.bytes
    unknown = "unknown until measured"

    def number(value: float | None) -> str:
        return unknown if value is None else f"{value:,.0f}"

    size = units.show_bytes
    return [
        ("head width, hidden", f"{costs.shape.head_width}, {costs.shape.hidden}", ""),
        ("parameters", number(parameters.total), ""),
        ("  non-embedding", number(parameters.non_embedding), "without embedding and head"),
        ("  active", number(parameters.active), "in one token's forward pass"),
        ("FLOPs a token", number(flops.total), ""),
        ("  forward", number(flops.forward), ""),
        ("  backward", number(flops.backward), ""),
        ("  of it attention", number(flops.attention), seen(costs.shape)),
        ("weights", size(sizes.weights), "copy in the matmuls' type"),
        ("master weights", size(sizes.master), "float32"),
        ("gradients", size(sizes.gradients), "sum and present micro-batch"),
        ("optimizer", size(sizes.optimizer), "float32"),
        ("activations", size(sizes.activations), f"at most, of {costs.micro_tokens:,} tokens on a GPU"),
        ("checkpoint", size(sizes.checkpoint), ""),
        ("KV cache a token", size(sizes.kv_cache_per_token), ""),
        ("steps", number(costs.steps), ""),
        ("tokens", number(costs.tokens), per_parameter(costs)),
        ("FLOPs", unknown if costs.flops is None else f"{costs.flops:.3e}", ""),
    ]


def seen(shape: Shape) -> str:
    """How far attention reaches, as a remark."""
    context = f"at {shape.context:,} tokens of context"
    if shape.topology == "encoder-decoder":
        return f"at {shape.encoder_context:,} tokens of input and {shape.context:,} of output"
    return f"{context}, half of them a prefix" if shape.topology == "prefix" else f"{context}, causal"


def per_parameter(costs: Cost) -> str:
    """Tokens a parameter, as a remark."""
    return "" if costs.tokens is None else f"{costs.tokens / costs.parameters.total:.1f} a parameter"


@app.command
def check(recipe: RecipeName, /, *overrides: Override, json: Json = False) -> int:
    """Everything in a recipe that does not fit together; exit code 2 if there is anything."""
    found = list(problems(load_recipe(recipe, overrides, checked=False)))
    if json:
        print_json({"recipe": recipe, "problems": found})
    elif found:
        for problem in found:
            print(f"{recipe}: {problem}")
    else:
        print(f"{recipe}: nothing wrong")
    return 2 if found else 0


@app.command(name="memory")
def memory_(
    recipe: RecipeName,
    /,
    *overrides: Override,
    ranks: int = 1,
    memory_per_rank: Annotated[Size, Parameter(name="--memory")] = 80 * 2**30,
    device: Literal["cuda", "cpu"] = "cuda",
    json: Json = False,
) -> None:
    """What training holds on each rank at the fullest moment of a step, by arithmetic, and what to set so that it fits.

    Parameters
    ----------
    ranks
        Ranks that share the work, each with a device of its own.
    memory_per_rank
        Memory of one device (`80GiB`, `16GB`).
    device
        What the ranks compute on.
    """
    positive(ranks=ranks, memory=memory_per_rank)
    found = load_recipe(recipe, overrides)
    result = memory(found, ranks, memory_per_rank, device)
    more = None if result.fits else enough_ranks(found, ranks, memory_per_rank, device)
    command = shlex.join(["shot", "train", recipe, *overrides, *result.settings])
    command += f" --ranks {ranks}" if ranks > 1 else ""
    if json:
        print_json(
            asdict(result) | {"fits": result.fits, "needed": result.needed, "command": command, "ranks_that_fit": more}
        )
        return
    print(f"{units.show_bytes(result.usable)} of {units.show_bytes(result.memory)} are taken as usable.\n")
    print(table(memory_rows(result), right=(2, 3, 4, 5)))
    if result.staged:
        staged = units.show_bytes(result.staged)
        print(
            f"\nCheckpoints in the background take {staged} of host memory a rank; checkpoint.asynchronous=false, none."
        )
    if result.fits:
        print(f"\nFits: {command}")
        return
    lacking = units.show_bytes(result.needed - result.usable)
    print(f"\nDoes not fit: {lacking} too much with {result.chosen.micro_tokens:,} tokens at a time. ", end="")
    print(f"Take {more} ranks, " if more else "Take ", end="")
    print("parallel.tensor=2, or a smaller model.context, model.layers or model.width.")


def memory_rows(result: Memory) -> list[tuple[str, ...]]:
    """What each option holds, and which to take."""
    rows: list[tuple[str, ...]] = [
        ("shard", "recomputed", "micro_tokens", "state", "gradients", "activations, work", "in all", "")
    ]
    size = units.show_bytes
    for one in result.options:
        held = one.footprint
        lacking = f"{size(held.peak - result.usable)} too much"
        verdict = "take this" if one == result.chosen and one.fits else "fits" if one.fits else lacking
        parts = size(held.state), size(held.gradients), size(held.activations + held.work), size(held.peak)
        rows.append((f"{one.layout.shard}", one.activation_checkpointing, f"{one.micro_tokens:,}", *parts, verdict))
    return rows


@app.command
def diff(a: RecipeName, b: RecipeName, /, *overrides: Override, json: Json = False) -> None:
    """Keys that differ between two recipes, and their costs side by side. Overrides are laid on the second."""
    first, second = load_recipe(a), load_recipe(b, overrides)
    keys = difference(first, second)
    if json:
        print_json(
            {
                "keys": [{"key": key, "a": one, "b": other} for key, one, other in keys],
                "cost": {"a": asdict(cost(first)), "b": asdict(cost(second))},
                "same_run": identity(first) == identity(second),
            }
        )
        return
    if not keys:
        print("No key differs.")
        return
    print(table([("key", a, b), *((key, text(one), text(other)) for key, one, other in keys)]))
    print()
    print(table([("cost", a, b), *compared(first, second)], right=(1, 2)))


def compared(first: Recipe, second: Recipe) -> list[tuple[str, str, str]]:
    """The rows of both costs."""
    pairs = zip(cost_rows(cost(first)), cost_rows(cost(second)), strict=True)
    return [(what, one, other) for (what, one, _), (_, other, _) in pairs]


def text(value: Any) -> str:
    """A value of a recipe in a table."""
    return "–" if value is None else f"{value}"


def positive(**options: float | None) -> None:
    """Raises: `UsageError` for an option that must be more than 0."""
    for name, value in options.items():
        if value is not None and value <= 0:
            raise UsageError(f"--{name} {value:g}: must be more than 0")
