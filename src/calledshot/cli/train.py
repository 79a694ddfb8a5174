"""`shot train` and `shot resume`."""

from typing import Annotated

from cyclopts import Parameter

from calledshot.cli.arguments import Override, RecipeName

SinkName = Annotated[
    list[str] | None, Parameter(name="--sink", negative=(), help="Also send metrics to wandb or tensorboard.")
]
Ranks = Annotated[int, Parameter(help="Start so many processes on this machine, one a GPU or a share of the cores.")]


def train(
    recipe: RecipeName,
    /,
    *overrides: Override,
    name: Annotated[str, Parameter(help="Name of the run; without it the recipe's.")] = "",
    origin: Annotated[str, Parameter(name="--from", help="RUN@STEP to fork: begin with that checkpoint.")] = "",
    fresh_optimizer: Annotated[bool, Parameter(help="Fork without the optimizer's state.", negative=())] = False,
    sink: SinkName = None,
    ranks: Ranks = 1,
) -> int:
    """Train a recipe, or go on with the run of that name and recipe.

    The run directory is runs/NAME in this lab. Ctrl-C finishes the step, saves and stops; the same command, or `shot
    resume`, goes on. Under torchrun or srun it joins the other processes.
    """
    from calledshot.cli.progress import bar
    from calledshot.recipe import layout, load_recipe
    from calledshot.rundir import find_lab

    resolved = load_recipe(recipe, overrides)  # what is mistyped is said before torch is imported
    if ranks != 1:
        from calledshot.cli.ranks import start

        layout(resolved, ranks)
        return start(ranks)
    from calledshot.training import train as run

    with bar() as progress:
        return run(
            resolved,
            find_lab(),
            name=name,
            origin=origin,
            fresh_optimizer=fresh_optimizer,
            sinks=sink or (),
            progress=progress,
        )


def resume(
    run: Annotated[str, Parameter(help="Name or folder of the run.")], /, *, sink: SinkName = None, ranks: Ranks = 1
) -> int:
    """Go on with a run from its newest whole checkpoint, exactly as its recipe says."""
    from calledshot.cli.progress import bar
    from calledshot.rundir import find_lab, resolve_run

    directory = resolve_run(run, find_lab())
    if ranks != 1:
        from calledshot.cli.ranks import start

        return start(ranks)
    from calledshot.training import resume as go_on

    with bar() as progress:
        return go_on(directory, sinks=sink or (), progress=progress)
