"""Runs on SLURM, through submitit: submission, the job itself, requeueing, the state of runs, sweeps."""
