#!/bin/sh
# Writes the lock: resolves pyproject.toml in a fresh environment and pins all that pip chose.
#   sh docker/lock.sh PYTHON LOCK EXTRAS         (or: make lock)
set -eu
python=$1 lock=$2 extras=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

torch=$(sed -n 's/^\(torch==[0-9.]*\)$/\1/p' "$lock")
echo "$torch" > "$folder/torch.txt"
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet -c "$folder/torch.txt" setuptools -e ".[$extras]"
{
  sed -n '/^#/p' "$lock"
  # No local versions (2.13.0+cpu): the same line then fits CPU and CUDA builds. CUDA's own wheels are left out;
  # torch names their exact versions itself.
  "$folder/venv/bin/python" -m pip freeze --all --exclude-editable --exclude pip --exclude wheel |
    grep -Ev '^(nvidia-|cuda-|triton==|#)' | sed 's/+[a-z0-9.]*$//' | LC_ALL=C sort -f
} > "$folder/lock.txt"
if grep -q '^opencv-python==' "$folder/lock.txt"; then
  echo "error: opencv-python was resolved beside opencv-python-headless: they share a folder" >&2
  exit 1
fi
cp "$folder/lock.txt" "$lock"
