"""What an objective is made of: the denoisers that it resolves to, and what makes one impossible."""

from collections.abc import Iterator
from dataclasses import replace

from .schema import Denoiser, Objective, Recipe

KINDS = ("causal", "prefix", "span", "ul2", "ul2r", "mixture")
MODES = ("R", "S", "X")
READ_BY = {"rate": ("span",), "mean_span": ("span",), "mode_tokens": ("ul2", "ul2r")}
"""The kinds that read a key of the objective which others have no use for."""
MOST_DENOISERS = 100
SHORTEST_CONTEXT = 8
"""Positions in which the shortest piece of a document fits with its mode token, sentinels and end, in every layout."""

UL2 = (
    Denoiser("span", rate=0.15, mean_span=3, mode="R"),
    Denoiser("span", rate=0.15, mean_span=8, mode="R"),
    Denoiser("prefix", rate=0.25, mode="S"),
    Denoiser("span", rate=0.5, mean_span=3, mode="X"),
    Denoiser("span", rate=0.5, mean_span=8, mode="X"),
    Denoiser("span", rate=0.15, mean_span=64, mode="X"),
    Denoiser("span", rate=0.5, mean_span=64, mode="X"),
)
"""UL2's seven (Tay et al. 2022, "UL2: Unifying Language Learning Paradigms", table 1), drawn evenly, as the paper's
code does where it is given no rates; its section 4.5 is also quoted for 40 % R, 40 % X and 20 % S. That code leaves the
S-denoiser at T5's rate of 0.5; the table's mean span of a quarter of the text asks for 0.25, which is taken."""

UL2R = (
    Denoiser("span", weight=0.25, rate=0.15, mean_span=3, roll=True, mode="R"),
    Denoiser("span", weight=0.125, rate=0.15, mean_span=32, roll=True, mode="X"),
    Denoiser("span", weight=0.125, rate=0.5, mean_span=3, roll=True, mode="X"),
    Denoiser("prefix", weight=0.5, rate=0.25, mode="S"),
)
"""UL2R's four (Tay et al. 2022, "Transcending Scaling Laws with 0.1% Extra Compute", section 3.3), as levanter reads
it: half S, and the corruption of spans rotated."""

CAUSAL = (Denoiser("causal"),)
PREFIX = (Denoiser("prefix", rate=0.5),)
"""T5's prefix LM: a prefix of any length is as likely as any other."""


def denoisers(objective: Objective) -> tuple[Denoiser, ...]:
    """The tasks that the objective draws from, each with a weight above 0."""
    match objective.kind:
        case "causal":
            return CAUSAL
        case "prefix":
            return PREFIX
        case "span":
            return (Denoiser("span", rate=objective.rate, mean_span=objective.mean_span),)
        case "ul2" | "ul2r":
            mixed = UL2 if objective.kind == "ul2" else UL2R
            return mixed if objective.mode_tokens else tuple(replace(one, mode="") for one in mixed)
    return tuple(one for one in objective.denoisers if one.weight > 0)


def described(denoiser: Denoiser) -> str:
    """A denoiser in few words: what is done, how much of it, in spans of how many tokens, under which mode token."""
    words = [denoiser.kind]
    if denoiser.kind != "causal":
        words.append(f"{denoiser.rate:.0%}")
    if denoiser.kind == "span":
        words.append(f"by {denoiser.mean_span:g}")
    return " ".join([*words, *([denoiser.mode] if denoiser.mode else [])])


def objective_problems(recipe: Recipe) -> Iterator[str]:
    """Objectives that cannot be drawn from, or that the topology cannot learn from."""
    objective, model = recipe.objective, recipe.model
    if objective.denoisers and objective.kind != "mixture":
        yield (
            f'objective.denoisers belong to objective.kind = "mixture", which is {objective.kind!r}: leave one of them '
            "out"
        )
        return
    for key, kinds in READ_BY.items():
        if (value := getattr(objective, key)) != getattr(Objective(), key) and objective.kind not in kinds:
            yield (
                f"objective.{key} = {value} is for objective.kind = {' or '.join(kinds)}, and that is "
                f"{objective.kind!r}: change it, or leave objective.{key} out"
            )
    if objective.kind == "mixture":
        bad = list(_mixture_problems(objective.denoisers))
        yield from bad
        if bad:
            return
    elif objective.kind == "span":
        yield from _span_problems("objective", objective.rate, objective.mean_span)
    kinds = {one.kind for one in denoisers(objective)}
    two = model.topology == "encoder-decoder"
    if two and "causal" in kinds:
        yield (
            f"objective.kind = {objective.kind!r} has causal text, which gives an encoder nothing to read: set "
            "objective.kind=span, or choose prefix, ul2, ul2r or a mixture of span and prefix"
        )
    shortest = min(model.context, model.encoder_context or model.context) if two else model.context
    # Prefixes are packed two together.
    shortest -= (model.encoder_pooling - 1) * (2 if "prefix" in kinds else 1)
    if kinds != {"causal"} and shortest < SHORTEST_CONTEXT:
        yield f"a context of {shortest} is too short for {objective.kind}: take {SHORTEST_CONTEXT} or more"


def _mixture_problems(mixed: tuple[Denoiser, ...]) -> Iterator[str]:
    if all(one.weight == 0 for one in mixed):
        yield 'objective.kind = "mixture" draws from objective.denoisers: give at least one, of a weight above 0'
    if len(mixed) > MOST_DENOISERS:
        yield f"objective.denoisers are {len(mixed)}: at most {MOST_DENOISERS}"
    for place, one in enumerate(mixed):
        key = f"objective.denoisers.{place}"
        if one.kind not in ("span", "prefix", "causal"):
            yield f"{key}.kind = {one.kind!r}: choose span or prefix or causal"
        if not 0 <= one.weight < float("inf"):
            yield f"{key}.weight = {one.weight} must be a number that is not negative"
        if one.mode not in ("", *MODES):
            yield f"{key}.mode = {one.mode!r}: choose {' or '.join(MODES)}, or leave it empty"
        if one.kind == "span":
            yield from _span_problems(key, one.rate, one.mean_span)
        if one.kind == "prefix" and not 0 < one.rate <= 0.5:
            yield f"{key}.rate = {one.rate} must be more than 0 and at most 0.5, where every split is as likely"


def _span_problems(key: str, rate: float, mean_span: float) -> Iterator[str]:
    if not 0 < rate < 1:
        yield f"{key}.rate = {rate} is a share of the tokens: more than 0 and less than 1"
    if not 1 <= mean_span < float("inf"):
        yield f"{key}.mean_span = {mean_span} must be at least 1 token"
