"""`ov2 bench`: a training step of ov2 against one of CoCa and CLIP around the same encoder, in turns on one machine.

`turns.py` asks the variants, each in a process of its own, for what `measured_step.py` measures;
`bench_report.py` says what follows from it. `pipeline.py` is `ov2 bench data`.
"""
