#!/bin/bash
# sbatch docs/slurm.sh model=latent_unet data=laion …    trains on two nodes of eight GPUs, for as many days as it takes.
#SBATCH --job-name=carrara
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before its time is up this script gets USR1, and hands it on to every task. The run saves a checkpoint of
# its step and ends; the job goes back into the queue, and resume=auto goes on with the newest unfinished run of the same
# configuration. (srun's exit code does not tell: where it kills the slower tasks, it is that of the kill.)
time_is_up=
trap 'time_is_up=1; kill -USR1 "$step"' USR1
srun --kill-on-bad-exit=1 python train.py resume=auto "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do # the signal ended the wait, and not srun
    wait "$step"
    code=$?
done
if [ -n "$time_is_up" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
