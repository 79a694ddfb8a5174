"""`shot ablate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from calledshot.cli.arguments import Json, Override, print_json
from calledshot.recipe import UsageError, units

Arms = Annotated[tuple[str, ...], Parameter(name="--only", negative=(), help="Run only this arm (repeatable).")]
Sizes = Annotated[tuple[str, ...], Parameter(name="--size", negative=(), help="Run only this size (repeatable).")]


def speed_(kind: type, tokens: Any) -> float:
    """Tokens a second, `20k` too."""
    del kind
    return float(units.count(tokens[0].value))


def ablate(
    suite: Annotated[str, Parameter(help="A suite that comes with the package, or a TOML file.")],
    /,
    *overrides: Override,
    plan: Annotated[
        bool, Parameter(negative=(), help="Only say what would be run, how it is matched, for how long.")
    ] = False,
    report: Annotated[bool, Parameter(negative=(), help="Only report on what has been run.")] = False,
    only: Arms = (),
    size: Sizes = (),
    parallel: Annotated[int, Parameter(help="Runs side by side; 0 takes what fits.")] = 0,
    retry: Annotated[bool, Parameter(negative=(), help="Try failed runs again.")] = False,
    name: Annotated[str, Parameter(help="Name of the suite, and of its runs; without it the file's.")] = "",
    no_speed: Annotated[
        bool, Parameter(negative=(), help="Leave out the short runs that measure the speed of each arm alone.")
    ] = False,
    speed: Annotated[float, Parameter(converter=speed_, help="For --plan: tokens a second of the baseline.")] = 0.0,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), help="The page to write.")] = None,
    json: Json = False,
) -> int:
    """Do modifications transfer? Train the arms of a suite, matched, and compare them with the noise of seeds.

    The runs are runs/SUITE-ARM-SIZE-sSEED. What is done is skipped and what was interrupted goes on, so the same
    command can be repeated at any time; Ctrl-C stops the runs after a checkpoint. The report goes to stdout as
    Markdown, and as a page to ablations/SUITE/report.html in the lab unless --output names another.
    """
    from calledshot.experiment import (
        chosen,
        load_suite,
        make_plan,
        make_report,
        plan_json,
        plan_markdown,
        records,
        report_markdown,
        room,
        run_suite,
        state,
    )
    from calledshot.rundir import find_lab

    if parallel < 0:
        raise UsageError(f"--parallel {parallel}: must be 1 or more, or 0 for what fits")
    found, lab = load_suite(suite, overrides, name), find_lab()
    for arm in only:
        found.arm(arm)
    for one in size:
        found.size(one)
    if plan:
        planned = make_plan(found, lab)
        runs = chosen(planned.runs, only, size)
        states = {run.name: state(run, lab) for run in runs}
        slots = parallel or room([*planned.calibrations, *runs])
        if json:
            print_json(plan_json(planned, runs, states, slots, speed))
        else:
            print(plan_markdown(planned, runs, states, slots, speed))
        return 0
    code = 0
    if report:
        planned = make_plan(found, lab)
    else:
        ran = run_suite(
            found, lab, arms=only, sizes=size, parallel=parallel, retry=retry, speed=not no_speed, tell=tell
        )
        planned, code = ran.plan, ran.exit_code
    made = make_report(planned, lab)
    from calledshot.lab.ablations import write_ablation

    page = output or records(found, lab) / "report.html"
    write_ablation(made, page)
    if json:
        print_json(made.to_json())
    else:
        print(report_markdown(made))
    tell(str(page))
    return code


def tell(text: str) -> None:
    """A message to stderr."""
    print(text, file=sys.stderr, flush=True)
