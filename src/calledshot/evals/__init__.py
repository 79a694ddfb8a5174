"""Tasks and scoring: what held-out documents, and any text, cost a model."""

from calledshot.evals.compression import compressors
from calledshot.evals.evaluation import Evaluation, check_question, compare, evaluate
from calledshot.evals.scoring import Measure, Scored, prepared_data, score_prepared, score_texts

__all__ = [
    "Evaluation",
    "Measure",
    "Scored",
    "check_question",
    "compare",
    "compressors",
    "evaluate",
    "prepared_data",
    "score_prepared",
    "score_texts",
]
