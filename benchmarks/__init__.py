"""The project's own benchmark: our layers against baselines, every figure behind a check that the results are right.

``grid`` and ``plans`` say what is measured, ``chains``, ``whole``, ``policies`` and ``baselines`` hold contenders,
``worker`` is the process that times, ``traffic`` and ``memory`` count bytes, ``targets`` judges, ``tables``, ``report``
and ``page`` show, and ``run`` does it all. ``folding`` measures folded networks, and has a report of its own. The gate,
the clock and the layers themselves are those of ``batchnorm.benchmark``, which users have, too.
"""
