"""`ov2 bench`: a step of ov2 against one of CoCa and CLIP of the same encoder, side by side on one machine.

Each contender lives in a process of its own (worker.py, the only module here that knows the seam), held open while
they take turns. `run.py` asks them (client.py), `results.py` says what the figures mean, `report.py` and `plot.py`
write them down. `pipeline.py` is `ov2 bench data`.
"""
