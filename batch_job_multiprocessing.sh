#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=out.txt         # what the script prints goes here,
#SBATCH --error=err.txt          # and what went wrong goes here
#SBATCH --partition=serial       # the queue for jobs on one node, Taito's default
#SBATCH --time=00:00:05          # the job may take 5 seconds; Slurm grants a minute
#SBATCH --ntasks=1               # one program is started,
#SBATCH --cpus-per-task=4        # which runs in as many processes, on one node
#SBATCH --mem=600                # MB, for all processes of the job together

# sbatch batch_job_multiprocessing.sh [RASTER [WINDOW]]: blur a raster, else all sheets.

# Python with rasterio: .venv in the folder where you submit, else Taito's module.
source .venv/bin/activate 2>/dev/null || module load geo-env 2>/dev/null || {
    echo "No Python with rasterio: make .venv as README says, or load a module here" >&2
    exit 1
}
# In the place of this shell, so that Python is told when Slurm ends the job. No srun:
# from Slurm 22.05 on it would give all processes one CPU.
exec python multiprocessing_focal_mean.py "${1:-tests/data/jacksboro.vrt}" "${@:2}"
