"""Real trainings, healthy or with one planted trouble, that measure the rules of ``pytracker.diagnostics``.

``python -m benchmarks.diagnosis`` trains them all, prints the figures and writes them, dated, into docs/results.
"""
