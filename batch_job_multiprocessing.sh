#!/bin/bash -l
#SBATCH --job-name=focal_mean    # what squeue calls the job
#SBATCH --output=out.txt         # what the script prints goes here,
#SBATCH --error=err.txt          # and what went wrong goes here
#SBATCH --partition=serial       # the queue for jobs on one node: sinfo lists yours
#SBATCH --time=00:00:05          # hours:minutes:seconds; Slurm rounds up to a minute
#SBATCH --ntasks=1               # one program is started,
#SBATCH --cpus-per-task=4        # which runs on so many CPUs of one node
#SBATCH --mem-per-cpu=500        # MB for each of these CPUs

# sbatch batch_job_multiprocessing.sh [RASTER [WINDOW]]

# Python with rasterio: .venv as README makes it, else a module: change geo-env to yours.
source .venv/bin/activate 2>/dev/null || module load geo-env
# In the place of this shell (exec), so that Python is told when Slurm ends the job. No
# srun: from Slurm 22.05 on it would give several processes one CPU.
exec python multiprocessing_focal_mean.py "${1:-tests/data/jacksboro.vrt}" "${@:2}"
