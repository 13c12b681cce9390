#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --job-name=run
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1024000MB
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/logs/run/submit/001/logs/%j_0_log.out
#SBATCH --partition=train
#SBATCH --requeue
#SBATCH --reservation=vision
#SBATCH --signal=USR2@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
module load cuda
export OMP_NUM_THREADS=12
export NCCL_DEBUG=WARN
export GREETING='a b'
export PYTHONPATH=/shared/logs/run/submit/001/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/logs/run/submit/001/logs/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 bash -c 'trap "" USR2 TERM; exec "$@"' ov2 /env/bin/python -u -m submitit.core._submit /shared/logs/run/submit/001/logs


# teardown
ov2_status=$?
ov2_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; ov2_job=${ov2_job:-$SLURM_JOB_ID}
[ "$ov2_status" -eq 0 ] || { /env/bin/python -m open_clip_ov2.launch.ends /shared/logs/run/submit/001 "$ov2_status"; ov2_status=$?; }
if [ "$ov2_status" -eq 75 ] && [ "$(squeue -h -j "$ov2_job" -o %T)" = RUNNING ]; then
  scontrol requeue "$ov2_job" && sleep 60
fi
exit "$ov2_status"