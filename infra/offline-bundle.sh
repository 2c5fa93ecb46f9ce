#!/usr/bin/env bash
# Pack the packages that this project needs at run time into one folder, for machines without a network.
#
#   infra/offline-bundle.sh [--python 3.12] [--have FILE] [--slim] [--data DIR] OUT_DIR
#
#   --python VERSION  Python of the target machine, which runs Linux on x86-64 (glibc 2.28 or newer)
#   --have FILE       packages that the target machine already has, one name a line; they are left out
#   --slim            leave out parts that a run never loads: Ray's Java, dashboard and RLlib,
#                     MLflow's browser UI, symbol tables
#   --data DIR        add the Parquet files of a directory (--data.source parquet:...)
#
# OUT_DIR then holds site.tar.xz (unpack it and put the folder on PYTHONPATH), packages.txt (its list of
# packages) and data/. Versions are those of constraints.txt. Packages come from uv's configured index.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON_VERSION=3.12 HAVE=/dev/null SLIM=0 DATA=""
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit "$1"; }
while [ $# -gt 0 ]; do
  case $1 in
    --python) PYTHON_VERSION=$2; shift 2 ;;
    --have) HAVE=$2; shift 2 ;;
    --slim) SLIM=1; shift ;;
    --data) DATA=$2; shift 2 ;;
    -h | --help) usage 0 ;;
    -*) echo "offline-bundle: no option $1" >&2; usage 2 >&2 ;;
    *) break ;;
  esac
done
[ $# -eq 1 ] || usage 2 >&2
OUT=$1
[ -r "$HAVE" ] || { echo "offline-bundle: --have $HAVE cannot be read" >&2; exit 2; }
[ -z "$DATA" ] || ls "$DATA"/*.parquet >/dev/null ||
  { echo "offline-bundle: --data $DATA has no .parquet file" >&2; exit 2; }
UV=$ROOT/.venv/bin/uv
[ -x "$UV" ] || UV=$(command -v uv) ||
  { echo "offline-bundle: uv is missing: make .venv/installed, or pip install uv" >&2; exit 1; }
mkdir -p "$OUT"
SITE=$(mktemp -d "${TMPDIR:-/tmp}/offline-bundle.XXXXXX")
trap 'rm -rf "$SITE"' EXIT
TARGET=(
  --python-version "$PYTHON_VERSION" --python-platform x86_64-manylinux_2_28
  --only-binary :all: --no-python-downloads --quiet
)

# List the project's run-time packages at the versions of constraints.txt, without those that the machine has.
"$UV" pip compile "$ROOT/pyproject.toml" --constraint "$ROOT/constraints.txt" "${TARGET[@]}" \
  --no-header --no-annotate --output-file "$SITE/all.txt" >/dev/null
awk -F'==' 'NR == FNR { sub(/#.*/, ""); gsub(/[ \t]/, ""); have[tolower($0)]; next } !(tolower($1) in have)' \
  "$HAVE" "$SITE/all.txt" >"$OUT/packages.txt"
"$UV" pip install --target "$SITE/site" "${TARGET[@]}" --no-deps --requirement "$OUT/packages.txt"

if [ "$SLIM" = 1 ]; then
  # Commands in bin/ carry the path of the Python that installed them. The target machine uses python -m.
  (cd "$SITE/site" &&
    rm -rf bin ray/jars ray/dashboard/client ray/rllib mlflow/server/js virtualenv/seed/wheels/embed/*.whl)
  find "$SITE/site" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
  if command -v strip >/dev/null; then
    find "$SITE/site" -type f \( -name '*.so' -o -name raylet -o -name gcs_server \) \
      -exec strip --strip-unneeded {} + || true
  fi
fi

# The filter for x86 machine code and a large dictionary make the file a seventh smaller than xz -6.
tar --create --directory "$SITE/site" --owner 0 --group 0 --sort name . |
  xz --x86 --lzma2=preset=6,dict=64MiB >"$OUT/site.tar.xz.part"
mv "$OUT/site.tar.xz.part" "$OUT/site.tar.xz" # Packing takes minutes. An unfinished file must not look complete.
if [ -n "$DATA" ]; then
  mkdir -p "$OUT/data"
  cp -f "$DATA"/*.parquet "$OUT/data/"
fi
echo "$(wc -l <"$OUT/packages.txt") packages for Python $PYTHON_VERSION in $OUT: $(du -sm "$OUT" | cut -f1) MB"
