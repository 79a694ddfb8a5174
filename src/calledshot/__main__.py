"""`python -m calledshot` is `shot`: the form that torchrun and srun start."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
