#!/usr/bin/env bash
# Measurements and training on a machine with a GPU, PyTorch and transformers, but no network; see docs/benchmarks.md.
#   scripts/gpu.sh prepare                    where there is a package index: put what that machine lacks into .whl
#   scripts/gpu.sh run SECONDS OUT STAGE...   there: install it into a folder of its own and run the stages
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${GPU_WHEELS:-$root/.whl}
# Not torch and transformers, which are there. lazy-importer and zipp are what importlib_metadata needs, the last three rich.
packages=(diffusers importlib_metadata lazy-importer zipp cache-dit prodigyopt rich markdown-it-py mdurl Pygments)

prepare() {
    local specs=() name line
    for name in "${packages[@]}"; do
        line=$(grep -im1 "^$name==" "$root/constraints.txt") || { echo "constraints.txt lacks $name" >&2; exit 1; }
        specs+=("$line")
    done
    rm -rf "$wheels"
    mkdir -p "$wheels"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "${GPU_PYTHON_VERSION:-3.12}" --implementation cp -d "$wheels" "${specs[@]}"
    du -ch "$wheels"/*.whl
}

run() {
    if [[ $# -lt 3 ]]; then
        usage
    fi
    local seconds=$1 out site=${GPU_SITE:-$root/runs/gpu/site} found
    out=$(realpath -m "$2")
    shift 2
    shopt -s nullglob
    found=("$wheels"/*.whl)
    mkdir -p "$site"
    if [[ ${#found[@]} -gt 0 ]]; then
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
            --upgrade --target "$site" "${found[@]}"
    fi
    cd "$root"
    export PYTHONPATH="$root/src:$root:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    exec "$python" -m benchmarks.gpu --seconds "$seconds" --out "$out" "$@"
}

usage() {
    sed -n '2,4s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

case ${1:-} in
    prepare) prepare ;;
    run) shift && run "$@" ;;
    *) usage ;;
esac
