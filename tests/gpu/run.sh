#!/usr/bin/env bash
# The GPU tier, on a machine with a CUDA device: its tests, then the benchmarks. Within ten minutes; nothing is downloaded.
#
#   PYTHON   an interpreter that has torch with CUDA, and pytest; its versions needn't be those of constraints.txt
#   RESULTS  where gpu.log, the benchmarks' gpu.json, and what pytest writes of each file of tests go
#
# What the interpreter lacks may lie in .whl as wheels, which `make gpu-wheels` puts there where there is a network.
#
# Each file of tests and each part of the benchmark has a process of its own: a device that was lost in one of them is
# there again in the next. What was found is in RESULTS at once, also where this script is killed. A part that runs out
# of time is interrupted, and the others go on. The last lines say what failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "${RESULTS:-benchmarks/results}" || exit 1
results=$(cd "${RESULTS:-benchmarks/results}" && pwd)

all=580       # seconds that all of it may take: ten minutes are all that some machines give
benchmark=380 # those of them that are the benchmarks', whatever tests take
failed=()

# Ends, saying why, where the interpreter lacks something or there is no device.
check() {
  "$python" - <<'END'
import importlib.util, platform, sys

needed = """numpy pytest pytest_timeout hypothesis beartype jaxtyping safetensors pydantic typer rich packaging
grpc grpc_health grpc_reflection grpc_status google.protobuf cryptography prometheus_client""".split()

def missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # what it is a part of
        return True

if missing("torch"):
    sys.exit(f"{sys.executable} has no torch. Say make gpu PYTHON=... with an interpreter whose torch has CUDA, or have pip "
             "install torch there: its wheels for Linux on x86-64 have CUDA, and any version from 2.9 on will do")
import torch

print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if torch.version.cuda is None:
    sys.exit("this torch is one for CPUs; say make gpu PYTHON=... with an interpreter whose torch has CUDA")
if not torch.cuda.is_available():
    sys.exit("no CUDA device here; the GPU tier needs one (its tests' CPU halves are part of make test)")
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())
if lacking := [name for name in needed if missing(name)]:
    sys.exit(f"{sys.executable} lacks {', '.join(lacking)}. Have pip install them, or where there is no network have make "
             "gpu-wheels put them into .whl on a machine that has one, and copy that along")
if missing("torchvision"):
    print("there is no torchvision: ResNet-50 and ViT-B/16 can't be measured, nor ResNet-50's inversions")
END
}

# Runs a command for at most so many seconds, and no longer than what is left of all but a reserve; notes a failure.
part() {
  local name=$1 seconds=$2 reserve=$3 code=0
  shift 3
  local left=$((all - reserve - SECONDS))
  if ((left <= 0)); then
    failed+=("$name (no time left)")
    return
  fi
  printf '\n== %s, after %d s\n' "$name" "$SECONDS"
  # Interrupted, pytest tells and writes what it has found.
  timeout --signal=INT --kill-after=10 "$((seconds < left ? seconds : left))" "$@" || code=$?
  case $code in
    0) ;;
    124 | 137) failed+=("$name (ran out of time)") ;;
    *) failed+=("$name (exit code $code)") ;;
  esac
}

# Measures a part of the benchmark: so many seconds at most, starts and first inverses included, and those of its steps.
measure() {
  benchmark=$((benchmark - $2))
  part "the benchmark of $1" "$2" "$benchmark" "$python" -m benchmarks.gpu "$1" --seconds "$3" --out "$results/gpu.json"
}

run() {
  if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || return 1
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
  check || return 1
  # First what the others build on.
  for name in copies_and_groups steps transformers inversions trainer_steps launches; do
    part "tests/gpu/test_$name.py" 150 "$benchmark" "$python" -m pytest -v -m gpu "tests/gpu/test_$name.py" \
      --timeout 100 --durations 5 --junit-xml "$results/test_$name.xml"
  done
  rm -f "$results/gpu.json"
  measure resnet50 110 44
  measure gpt 95 44
  measure vit 100 44
  measure inversions 75 45
  printf '\n== %d s\n' "$SECONDS"
  if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    return 1
  fi
  echo "all passed"
}

run 2>&1 | tee "$results/gpu.log"
