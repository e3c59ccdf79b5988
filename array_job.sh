#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=array_job_out_%A_%a.txt    # a file for each task: %A is the job's
#SBATCH --error=array_job_err_%A_%a.txt     # number and %a the task's
#SBATCH --partition=serial       # the queue for jobs on one node: sinfo lists yours
#SBATCH --time=00:00:05          # for each task; Slurm rounds up to a minute
#SBATCH --ntasks=1               # each task starts one program,
#SBATCH --cpus-per-task=1        # which runs on so many CPUs of one node
#SBATCH --mem-per-cpu=500        # MB for each of these CPUs
#SBATCH --array=1-2              # the tasks: one for each of the lines 1 to 2

# sbatch [--array=1-N] array_job.sh [LIST [WINDOW]] blurs the rasters of a list.
script=simple_focal_mean.py # or multiprocessing_focal_mean.py
list=${1:-mapsheets.txt}
first=${SLURM_ARRAY_TASK_ID:?is missing: sbatch sets it} # the number of this task
step=${SLURM_ARRAY_TASK_STEP:-1} # --array=1-900:100 makes 9 tasks of 100 lines each
stop() { echo "$list$1" >&2; exit 1; }

# Python with rasterio: .venv as README makes it, else a module: change geo-env to yours.
source .venv/bin/activate 2>/dev/null || module load geo-env
# The last line with a name. A raster has none: it is binary or, as a .vrt, all in <>.
end=$(LC_ALL=C grep -Ins "^ *[^<[:space:]]" -- "$list" | tail -n 1 | cut -d: -f1)
[ -n "$end" ] || stop ": no such list, which is a text with a raster's path in each line"
((first > 0 && first <= end)) || stop ", line $first: no raster there, use --array=1-$end"
last=$((first + step > end ? end : first + step - 1))
if ((first == ${SLURM_ARRAY_TASK_MAX:-0} && last < end)); then # no task comes after it
    left=$((last + 1))-$end
    echo "$list: no task does lines $left: sbatch --array=$left:$step"
fi
trap "exit 143" TERM # when Slurm ends the job: after Python, which is told, too
for line in $(seq "$first" "$last"); do
    raster=$(sed -n "1s/^\xEF\xBB\xBF//; s/\r\$//; ${line}p" <"$list") # no Windows' marks
    if [ -z "$raster" ]; then
        echo "$list, line $line: empty" >&2
        failed=1
    else
        python "$script" -- "$raster" "${@:2}" || failed=1 # and go on
    fi
done
exit "${failed:-0}"
