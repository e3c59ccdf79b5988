#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=array_job_out_%A_%a.txt    # a file for each task: %A is the job's
#SBATCH --error=array_job_err_%A_%a.txt     # number and %a the task's
#SBATCH --partition=serial       # the queue for jobs on one node, Taito's default
#SBATCH --time=00:00:05          # for each task; Slurm rounds up to a minute
#SBATCH --ntasks=1               # each task starts one program,
#SBATCH --cpus-per-task=1        # which runs on so many CPUs of one node
#SBATCH --mem-per-cpu=300        # MB for each of these CPUs
#SBATCH --array=1-2              # the tasks: one for each of the lines 1 to 2

# sbatch array_job.sh [LIST [WINDOW]]: blur the rasters that a list names, one a line.

script=simple_focal_mean.py # or multiprocessing_focal_mean.py
list=${1:-mapsheets.txt}
first=${SLURM_ARRAY_TASK_ID:?is missing: start this with sbatch, or set it to a line}
last=$((first + ${SLURM_ARRAY_TASK_STEP:-1} - 1)) # a step of 100 is 100 lines a task
end=$(sed -n '/[^[:space:]]/=' <"$list" | tail -n 1) # the last line that is not blank
if [ "$first" -gt "${end:-0}" ]; then
    echo "$list, line $first: no raster there, the last one is in line ${end:-0}" >&2
    exit 1
fi

# Python with rasterio: .venv in the folder where you submit, else Taito's module.
source .venv/bin/activate 2>/dev/null || module load geo-env 2>/dev/null || {
    echo "No Python with rasterio: make .venv as README says, or load a module here" >&2
    exit 1
}
# Two rasters that would have the same result: the script knows how it names them.
twins=$(tr -d '\r' <"$list" | python -c "
import sys
from ${script%.py} import find_result
names = [line.rstrip('\n') for line in sys.stdin if line.strip()]
seen = {}
for name in names:
    other = seen.setdefault(find_result(name), name)
    if other is not name:
        print(other, 'and', name)") || exit 1
if [ -n "$twins" ]; then
    echo "$list: the same result in smooth for: $twins" >&2
    exit 1
fi

trap "exit 143" TERM # when Slurm ends the job: after Python, which is told too
status=0
for line in $(seq "$first" $((last < end ? last : end))); do
    raster=$(sed -n "${line}p" <"$list" | tr -d '\r') # Windows ends its lines with \r
    if [ -z "$raster" ]; then
        echo "$list, line $line: empty" >&2
        status=1
        continue
    fi
    python "$script" -- "$raster" "${@:2}" || status=$?
done
exit $status
