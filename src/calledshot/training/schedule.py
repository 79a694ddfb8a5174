"""The learning rate over the run, as a factor of its peak."""

from __future__ import annotations

import math

from calledshot.recipe import schema


def learning_rate_factor(schedule: schema.Schedule, step: int, steps: int) -> float:
    """Factor for update `step` (from 0) of `steps`: a linear warmup, then

    `wsd`: flat, then linear to `final` over the last `decay` of the run (Hu et al. 2024, arXiv 2404.06395; linear as in
    Hägele et al. 2024, arXiv 2405.18392); `cosine`: half a cosine to `final`; `constant`: flat.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "wsd":
        decay = max(1, round(schedule.decay * steps))
        left = steps - step
        return 1.0 if left > decay else schedule.final + (1.0 - schedule.final) * left / decay
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
