"""calledshot: a pretraining lab for small teams. The command is `shot`; rooms and rules are in CONTRIBUTING.md."""

__version__ = "0.1.0"
