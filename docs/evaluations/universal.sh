#!/usr/bin/env bash
# What a Universal Transformer learns of copying, reversing and adding decimal strings, and whether it holds on longer ones.
#
#   OUT=results/universal docs/evaluations/universal.sh [copy|reverse|addition]…      by default all three
#
# The tasks of arXiv 1807.03819, section 3.2: trained on lengths up to 40, tested to 400, with the offset of positions drawn
# anew for each row. Four models of width 128 a task, all in the same form (post-norm, sinusoidal positions):
#
#   act      a block of two attention layers, up to 4 steps of each position, which halts by itself
#   steps    the same, and every position takes all 4 steps
#   shallow  a transformer of 2 layers: the same parameters
#   deep     a transformer of 8 layers: the same depth
#
# Writes to OUT: table.md with the accuracy of digits and the share of strings without an error at each length, and a folder
# a model and task with study.md, study.png and runs.jsonl (losses and accuracies).

source "$(dirname "$0")/jobs.sh"
limit=420 tiny=() started=0
if [[ $small ]]; then
  tiny=(--steps 4 --batch-size 4 --held-out 8 --width 32 --train-length 8 --test-lengths 16)
fi

# model NAME TASK LAYERS STEPS HALTING  In the background: the processes share the GPUs, each launching small kernels.
model() {
  local name=$1 task=$2 layers=$3 steps=$4 halting=$5
  ((started += 1))
  on "$started" job "$task-$name" "$limit" "${riverrun[@]}" study "$task" --mixer attention --layers "$layers" \
    --set universal.max_steps="$steps" --set universal.halting="$halting" --set universal.random_offset=800 \
    --width 128 --lr 1e-3 --seeds 1 --steps 4000 --batch-size 128 --patience 0 --test-lengths 50,60,80,160,400 \
    "${tiny[@]}" --device "$device" --out "$OUT/$task-$name" &
}

(($#)) || set -- copy reverse addition
for task in "$@"; do
  [[ $task =~ ^(copy|reverse|addition)$ ]] ||
    { echo "there is no task '$task' here: choose from copy, reverse, addition" >&2; exit 2; }
done
for task in "$@"; do
  model act "$task" 2 4 act
  model steps "$task" 2 4 none
  model shallow "$task" 2 1 none
  model deep "$task" 8 1 none
done
wait
job table 60 python3 "$here/universal_table.py" "$OUT"
cat "$OUT/table.md"
finish
