#!/bin/bash
# Quantizes a model of the Hub into a folder, and goes on after whatever stops it.
#   apptainer build streamquant.sif docker-daemon://streamquant:latest
#   SOURCE=org/model OUT=/scratch/me/out SCHEME=FP8_DYNAMIC IMAGE=$PWD/streamquant.sif sbatch slurm.sh
#SBATCH --job-name=streamquant
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=2G               # what the plan is checked against, where Slurm uses control groups
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60       # a minute before the time is over
#SBATCH --requeue              # after preemption and the failure of a node
#SBATCH --open-mode=append     # one log for all runs of the job
#SBATCH --output=streamquant-%j.log

# Slurm sends the signal to the step that srun starts, so to the program itself, which finishes its blocks, flushes them, and exits
# with 75. To send it to this script instead (B:TERM@60) and on to srun would not do: srun, when it gets SIGTERM, kills the step.
set -euo pipefail

: "${SOURCE:?a model of the Hub, or a folder}"
: "${OUT:?a folder on a file system that every node sees, with room for the output}"
: "${SCHEME:?see streamquant schemes}"
: "${IMAGE:?the image, as a file of apptainer}"
MAX_RESTARTS=20

OUT=$(realpath --canonicalize-missing "$OUT")
folder=$(dirname "$OUT")
mkdir -p "$folder"
status=0
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    apptainer run --bind "$folder" "$IMAGE" \
    convert "$SOURCE" "$OUT" --scheme "$SCHEME" --log-json "$OUT.log.jsonl" || status=$?

# The time was over. After scancel this script is not there any more, and preempted jobs are requeued by Slurm.
if [[ $status -eq 75 && ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
