#!/bin/bash
# Install what the tests need, where that is allowed, and run them:
#     bash tests/run.sh [ARGUMENTS OF PYTEST]
#     PYTHON=python3.13 bash tests/run.sh    with another Python, in .venv-python3.13
#     OLDEST=1 bash tests/run.sh             with the oldest packages that may be used
set -eu
cd "$(dirname "$0")/.."
venv=.venv${PYTHON:+-$(basename "$PYTHON")}${OLDEST:+-oldest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
packages=(-r requirements.txt)
[ -z "${OLDEST:-}" ] || mapfile -t packages < <(sed 's/>=/==/' requirements.txt)
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "${packages[@]}" -r tests/requirements.txt
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
export PATH="$PWD/$venv/bin:$PATH" # so that README's python3 is this one, too
# Each file in a process of its own, as many tests wait for something.
exec "$venv/bin/python" -m pytest -ra --numprocesses 4 --dist loadfile \
    --no-loadscope-reorder tests "$@"
