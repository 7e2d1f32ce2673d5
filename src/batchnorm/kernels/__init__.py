"""The kernels, and the answers to "which one would serve this tensor?" and "which one ran?".

Nothing here loads Numba; the first call that needs a compiled kernel does.
"""

from batchnorm.kernels.choice import Kernel, Ran, ran, using, which

__all__ = ["Kernel", "Ran", "ran", "using", "which"]
