#!/usr/bin/env bash
# Just Read Twice: small recurrent models, trained on reports that are read once, are asked about new ones of 8, 16 and
# 32 lines that they read once and twice, the question before the first reading.
#
#   OUT=results/jrt docs/evaluations/jrt.sh
#
# Looking up is learnt from reports of one or two lines; where reports begin longer, losses stand still for thousands of
# steps. Then mamba2 and gated_delta go on with plain texts of up to 32 lines, or, to learn to look for what they are
# asked, with questions before reports of up to four lines, and mixed texts of up to 32 (jrt_texts.py). jrt_rnn, prefix
# linear attention between Mamba-2 and windowed attention, has these two and its own objective. No text has a report
# twice. About 10 minutes on two H200 beside other trainings, which the models share.
# Writes to OUT: a folder for each model with the losses, and in it one for each number of lines with results.json and
# jrt.png; the tables are in logs/eval-*.log.

source "$(dirname "$0")/jobs.sh"

# Texts, and the lines of their reports at most.
declare -A texts=([short]=300000 [asked]=200000 [plain]=100000 [mixed]=100000)
declare -A lines=([short]=2 [asked]=4 [plain]=32 [mixed]=32)
sizes=(8 16 32) items=400 limit=250 base=()
short=(train.steps=2000 data.seq_len=256 train.jrt.encoder_len=64 train.global_batch_size=32 train.micro_batch_size=32)
if [[ $small ]]; then
  texts=([short]=400 [asked]=400 [plain]=200 [mixed]=200) sizes=(8) items=4
  base=(train.steps=12 schedule.warmup_steps=2 train.global_batch_size=2 train.micro_batch_size=2 train.log_every=4)
fi

# write NAME KIND NUMBER LINES  Generated texts, as JSON lines.
write() {
  job "write-$1" 60 env PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" \
    bash -c 'python3 "$1" "$2" "$3" "$4" > "$5"' - "$here/jrt_texts.py" "$2" "$3" "$4" "$work/$1.jsonl"
}
for name in "${!texts[@]}"; do write "$name" "${name/short/plain}" "${texts[$name]}" "${lines[$name]}" & done
for size in "${sizes[@]}"; do write "questions-$size" questions "$items" "$size" & done
wait
job tokenizer 60 "${riverrun[@]}" data tokenizer "$work/mixed.jsonl" --out "$work/tokenizer.model" --vocab-size 1024 \
  --max-megabytes 3
for name in "${!texts[@]}"; do
  job "prepare-$name" 90 "${riverrun[@]}" data prepare "$work/$name.jsonl" --tokenizer "$work/tokenizer.model" \
    --out "$work/$name" &
done
wait

# learn NAME TEXTS KEY=VALUE…
learn() {
  train "$1" "$limit" "$here/jrt.toml" data.train="$work/$2/train" data.tokenizer="$work/tokenizer.model" "${@:3}" \
    "${base[@]}"
}

# study MODEL TEXTS KEY=VALUE…  Trains $MODEL-short further, and asks it. The JRT-RNN reads without causality what is
# certainly of the report: seven tokens a line.
study() {
  local name=$1-$2 begun=$1-short size prefix=()
  if [[ $2 == mixed ]]; then
    learn "$1-asked" asked "${@:3}" "${short[@]}" train.init_from="$work/$begun" || return
    begun=$1-asked
  fi
  learn "$name" "$2" "${@:3}" train.init_from="$work/$begun" || return
  for size in "${sizes[@]}"; do
    [[ $1 == jrt_rnn ]] && prefix=(--prefix $((7 * size)))
    job "eval-$name-$size" 90 "${riverrun[@]}" eval jrt --model "$work/$name" --data fda="$work/questions-$size.jsonl" \
      --batch-size 200 --device "$device" --out "$OUT/$name/$size" "${prefix[@]}"
  done
}

# model NAME KINDS KEY=VALUE…  A model of each kind of texts.
model() {
  local kind
  learn "$1-short" short "${@:3}" "${short[@]}" || return
  for kind in $2; do study "$1" "$kind" "${@:3}" & done
  wait
}

on 0 model mamba2 "plain mixed" 'model.layer_pattern=["mamba2"]' &
on 1 model gated_delta "plain mixed" 'model.layer_pattern=["gated_delta"]' &
on 2 model jrt_rnn mixed 'model.layer_pattern=["mamba2","prefix_linear_attention","attention","mamba2"]' \
  model.num_hidden_layers=4 train.objective=jrt &
wait
tail -n +1 "$OUT"/logs/eval-*.log
finish
