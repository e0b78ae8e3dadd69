#!/usr/bin/env bash
# Runs parts one after the other, each under its own time limit; none stops the next.
#
#   benchmarks/on_gpu.sh DIRECTORY NAME SECONDS COMMAND [NAME SECONDS COMMAND ...]
#
# All output goes to the screen and to DIRECTORY/parts.log; a table of exit codes and times ends both
# (124: stopped at the limit). DIRECTORY is also in $OUT for the commands. Exits 0 whatever the parts
# did, 2 if the arguments are wrong.
set -u
if (($# < 4 || ($# - 1) % 3)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export OUT=$1 PYTHONUNBUFFERED=1
shift
mkdir -p "$OUT"
summary=""
while (($#)); do
  echo "=== $1 (at most $2 s): $3" | tee -a "$OUT/parts.log"
  start=$SECONDS
  timeout --kill-after=15 "$2" bash -c "$3" 2>&1 | tee -a "$OUT/parts.log"
  code=${PIPESTATUS[0]}
  summary+=$(printf '%-24s exit %3d %5d s' "$1" "$code" $((SECONDS - start)))$'\n'
  shift 3
done
printf '=== parts\n%s' "$summary" | tee -a "$OUT/parts.log"
