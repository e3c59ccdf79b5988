#!/bin/bash
# Install what the tests need, where that is allowed, and run them:
#     bash tests/run.sh [ARGUMENTS OF PYTEST]
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r tests/requirements.txt
for program in sbatch slurmctld slurmd gdalbuildvrt shellcheck /usr/share/lmod; do
    if ! command -v "$program" >/dev/null && [ ! -e "$program" ]; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get -qq update
            DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
                slurm-wlm lmod gdal-bin shellcheck >/dev/null
        fi
        break
    fi
done
# Each file in a process of its own, as many tests wait for something.
exec .venv/bin/python -m pytest -ra --numprocesses 3 --dist loadfile tests "$@"
