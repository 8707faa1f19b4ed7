# Sourced by the scripts beside it: commands with a log, a time limit and a line in $OUT/summary.txt each.
#
#   OUT       the folder for results and logs; checkpoints and data go to a temporary folder
#   RIVERRUN  the command, by default riverrun; "python3 -m riverrun.launch.cli" from a source tree
#   DEVICE    auto (a GPU where there is one), cpu or cuda
#   SMALL=1   tiny sizes, which try the script itself on a CPU and show nothing

set -uo pipefail
: "${OUT:?name a folder for the results: OUT=results/length docs/evaluations/length.sh …}"
read -ra riverrun <<< "${RIVERRUN:-riverrun}"
device=${DEVICE:-auto} small=${SMALL:-}
here=$(dirname "${BASH_SOURCE[0]}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export COLUMNS=160 # of tables
mkdir -p "$OUT/logs"
: > "$OUT/summary.txt"

# on N COMMAND…  In the background: on the N-th of the GPUs that may be seen, counted round and round.
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd,)}"
on() {
  local number=$1
  shift
  if ((${#gpus[@]})); then
    export CUDA_VISIBLE_DEVICES=${gpus[number % ${#gpus[@]}]}
  fi
  "$@"
}

# job NAME SECONDS COMMAND…  Its output is in logs/NAME.log. At the limit, training saves a checkpoint and ends. Small jobs
# run one at a time, and are given ten times as long.
job() {
  local name=$1 limit=$2 how status=0 began lock
  shift 2
  exec {lock}> "$work/lock"
  [[ $small ]] && limit=$((10 * limit)) && flock "$lock"
  began=$SECONDS
  timeout --kill-after=30 "$limit" "$@" > "$OUT/logs/$name.log" 2>&1 {lock}>&- || status=$?
  case $status in
    0) how="done" ;;
    124 | 137 | 143) how="STOPPED at its limit of $limit s" ;;
    *) how="FAILED with exit code $status: $(tail -n 1 "$OUT/logs/$name.log")" ;;
  esac
  echo "$name: $how ($((SECONDS - began)) s)" | tee -a "$OUT/summary.txt"
  exec {lock}>&-
  return "$status"
}

# train NAME SECONDS RECIPE KEY=VALUE…  A run in $work/NAME; its metrics and loss curve go to $OUT/NAME. Fails if no
# checkpoint is left.
train() {
  local name=$1 limit=$2 recipe=$3 file
  shift 3
  job "train-$name" "$limit" "${riverrun[@]}" train "$recipe" "$@" engine.device="$device" --run-dir "$work/$name"
  mkdir -p "$OUT/$name"
  for file in "$work/$name"/{metrics.jsonl,loss.png,config.toml}; do
    [[ -e $file ]] && cp "$file" "$OUT/$name/"
  done
  compgen -G "$work/$name/checkpoints/*" > "$work/found"
}

# What was not done; the exit code says whether there is any.
finish() {
  echo "$(grep -c ': done' "$OUT/summary.txt") done, in $SECONDS s, results in $OUT"
  ! grep -E ': (FAILED|STOPPED)' "$OUT/summary.txt"
}
