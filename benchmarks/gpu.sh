#!/usr/bin/env bash
# Check and measure this project on a GPU machine that is available for minutes and has no network.
# The most informative measurements come first.
#
#   benchmarks/gpu.sh [--bundle DIR] [--parts "1 2 3"] [--limits "90 150 480"] [--quick] [--device cuda|cpu]
#                     [--storage DIR] [--run "RECIPE [OPTIONS]"]...
#
#   part 1   versions; every model's training step and every attack against the CPU's; bfloat16; NCCL
#   part 2   ceilings of copy and matrix product; training steps and attack passes as fractions of them
#   part 3   whole runs through Ray: each --run in turn (default: "table1-fast --seeds 1")
#
#   --bundle DIR   packages (and data) from infra/offline-bundle.sh, where they are not installed
#   --limits       seconds of each part; part 3's limit applies to each run
#   --storage DIR  storage of part 3's runs; the same command continues them (default: $OUT/storage)
#   --quick        tiny sizes, to check that everything runs, also on a CPU
#
# Each row goes to $OUT (default: runs/gpu) as a line of JSON once it is measured. $OUT also gets log.txt
# and records.tar.gz (part 3's records, without weights and images). The script ends with all rows as
# tables. The exit status is 1 if anything failed.
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$ROOT/runs/gpu}
BUNDLE="" PARTS="1 2 3" LIMITS="90 150 480" STORAGE="" DEVICE=() QUICK=() RUNS=()
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit "$1"; }
while [ $# -gt 0 ]; do
  case $1 in
    --bundle) BUNDLE=$2; shift 2 ;;
    --parts) PARTS=${2//,/ }; shift 2 ;;
    --limits) LIMITS=${2//,/ }; shift 2 ;;
    --storage) STORAGE=$2; shift 2 ;;
    --device) DEVICE=(--device "$2"); shift 2 ;;
    --run) RUNS+=("$2"); shift 2 ;;
    --quick) QUICK=(--quick); shift ;;
    -h | --help) usage 0 ;;
    *) echo "gpu.sh: no option $1" >&2; usage 2 >&2 ;;
  esac
done
[ ${#RUNS[@]} -gt 0 ] || RUNS=("table1-fast --seeds 1")
read -r LIMIT1 LIMIT2 LIMIT3 <<<"$LIMITS"
[ -n "${LIMIT3:-}" ] || { echo "gpu.sh: --limits takes three numbers of seconds" >&2; exit 2; }
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
STORAGE=${STORAGE:-$OUT/storage}
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true RAY_ADDRESS=local PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # The Makefile says why.
if [ -z "${PYTHON:-}" ]; then
  [ -x "$ROOT/.venv/bin/python" ] && [ -z "$BUNDLE" ] && PYTHON=$ROOT/.venv/bin/python || PYTHON=python3
fi

DATA=()
if [ -n "$BUNDLE" ]; then
  SITE=${TMPDIR:-/tmp}/defendpp-site-$(sha256sum <"$BUNDLE/site.tar.xz" | cut -c1-16)
  if [ ! -d "$SITE" ]; then
    rm -rf "$SITE.part" && mkdir -p "$SITE.part"
    # Python's tarfile replaces tar and xz where they are missing.
    tar xJf "$BUNDLE/site.tar.xz" -C "$SITE.part" ||
      "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' \
        "$BUNDLE/site.tar.xz" "$SITE.part" || { echo "gpu.sh: $BUNDLE/site.tar.xz cannot be unpacked" >&2; exit 1; }
    # Compile here once. Otherwise each of Ray's first processes compiles the same files.
    "$PYTHON" -m compileall -q -j 0 "$SITE.part" >/dev/null
    mv "$SITE.part" "$SITE"
  fi
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
  [ ! -d "$BUNDLE/data" ] || DATA=(--data "$(cd "$BUNDLE/data" && pwd)")
fi

FAILED=()
# Run one part of gpu_checks.py for at most LIMIT seconds: part NAME LIMIT ARGUMENTS...
part() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name, at most $limit s" | tee -a "$OUT/log.txt"
  timeout --kill-after 10 "$limit" "$PYTHON" "$ROOT/benchmarks/gpu_checks.py" "$@" --out "$OUT" 2>&1 |
    tee -a "$OUT/log.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" = 124 ] || [ "$status" = 137 ] && echo "$name: cut off after $limit s" | tee -a "$OUT/log.txt"
  [ "$status" = 0 ] || FAILED+=("$name (exit status $status)")
  echo "== $name: $((SECONDS - begin)) s" | tee -a "$OUT/log.txt"
}

if command -v nvidia-smi >/dev/null; then nvidia-smi | tee -a "$OUT/log.txt" || FAILED+=(nvidia-smi); fi
for number in $PARTS; do
  case $number in
    1) part "part 1" "$LIMIT1" check "${DEVICE[@]}" "${QUICK[@]}" ;;
    2) part "part 2" "$LIMIT2" speed "${DEVICE[@]}" "${QUICK[@]}" ;;
    3)
      for run in "${RUNS[@]}"; do
        part "part 3: $run" $((LIMIT3 + 60)) pipeline "$run" --limit "$LIMIT3" --storage "$STORAGE" "${DATA[@]}"
      done
      # Weights, checkpoints, shards and examples are too large to copy, so pack only the records.
      (cd "$STORAGE" 2>/dev/null &&
        find . -type f -size -5000k ! -name '*.safetensors' ! -name '*.parquet' ! -name '*.pt' \
        ! -name '*.npz' -print0 | tar --create --gzip --null --files-from - --file "$OUT/records.tar.gz") ||
        FAILED+=("records.tar.gz")
      ;;
    *) echo "gpu.sh: there is no part $number" >&2; FAILED+=("part $number") ;;
  esac
done
"$PYTHON" "$ROOT/benchmarks/gpu_checks.py" table --out "$OUT" | tee "$OUT/tables.md"
[ ${#FAILED[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${FAILED[@]}"; exit 1; }
