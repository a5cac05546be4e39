#!/bin/bash
# One training over nodes of 8 GPUs under SLURM:   sbatch --nodes=8 recipes/hardware/slurm.sh forward/wan2.1-t2v-14b --hardware 64gpu
# One task a node: anyflow starts that node's ranks and watches them. A node that fails ends the others.
#SBATCH --job-name=anyflow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-29400}
# anyflow sets it for itself; what else the job starts has it too, and a setting of one's own stays
if [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}; fi
mkdir -p runs

# From Slurm 22.05 on srun does not take over --cpus-per-task by itself: without it all ranks of a node share one core.
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}

# The run has the job's name, so that a requeued job finds it. SIGTERM comes 300 s before the time is up: the ranks save
# and exit with 75, which means "start me again".
srun $cpus --kill-on-bad-exit=1 .venv/bin/anyflow train "$@" --out "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" --resume auto
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
