"""The loop: optimizer, schedule, checkpoints, held-out loss; runs started, continued, forked and opened."""

from calledshot.training.load import Loaded, load_model, run_recipe
from calledshot.training.train import resume, train

__all__ = ["Loaded", "load_model", "resume", "run_recipe", "train"]
