"""Runs on SLURM, through submitit: submission, the job itself, what became of it, sweeps.

`trainer.py` is the only module that knows `ov2 train`; `folder.py` what lies in a run's `submit` folder.
"""
