"""Measures how close sparse sampling stays to dense sampling: settings as data, metrics, runs, one page of results.

A development tool, like `benchmarks/`; the node pack imports nothing from here. `run.py` is the command.
"""
