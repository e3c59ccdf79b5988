#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=out.txt         # what the script prints goes here,
#SBATCH --error=err.txt          # and what went wrong goes here
#SBATCH --partition=serial       # the queue for jobs on one node, Taito's default
#SBATCH --time=00:00:05          # the job may take 5 seconds; Slurm grants a minute
#SBATCH --ntasks=1               # one program is started,
#SBATCH --cpus-per-task=1        # which runs in one process
#SBATCH --mem=200                # MB, for a sheet of 3000 x 3000 pixels

# sbatch batch_job_simple.sh [RASTER [WINDOW]]: blur a raster, else the first map sheet.

# Python with rasterio: .venv in the folder where you submit, else Taito's module.
source .venv/bin/activate 2>/dev/null || module load geo-env 2>/dev/null || {
    echo "No Python with rasterio: make .venv as README says, or load a module here" >&2
    exit 1
}
# In the place of this shell, so that Python is told when Slurm ends the job.
exec python simple_focal_mean.py "${1:-$(head -n 1 mapsheets.txt)}" "${@:2}"
