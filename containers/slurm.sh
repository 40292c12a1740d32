#!/bin/bash
# One subject per array task:
#   sbatch --array=1-$(wc -l < subjects.txt) containers/slurm.sh /my/bids /my/out subjects.txt
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=01:00:00
# A minute before the time is up, so that records and report are written:
#SBATCH --signal=B:TERM@60
# On a GPU: take one # off the next line, and add the options after it to `apptainer run`.
##SBATCH --gres=gpu:1
#   --nv --env CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"
set -euo pipefail
BIDS=$1 OUT=$2 SUBJECTS=$3
SUBJECT=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SUBJECTS")
# Kept until the subject is done: the same job goes on from there. Set SCRATCH to what all nodes see.
WORK=${SCRATCH:-/tmp}/qsmpipe-$USER/$SUBJECT
mkdir -p "$WORK" "$OUT"
apptainer run --cleanenv -B "$BIDS:/data:ro" -B "$OUT:/out" -B "$WORK:/work" qsmpipe.sif \
    /data /out participant --participant-label "$SUBJECT" --skip-bids-validation \
    --work-dir /work --nprocs "$SLURM_CPUS_PER_TASK" --mem-gb 15 &
trap 'kill -TERM $! || true' TERM
CODE=0
wait $! || CODE=$?
while kill -0 $! 2> /dev/null; do # a signal ends `wait`, not the run
    CODE=0
    wait $! || CODE=$?
done
[ "$CODE" -ne 0 ] || rm -rf "$WORK"
exit "$CODE"
