"""Real trainings, healthy or with one planted trouble, against which the rules of ``pytracker.diagnostics`` are measured.

``python -m benchmarks.diagnosis`` trains them all, prints the figures and writes them to docs/results/diagnosis.md.
"""
