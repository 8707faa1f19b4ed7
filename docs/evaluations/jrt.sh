#!/usr/bin/env bash
# Just Read Twice: small recurrent models, trained on reports that are read once, are asked about new ones that they read
# once and twice, the question before the first reading.
#
#   OUT=results/jrt docs/evaluations/jrt.sh
#
# mamba2 and gated_delta are trained on plain reports with a question after each, and on mixed texts, where the question can
# come first and several reports follow each other (jrt_texts.py); jrt_rnn, prefix linear attention between Mamba-2 and
# windowed attention, on mixed ones with its own objective. About 5 minutes on one H200.
# Writes to OUT: a folder for each model with results.json, jrt.png and the losses, and the tables in logs/eval-*.log.

source "$(dirname "$0")/jobs.sh"

texts=60000 items=400 limit=180 kinds=(plain mixed) base=()
if [[ $small ]]; then
  texts=400 items=4 kinds=(mixed)
  base=(train.steps=12 schedule.warmup_steps=2 model.hidden_size=64 model.gated_delta.head_dim=16 train.global_batch_size=2
    train.micro_batch_size=2 train.log_every=4 train.dtype=fp32)
fi

write_texts() {
  local number=$texts
  [[ $1 == mixed ]] && number=$((texts / 2)) # they are twice as long
  job "texts-$1" 60 env PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" \
    bash -c 'python3 "$1" "$2" "$3" > "$4"' - "$here/jrt_texts.py" "$number" "$1" "$work/$1.jsonl"
}
for kind in "${kinds[@]}"; do write_texts "$kind" & done
wait
job tokenizer 60 "${riverrun[@]}" data tokenizer "$work/mixed.jsonl" --out "$work/tokenizer.model" --vocab-size 1024 \
  --max-megabytes 3
for kind in "${kinds[@]}"; do
  job "prepare-$kind" 90 "${riverrun[@]}" data prepare "$work/$kind.jsonl" --tokenizer "$work/tokenizer.model" \
    --out "$work/$kind" &
done
wait

# study NAME KIND KEY=VALUE… [-- OPTION…]  The options are those of the evaluation.
study() {
  local name=$1 kind=$2 values=()
  shift 2
  while [[ $# -gt 0 && $1 != -- ]]; do values+=("$1") && shift; done
  train "$name" "$limit" "$here/jrt.toml" data.train="$work/$kind/train" data.tokenizer="$work/tokenizer.model" \
    "${base[@]}" "${values[@]}" || return
  job "eval-$name" 90 "${riverrun[@]}" eval jrt --model "$work/$name" --limit "$items" --batch-size 100 --device "$device" \
    --out "$OUT/$name" "${@:2}"
}

for kind in "${kinds[@]}"; do
  study "mamba2-$kind" "$kind" 'model.layer_pattern=["mamba2"]' &
  study "gated_delta-$kind" "$kind" 'model.layer_pattern=["gated_delta"]' &
done
study jrt_rnn-mixed mixed 'model.layer_pattern=["mamba2","prefix_linear_attention","attention","mamba2"]' \
  data.seq_len=512 train.objective=jrt -- --prefix 256 &
wait
tail -n +1 "$OUT"/logs/eval-*.log
finish
