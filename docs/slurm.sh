#!/bin/bash
# sbatch docs/slurm.sh model=latent_unet data=laion …    trains on two nodes of eight GPUs, for as many days as it takes.
#SBATCH --job-name=carrara
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before its time is up every task gets USR1. The run saves a checkpoint of its step and ends with 128 + 10;
# the job goes back into the queue, and resume=auto goes on with the newest unfinished run of the same configuration.
srun --kill-on-bad-exit=1 python train.py resume=auto "$@"
code=$?
if [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
