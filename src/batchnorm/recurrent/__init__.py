"""LSTM and GRU with batch normalization inside the recurrence, and running statistics of their own for every step.

``cells`` has the two classes and their equations, ``base`` layers, directions and packed sequences, ``steps`` the
statistics.

Source: Cooijmans, Ballas, Laurent, Gülçehre & Courville 2017, "Recurrent Batch Normalization", arXiv 1603.09025.
"""

from batchnorm.recurrent.cells import GRU, LSTM

__all__ = ["GRU", "LSTM"]
