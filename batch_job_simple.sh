#!/bin/bash -l
#SBATCH --job-name=simple        # the name that squeue shows
##SBATCH --account=project_2000000    # the project that pays: write yours, remove one #
#SBATCH --output=out.txt         # the file for what the script prints
#SBATCH --error=err.txt          # the file for its errors
#SBATCH --partition=serial       # the queue to wait in: sinfo lists those of a cluster
#SBATCH --time=00:00:05          # hours:minutes:seconds at most, rounded up to a minute
#SBATCH --ntasks=1               # how many programs Slurm prepares for: one
#SBATCH --cpus-per-task=1        # CPUs for each program
#SBATCH --mem-per-cpu=500        # MB of memory for each CPU

# sbatch takes, after the name of this file: [RASTER [WINDOW]]
raster=${1:-tests/data/jacksboro.vrt}

# Python with rasterio: from the folder .venv that README makes, or else from a module of
# the cluster: write its name instead of geo-env. (The -l in the first line makes bash a
# login shell: on many clusters, only that one has the command module.)
source .venv/bin/activate 2>/dev/null || module load geo-env

# exec puts Python in the place of this shell, so that Slurm's signals reach Python.
exec python simple_focal_mean.py -- "$raster" "${@:2}"
