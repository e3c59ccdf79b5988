#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=array_job_out_%A_%a.txt    # a file for each task: %A is the job's
#SBATCH --error=array_job_err_%A_%a.txt     # number and %a the task's
#SBATCH --partition=serial       # the queue for jobs on one node: sinfo lists yours
#SBATCH --time=00:00:05          # for each task; Slurm rounds up to a minute
#SBATCH --ntasks=1               # each task starts one program,
#SBATCH --cpus-per-task=1        # which runs on so many CPUs of one node
#SBATCH --mem-per-cpu=300        # MB for each of these CPUs
#SBATCH --array=1-2              # the tasks: one for each of the lines 1 to 2

# sbatch [--array=1-N] array_job.sh [LIST [WINDOW]] [--missing]
# blurs the rasters that a list names, one a line; with --missing, where it has to.

script=simple_focal_mean.py # or multiprocessing_focal_mean.py
list=${1:-mapsheets.txt}
first=${SLURM_ARRAY_TASK_ID:?is missing: start this with sbatch, or set it to a line}
step=${SLURM_ARRAY_TASK_STEP:-1} # --array=1-900:100 makes 9 tasks of 100 lines each
last=$((first + step - 1))

stop() { echo "$1" >&2; exit 1; }
read_list() { sed $'1s/^\xEF\xBB\xBF//; s/\r$//' <"$list"; } # without what Windows adds

[ -e "$script" ] || # a job runs where you submit it
    stop "No $script in $PWD. Type there: ln -s /path/to/clone/{.venv,*.py,*.sh} ."
# Python with rasterio: .venv in that folder, else a module: module avail lists yours.
source .venv/bin/activate 2>/dev/null || module load geo-env 2>/dev/null ||
    stop "No Python with rasterio: make .venv as README says, or load a module here"
[ -e "$list" ] || stop "$list: there is no such list"
if ! LC_ALL=C grep -sqI "[^[:space:]]" -- "$list" || grep -q "^<" -- "$list"; then
    stop "$list: not a list, which is a text with the path of a raster in each line"
fi

end=$(read_list | sed -n '/[^[:space:]]/=' | tail -n 1) # the last line that is not blank
if ((first < 1 || first > end)); then
    stop "$list, line $first: no raster there, use --array=1-$end"
fi
# Slurm does not know how long the list is.
if ((first == ${SLURM_ARRAY_TASK_MAX:-0} && last < end)); then
    more=$((last + 1))-$end
    echo "$list: no task does lines $more: sbatch --array=$more:$step ..."
fi

trap "exit 143" TERM # when Slurm ends the job: after Python, which is told too
status=0
for line in $(seq "$first" $((last < end ? last : end))); do
    raster=$(read_list | sed -n "${line}p")
    if [ -z "$raster" ]; then
        echo "$list, line $line: empty" >&2
        status=1
        continue
    fi
    [ "${raster#-}" = "$raster" ] || raster=./$raster # it is no option
    python "$script" "$raster" "${@:2}" || status=$?
done
exit $status
