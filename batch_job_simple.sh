#!/bin/bash -l
#SBATCH --job-name=simple        # the name that squeue shows
##SBATCH --account=project_2000000    # the project that pays: write yours, delete one #
#SBATCH --output=out.txt         # what the script prints; the next job writes it anew
#SBATCH --error=err.txt          # error messages, likewise
#SBATCH --partition=serial       # the queue to wait in; sinfo lists all queues
#SBATCH --time=00:01:00          # longest run time: hours, minutes, seconds
#SBATCH --ntasks=1               # one program is started
#SBATCH --cpus-per-task=1        # CPUs for this program
#SBATCH --mem-per-cpu=500        # MB of memory for each CPU

# What follows the name of this file in the command: a raster, or the default after :-
raster=${1:-tests/data/jacksboro.vrt}

# Use .venv, which README makes, if it exists. Otherwise load a module with Python and
# rasterio: replace geo-env by its name. (On many clusters, only a login shell knows the
# command module: hence the -l in the first line.)
if source .venv/bin/activate 2>/dev/null; then
    unset PROJ_DATA PROJ_LIB GDAL_DATA # a module sets them for another GDAL than .venv has
else
    module load geo-env
fi

# exec: Python takes the place of this shell. So scancel and the time limit reach Python,
# and it can clean up. "${@:2}" is what follows the raster in the command: a window.
exec python simple_focal_mean.py -- "$raster" "${@:2}"
