#!/bin/bash -l
#SBATCH --job-name=array         # the name that squeue shows
##SBATCH --account=project_2000000    # the project that pays: write yours, remove one #
#SBATCH --output=array_job_out_%A_%a.txt    # each task has its own files: %A is the
#SBATCH --error=array_job_err_%A_%a.txt     # number of the job, %a that of the task
#SBATCH --partition=serial       # the queue to wait in: sinfo lists those of a cluster
#SBATCH --time=00:00:05          # hours:minutes:seconds at most, rounded up to a minute
#SBATCH --ntasks=1               # how many programs Slurm prepares for: one
#SBATCH --cpus-per-task=1        # CPUs for each program
#SBATCH --mem-per-cpu=500        # MB of memory for each CPU
#SBATCH --array=1-2              # the numbers of the tasks; the lines above are for each

# sbatch takes, after the name of this file: [LIST [WINDOW]]
list=${1:-mapsheets.txt} # a text file with the path of one raster in each line

# The raster of this task: the line of the list that has the task's number.
raster=$(command sed -n "${SLURM_ARRAY_TASK_ID}p" -- "$list" 2>/dev/null)
raster=${raster%$'\r'} # Windows ends a line with this sign, too
if [[ $raster != *[![:space:]]* ]]; then
    echo "$list, line $SLURM_ARRAY_TASK_ID: no raster there, or no such list" >&2
    exit 1
fi

# Python with rasterio: from the folder .venv that README makes, or else from a module of
# the cluster: write its name instead of geo-env. (The -l in the first line makes bash a
# login shell: on many clusters, only that one has the command module.)
source .venv/bin/activate 2>/dev/null || module load geo-env

# exec puts Python in the place of this shell, so that Slurm's signals reach Python.
exec python simple_focal_mean.py -- "$raster" "${@:2}"
