#!/usr/bin/env bash
# A small Mamba-2 is trained on rows of 1,024 tokens and reads 65,536: does its loss collapse beyond 1,024? Then 300 steps
# of training with states passed on are to mend it (`passing`, `tbtt`; `off` is 300 steps more of the same), or controls of
# the state without training.
#
#   OUT=results/length docs/evaluations/length.sh TOKENIZER
#
# TOKENIZER: a sentencepiece model of 8,192 tokens (`riverrun data tokenizer`). The text is the Python of torch,
# transformers and sympy, about 40M tokens. Two models: decays as published, and retentive ones, a thousandth of them under
# inputs as strong, by which a state goes on growing for hundreds to a million tokens. The retentive model took 6
# minutes on an H200 beside other trainings; several GPUs share the models.
# Writes to OUT: curves.png, table.md, and a folder for each evaluation.

source "$(dirname "$0")/jobs.sh"
tokenizer=${1:?name a tokenizer: OUT=FOLDER length.sh TOKENIZER}

packages=(torch transformers sympy) length=65536 limit=300 row=1024 base=()
more=(train.steps=300 optimizer.lr=5e-4 schedule.warmup_steps=5)
if [[ $small ]]; then
  packages=(sympy.core) length=1024 row=128
  base=(train.steps=12 schedule.warmup_steps=3 model.hidden_size=64 model.num_hidden_layers=2 model.mamba2.state_size=16
    data.seq_len="$row" train.global_batch_size=4
    train.micro_batch_size=4 train.log_every=5 train.dtype=fp32)
  more=(train.steps=6 schedule.warmup_steps=1)
fi

find_package='import importlib.util, sys
for name in sys.argv[1:]:
    print(importlib.util.find_spec(name).submodule_search_locations[0])'
mapfile -t folders < <(python3 -c "$find_package" "${packages[@]}")
job prepare 120 "${riverrun[@]}" data prepare "${folders[@]}" --glob '*.py' --tokenizer "$tokenizer" --held-out 0.03 \
  --out "$work/data"
base+=(data.train="$work/data/train" data.tokenizer="$tokenizer")

# evaluate NAME RUN OPTION…
evaluate() {
  local name=$1 run=$2
  shift 2
  job "eval-${name//\//-}" 200 "${riverrun[@]}" eval length --model "$work/$run" --data "$work/data/held_out" --concatenate \
    --max-length "$length" --batch-size 8 --device "$device" --out "$OUT/$name" "$@"
}

# The largest norm of a head's state after the tokens of a row, of an evaluation.
largest_norm='import json, sys
states = json.load(open(sys.argv[1]))["details"]["state_statistics"]
print(max(head["norm"][states["positions"].index(int(sys.argv[2]))] for head in states["heads"]))'

# study VARIANT KEY=VALUE…
study() {
  local variant=$1 control mode
  shift
  train "$variant" "$limit" "$here/length.toml" "${base[@]}" "$@" || return
  for mode in off passing tbtt; do
    {
      train "$variant-$mode" 150 "$here/length.toml" "${base[@]}" "${more[@]}" "$@" train.init_from="$work/$variant" \
        train.state_passing.mode="$mode" && evaluate "$variant/$mode" "$variant-$mode"
    } &
  done
  for control in retention=0.9999,insertion=0.75 retention=0.999,insertion=0.75 dt_scale=0.5 window="$row"; do
    evaluate "$variant/${control//[=,]/_}" "$variant" --state-control "$control" &
  done
  evaluate "$variant/before" "$variant"
  control=max_norm=$(python3 -c "$largest_norm" "$OUT/$variant/before/results.json" "$row")
  evaluate "$variant/max_norm" "$variant" --state-control "$control"
  wait
}

[[ $small ]] || on 0 study published &
on 1 study retentive model.mamba2.A_init_min=0.001 model.mamba2.A_init_max=0.03 &
wait
job table 60 python3 "$here/length_table.py" "$OUT"
cat "$OUT/table.md"
finish
