"""`shot eval`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from calledshot.cli.arguments import Json, print_json, table
from calledshot.recipe import ShotError, UsageError, units

if TYPE_CHECKING:
    from calledshot.evals import Evaluation, Measure, Scored


def count(kind: type, tokens: Any) -> int:
    """A number of tokens, `64k` too."""
    del kind
    return units.whole(tokens[0].value)


def eval_(
    *runs: Annotated[str, Parameter(help="Names or folders of runs, or RUN@STEP; several stand side by side.")],
    tokens: Annotated[int, Parameter(converter=count, help="Held-out tokens of each source; 0 reads all.")] = 0,
    source: Annotated[tuple[str, ...], Parameter(negative=(), help="Only this source (repeatable).")] = (),
    split: Annotated[
        Literal["held-out", "train"], Parameter(help="Documents held out, or those trained on.")
    ] = "held-out",
    predict: Annotated[
        Literal["auto", "whole", "suffixes", "gaps"],
        Parameter(
            help="All of a document; the suffixes of its pieces, which all topologies can; or gaps in its middle. auto "
            "is all, or suffixes where there is an encoder."
        ),
    ] = "auto",
    text: Annotated[
        tuple[Path, ...], Parameter(negative=(), consume_multiple=True, help="Text files to score instead.")
    ] = (),
    compressors: Annotated[bool, Parameter(negative=(), help="Also what xz -9e makes of the same documents.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Parameter(help="Of the matmuls; auto takes what the run was trained in."),
    ] = "auto",
    json: Json = False,
) -> int:
    """Loss, perplexity and bits per byte of held-out documents, by source and language.

    Every document is predicted from its beginning, in rows of the model's context, its end included. With `--predict
    suffixes` models of different topologies and objectives predict the same bytes, with `gaps` the same stretches of 16
    tokens: from both sides where they learned to, else from the left. Intervals are 95 %, over documents. What comes
    out is kept in the run's evals/. One of several runs that cannot be evaluated does not keep the others from it; the
    exit code is 1 then.
    """
    from calledshot.cli.progress import bar
    from calledshot.evals import check_question, evaluate
    from calledshot.rundir import find_lab, resolve_checkpoint

    if not runs:
        raise UsageError("eval needs a run: `shot eval RUN`; `shot runs` lists those that are")
    lab = find_lab()
    checkpoints = [resolve_checkpoint(reference, lab) for reference in runs]
    check_question(tokens=tokens, split=split, predict=predict, texts=text, with_compressors=compressors)
    evaluations, failures = [], []
    with bar() as progress:
        for run, step in checkpoints:
            try:
                made = evaluate(run, step, sources=source, tokens=tokens, split=split, predict=predict, texts=text,
                                with_compressors=compressors, dtype=dtype, progress=progress)  # fmt: skip
            except ShotError as error:
                if len(checkpoints) == 1:
                    raise
                failures.append(str(error) if run.name in str(error) else f"{run.name}: {error}")
            else:
                evaluations.append(made)
    if json:
        print_json([as_json(each, evaluations[0]) for each in evaluations])
    elif evaluations:
        print(table(rows(evaluations), right=range(2, 8)))
    for each in evaluations:
        each.save()
        print(f"kept in {each.path}", file=sys.stderr)
    if caution := unlike(evaluations):
        print(caution, file=sys.stderr)
    for failure in failures:
        print(f"shot: {failure}", file=sys.stderr)
    return 1 if failures else 0


def unlike(evaluations: Sequence[Evaluation]) -> str:
    """Why the numbers of several runs do not compare; empty where they do."""
    kinds = list(dict.fromkeys(each.kind for each in evaluations))
    if len(kinds) > 1:
        return (
            f"The runs were not asked for the same ({', '.join(kinds)}): their numbers do not compare; "
            "`--predict suffixes` asks all for the same."
        )
    pieces = sorted({each.pieces for each in evaluations})
    if len(pieces) > 1:
        return (
            f"The runs read pieces of {' and '.join(f'{size:,}' for size in pieces)} tokens: their suffixes are not "
            "the same text, and the numbers do not compare."
        )
    return ""


def rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """A table: source by source the runs, one under the other, then other compressors."""
    lines = [
        ("run", "source", "documents", "tokens", "bytes/token", "loss", "perplexity", "bits/byte", "95 %",
         "less the first")
    ]  # fmt: skip
    first = evaluations[0]
    for source in dict.fromkeys(source for evaluation in evaluations for source in evaluation.scored):
        for evaluation in (each for each in evaluations if source in each.scored):
            one = evaluation.scored[source]
            name = f"{evaluation.run.name}@{evaluation.step}"
            same = unlike([first, evaluation]) == ""
            against = "" if evaluation is first else difference(one, first.scored.get(source)) if same else "other text"
            lines.append(line(name, source, one.measure(), against))
            lines += [line(name, f"  {language}", found) for language, found in one.by_language().items()]
        for name, bits in first.references.get(source, {}).items():
            lines.append((name, source, *[""] * 5, f"{bits:.3f}", "", ""))
    blank = {place for place, column in enumerate(zip(*lines[1:], strict=True)) if not any(column)}
    return [tuple(cell for place, cell in enumerate(one) if place not in blank) for one in lines]


def line(run: str, source: str, measure: Measure, against: str = "") -> tuple[str, ...]:
    """One row of the table."""
    from calledshot.stats import FEW

    bits = measure.bits_per_byte
    known = math.isfinite(bits.half_width)
    interval = [f"[{bits.low:.3f}, {bits.high:.3f}]"] if known else []
    interval += ["few documents"] if measure.documents < FEW else []
    shown = "n/a" if math.isnan(bits.value) else f"{bits.value:.3f}"
    return (
        run, source, f"{measure.documents:,}", f"{measure.tokens:,}", f"{measure.bytes_per_token:.2f}",
        f"{measure.loss.value:.3f}", f"{measure.perplexity:,.2f}", shown,
        " ".join(interval), against,
    )  # fmt: skip


def difference(one: Scored, first: Scored | None) -> str:
    """Bits per byte less the first run's, paired by document, as far as they can be compared."""
    from calledshot.evals import compare
    from calledshot.stats import format_interval

    found = None if first is None else compare(one, first)
    if found is None:
        return "other documents"
    if not math.isfinite(found.difference.half_width):
        return f"{found.difference.value:.3f}"
    return f"{format_interval(found.difference)}, p = {found.p_value:.2g}"


def as_json(evaluation: Evaluation, first: Evaluation) -> dict[str, Any]:
    """An evaluation's summary, and its differences from the first one's."""
    from calledshot.evals import compare

    differences = {}
    comparable = evaluation is not first and not unlike([first, evaluation])
    for source in evaluation.scored.keys() & first.scored.keys() if comparable else ():
        found = compare(evaluation.scored[source], first.scored[source])
        if found:
            ends = found.difference
            low, high = (end if math.isfinite(end) else None for end in (ends.low, ends.high))
            differences[source] = {"bits_per_byte": ends.value, "low": low, "high": high, "p_value": found.p_value}
    names = {"run": evaluation.run.name, "id": evaluation.identifier}
    return names | evaluation.summary() | ({"less_first": differences} if differences else {})
