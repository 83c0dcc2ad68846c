#!/usr/bin/env bash
# The GPU checks as one script, for a bare machine that nothing reaches: Python 3.12, torch with CUDA, numba, pyarrow,
# safetensors and pytest are there, and no network.
#
#   tests/benchmarks/device.sh prepare WHEELS      here: fetches what such a machine lacks (PYTHON=3.12)
#   tests/benchmarks/device.sh run WHEELS OUT      there: the GPU tests, then the figures, in under six minutes
#
# OUT gets card.txt, tests.txt, figures.txt and kernel.txt. Figures go into configs/scale.md with the card's name.
set -uo pipefail
cd "$(dirname "$0")/../.."

LACKED=(obstore pydantic pydantic-core annotated-types typing-inspection typing-extensions tenacity xxhash pyyaml
    google-re2 tqdm filelock fsspec packaging huggingface-hub httpx httpcore h11 anyio idna sniffio certifi
    pytest-timeout pytest-instafail hypothesis sortedcontainers attrs threadpoolctl click cloup)

prepare() { # WHEELS
    mkdir -p "$1"
    for each in "${LACKED[@]}"; do
        python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" --dest "$1" \
            "$each" || echo "device: no wheel of $each for Python ${PYTHON:-3.12}" >&2
    done
    du -sh "$1"
}

run() { # WHEELS OUT
    local wheels out
    wheels=$(realpath "$1") out=$2
    mkdir -p "$out"
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --target "$packages/wheels" "$wheels"/*.whl || return 1
    mkdir "$packages/fapm" # as it is installed: cluster/ inside pipeline/
    ln -s "$PWD"/pipeline/* "$packages/fapm/"
    ln -s "$PWD/cluster" "$packages/fapm/cluster"
    # What the machine has goes first: its torch is the one with CUDA.
    export PYTHONPATH="$packages:$(python3 -c 'import site; print(":".join(site.getsitepackages()))'):$packages/wheels"
    python3 - > "$out/card.txt" << 'END'
import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(i)
    print(card.name, f"{card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}")
print("a GPU" if torch.cuda.is_available() else "no GPU")
END
    cat "$out/card.txt"
    timeout 180 python3 -m pytest -q -p no:cacheprovider --timeout 120 -k "on_a_gpu or a_gpu_gives" --durations 5 \
        tests/pipeline/scoring/test_engine.py tests/pipeline/shard/test_on_device.py > "$out/tests.txt" 2>&1
    local tests=$?
    tail -n 5 "$out/tests.txt"
    timeout 110 python3 tests/benchmarks/device.py --folder "$packages" > "$out/figures.txt" 2>&1
    local figures=$?
    cat "$out/figures.txt"
    timeout 40 python3 tests/benchmarks/kernel.py > "$out/kernel.txt" 2>&1
    [ "$tests" = 0 ] && [ "$figures" = 0 ]
}

case "${1:-}" in
    prepare) prepare "${2:?WHEELS}" ;;
    run) run "${2:?WHEELS}" "${3:?OUT}" ;;
    *) sed -n '2,8p' "$0" >&2 && exit 2 ;;
esac
