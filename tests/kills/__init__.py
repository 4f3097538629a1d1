"""Runs are killed in the middle of a save, on one rank or all, and must go on as if never killed.

python -m tests.kills ranks=2 trials=200 seed=0 [any key of scripts/train.py]
"""
