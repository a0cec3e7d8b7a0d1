#!/usr/bin/env bash
# The GPU tier, on a machine with a CUDA device: its tests, then the benchmark. Ten minutes at most; nothing is downloaded.
#
#   PYTHON   an interpreter that has torch with CUDA, and pytest; its versions needn't be those of constraints.txt
#   RESULTS  where the benchmark writes gpu.json, and the tests tests.xml
#
# What the interpreter lacks may lie in .whl as wheels, which `make gpu-wheels` puts there where there is a network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

"$python" - <<'END' || exit 1
import platform, sys, torch
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if not torch.cuda.is_available():
    sys.exit("no CUDA device here; the GPU tier needs one (its tests' CPU halves are part of make test)")
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())
END

status=0
mkdir -p "$results"
mkdir -p "$results"
timeout --kill-after=10 330 "$python" -m pytest -m gpu tests/gpu --timeout 100 --durations 10 --junit-xml "$results/tests.xml" \
  || status=1
timeout --kill-after=10 230 "$python" -m benchmarks.gpu --seconds 180 --out "$results/gpu.json" || status=1
exit "$status"
