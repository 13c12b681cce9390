"""Models compared on equal terms: the same data, order, pixels, optimizer and seeds; equal samples, seconds or FLOPs.

A variant is one way to train; a run is one variant with one seed. Everything else is equal unless the comparison's file
says so. One comparison goes through `config.py` (the file), `measuring.py` (speed and memory), `plan.py` (learning
rates, runs and their samples), `study.py` (trains, evaluates, gathers), `results.py`, `answers.py`, and `page.py`.
"""
