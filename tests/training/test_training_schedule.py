"""Learning rates over a run, against tables worked out by hand."""

from __future__ import annotations

import pytest

from calledshot.recipe.schema import Schedule
from calledshot.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        # Ten steps: two up, four flat, four down in quarters to nothing, which the step after the last would have.
        (Schedule("wsd", warmup=0.2, decay=0.4, final=0.0), [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (Schedule("wsd", warmup=0.2, decay=0.4, final=0.2), [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        (Schedule("wsd", warmup=0.0, decay=1.0, final=0.0), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (Schedule("wsd", warmup=0.0, decay=0.0, final=0.0), [1] * 10),
        (Schedule("constant", warmup=0.4, decay=0.4, final=0.0), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        # Half a cosine over eight steps: cos(pi k / 8) for k = 0 ... 7.
        (
            Schedule("cosine", warmup=0.2, final=0.0),
            [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
        ),
        (
            Schedule("cosine", warmup=0.2, final=0.1),
            [0.5, 1, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254],
        ),
    ],
)
def test_factors_of_ten_steps(schedule: Schedule, table: list[float]) -> None:
    got = [learning_rate_factor(schedule, step, 10) for step in range(10)]
    assert got == pytest.approx(table, abs=1e-6)
