"""The benchmark: what would a model gain, every figure behind a check that the results are right.

``cells`` says what is measured, ``contenders`` by what, ``gate`` lets a cell through or not, ``timing`` has the clock,
``networks`` takes whole models, ``gain`` measures a user's, ``grid`` a short grid of layers, and ``report`` shows.
"""
