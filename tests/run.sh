#!/bin/bash
# Install what the tests need, where that is allowed, and run them:
#     bash tests/run.sh [ARGUMENTS OF PYTEST]
# PYTHON=python3.13 takes another Python, OLDEST=1 the oldest packages that may be used.
set -eu
cd "$(dirname "$0")/.."
packages=(slurm-wlm munge slurmdbd mariadb-server-core libslurm-perl libslurmdb-perl lmod
    libnss-wrapper gdal-bin shellcheck)
install() { # what would take another database away is not installed
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
        --no-install-recommends --no-remove "${packages[@]}" >/dev/null
}
if ! dpkg --status "${packages[@]}" &>/dev/null && { [ "$(id -u)" != 0 ] || ! install; }; then
    echo "Tests are skipped that need all of: sudo apt-get install ${packages[*]}" >&2
fi
venv=.venv${PYTHON:+-$(basename "$PYTHON")}${OLDEST:+-oldest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
packages=(-r requirements.txt)
[ -z "${OLDEST:-}" ] || mapfile -t packages < <(sed 's/>=/==/' requirements.txt)
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "${packages[@]}" -r tests/requirements.txt
# So that README's python3 is this one, too, and the tests find Slurm's daemons.
export PATH="$PWD/$venv/bin:$PATH:/usr/sbin"
# Each file in a process of its own, as many tests wait; what passed leaves no files.
exec "$venv/bin/python" -m pytest -ra --numprocesses 3 --dist loadfile \
    --no-loadscope-reorder -o tmp_path_retention_policy=failed tests "$@"
