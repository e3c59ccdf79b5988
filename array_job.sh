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

# sbatch [--array=1-N] array_job.sh [--missing] [LIST [WINDOW]]
# blurs the rasters that a list names, one a line. With --missing, it skips each that has
# a result of this window, made after the raster last changed.

script=simple_focal_mean.py # or multiprocessing_focal_mean.py
missing=
if [ "${1-}" = --missing ]; then missing=yes; shift; fi
list=${1:-mapsheets.txt}
first=${SLURM_ARRAY_TASK_ID:?is missing: start this with sbatch, or set it to a line}
step=${SLURM_ARRAY_TASK_STEP:-1} # --array=1-900:100 makes 9 tasks of 100 lines each
last=$((first + step - 1))

stop() { echo "$1" >&2; exit 1; }
read_list() { sed $'1s/^\xEF\xBB\xBF//; s/\r$//' <"$list"; } # without what Windows adds

[ -e "$script" ] || # a job runs where you submit it
    stop "No $script in $PWD. Type there: ln -s /path/to/clone/{.venv,*.py,*.sh} ."
# Python with rasterio: .venv in this folder, else a module: module avail lists yours.
source .venv/bin/activate 2>/dev/null || module load geo-env 2>/dev/null ||
    stop "No Python with rasterio: make .venv as README says, or load a module here"
[ -e "$list" ] || stop "$list: there is no such list"
LC_ALL=C grep -sqI "[^[:space:]]" -- "$list" ||
    stop "$list: not a list, which is a text with the path of a raster in each line"
# The script knows how it names results: no two rasters may have the same. And a result
# tells of which raster and window it is: with --missing, this prints the lines to skip.
window=${2:-$(sed -n 's/.*default=\([0-9]*\).*/\1/p' "$script")}
skip=$(read_list | python -W ignore -c "
import os, sys
sys.path[0] = os.path.dirname(os.path.realpath('$script'))  # not your copy.py, say
import contextlib, rasterio
from ${script%.py} import find_result
path, missing, window, first, last = sys.argv[1:]
with contextlib.suppress(Exception), rasterio.open(path):
    sys.exit(f'{path}: a raster, not a list of them')
names = os.fsdecode(sys.stdin.buffer.read()).split('\n')
seen = {}
for name in filter(str.strip, names):
    other = seen.setdefault(find_result(name), name)
    if other is not name:
        sys.exit(f'{path}: the same result in smooth for: {other} and {name}')
for line in range(int(first), int(last) + 1) if missing else []:
    with contextlib.suppress(Exception):  # it is not there, or its age is not known
        with rasterio.open(names[line - 1]) as raster:
            changed = max(map(os.path.getmtime, raster.files))
        with rasterio.open(find_result(raster.name)) as result:
            tags, made = result.tags(), os.path.getmtime(result.name)
        of = tags['FOCAL_MEAN_OF'], tags['FOCAL_MEAN_WINDOW']  # no blanks in front
        if of == (raster.name.lstrip(), f'{window} x {window}') and changed <= made:
            print(line, end=' ')
" "$list" "$missing" "$window" "$first" "$last") || exit 1

end=$(read_list | sed -n '/[^[:space:]]/=' | tail -n 1) # the last line that is not blank
# Slurm does not know how long the list is: the last task says which lines none does.
if [ "$first" = "${SLURM_ARRAY_TASK_MAX-}" ]; then
    before=$((SLURM_ARRAY_TASK_MIN - 1)) left='' by=''
    ((step == 1)) || by=:$step
    ((before < 1)) || left=1-$((before < end ? before : end))
    ((last >= end)) || left=${left:+$left,}$((last + 1))-$end
    [ -z "$left" ] ||
        echo "$list: no task does lines $left: sbatch --array=${left//,/$by,}$by ..."
fi
((first >= 1 && first <= end)) ||
    stop "$list, line $first: no raster there, use --array=1-$end"

trap "exit 143" TERM # when Slurm ends the job: after Python, which is told too
status=0
for line in $(seq "$first" $((last < end ? last : end))); do
    raster=$(read_list | sed -n "${line}p")
    if [ -z "$raster" ]; then
        echo "$list, line $line: empty" >&2
        status=1
    elif [[ " $skip" = *" $line "* ]]; then
        echo "$raster: skipped, as its result is there"
    else
        python "$script" -- "$raster" "${@:2}" || status=$?
    fi
done
exit $status
