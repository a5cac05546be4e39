"""Experiments: a question, the arms that are compared, what is run for it, and the answer with its uncertainty.

experiments/NAME.yaml          the question (schema.py, load.py)
runs/experiments/NAME/         a folder for every arm, seed and, where it differs, domain (pieces.py, execute.py)
experiments/results/NAME/      the answer: figures, plots, one HTML page (measured.py, claims.py, report.py)
"""
