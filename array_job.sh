#!/bin/bash -l
#SBATCH --job-name=array         # the name that squeue shows
##SBATCH --account=project_2000000    # the project that pays: write yours, delete one #
#SBATCH --output=array_job_out_%A_%a.txt    # one file for each task: %A is the job's number
#SBATCH --error=array_job_err_%A_%a.txt     # and %a the task's number; error messages
#SBATCH --partition=serial       # the queue to wait in; sinfo lists all queues
#SBATCH --time=00:01:00          # longest run time: hours, minutes, seconds
#SBATCH --ntasks=1               # one program is started
#SBATCH --cpus-per-task=1        # CPUs for this program
#SBATCH --mem-per-cpu=500        # MB of memory for each CPU
#SBATCH --array=1-2              # tasks 1 and 2; each gets the time, CPUs, memory above

# What follows the name of this file in the command: a list, or the default after :-
list=${1:-mapsheets.txt} # the path of one raster in each line

# The raster of this task: the line of the list that has the task's number.
# (With command and -- this also works if a function is named sed, or a list -x.txt.)
raster=$(command sed -n "${SLURM_ARRAY_TASK_ID}p" -- "$list" 2>/dev/null)
raster=${raster%$'\r'} # without the carriage return of Windows text files
if [[ $raster != *[![:space:]]* ]]; then
    echo "$list, line $SLURM_ARRAY_TASK_ID: no raster there, or no such list" >&2
    exit 1
fi

# Use .venv, which README makes, if it exists. Otherwise load a module with Python and
# rasterio: replace geo-env by its name. (On many clusters, only a login shell knows the
# command module: hence the -l in the first line.)
if source .venv/bin/activate 2>/dev/null; then
    unset PROJ_DATA PROJ_LIB GDAL_DATA # a module sets them for another GDAL than .venv has
else
    module load geo-env
fi

# exec: Python takes the place of this shell. So scancel and the time limit reach Python,
# and it can clean up. "${@:2}" is what follows the list in the command: a window.
exec python simple_focal_mean.py -- "$raster" "${@:2}"
