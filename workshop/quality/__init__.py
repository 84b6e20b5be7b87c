"""How close sparse sampling stays to dense sampling, measured: settings as data, metrics, runs, results as one page.

A development tool beside `benchmarks/`; nothing here is imported when the node pack starts. `run.py` is the command.
"""
