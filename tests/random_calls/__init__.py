"""Random calls of batch normalization, judged by float64 mathematics, with guarded memory.

`python -m tests.random_calls --seed 7 --seconds 600 --cases 10000` from the folder above `tests`.
"""

from .cases import Case, draw
from .run import run

__all__ = ["Case", "draw", "run"]
