"""`ov2 bench`: `turns.py` asks variants, each in a process of its own, for what `measured_step.py` measures, and
`bench_report.py` says what follows from it. `pipeline.py` is `ov2 bench data`."""
