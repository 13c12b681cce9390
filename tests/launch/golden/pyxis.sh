#!/bin/bash

# Parameters
#SBATCH --gpus-per-node=1
#SBATCH --job-name=run
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/logs/run/submit/001/logs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
export OMP_NUM_THREADS=1
export PYTHONPATH=/shared/logs/run/submit/001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/logs/run/submit/001/logs/%j_%t_log.out --kill-on-bad-exit=1 '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/shared:/shared bash -c 'trap "" USR2 TERM; exec "$@"' ov2 python -u -m submitit.core._submit /shared/logs/run/submit/001/logs


# teardown
ov2_status=$?
ov2_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; ov2_job=${ov2_job:-$SLURM_JOB_ID}
[ "$ov2_status" -eq 0 ] || { srun --nodes=1 --ntasks=1 --overlap '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/shared:/shared python -m open_clip_ov2.launch.ends /shared/logs/run/submit/001 "$ov2_status"; ov2_status=$?; }
if [ "$ov2_status" -eq 75 ] && [ "$(squeue -h -j "$ov2_job" -o %T)" = RUNNING ]; then
  scontrol requeue "$ov2_job" && sleep 60
fi
exit "$ov2_status"