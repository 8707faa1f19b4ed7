#!/usr/bin/env bash
# What recurrent depth is worth: a model of 51M parameters whose core of 4 layers runs 8 times on average in training, beside
# one of as many parameters whose layers run once, on the same text.
#
#   OUT=results/depth docs/evaluations/depth.sh TOKENIZER
#
# TOKENIZER: a sentencepiece model of up to 16,384 tokens (`riverrun data tokenizer`). The text is the Python of torch,
# transformers and sympy, about 40M tokens, and a tenth of it questions about small numbers (depth_questions.py), not those
# that are asked later. About 8 minutes on one H200.
#
#   perplexity  on held-out code after 1 to 64 iterations, and how far apart two draws of the first state end
#   cola        chains of layers and iterations for questions, beside random chains, chains chosen on other questions, and
#               iterations more or fewer
#   samplers    tokens a second, and what the texts are worth, after 8 and after 32 iterations; nothing else runs meanwhile
#
# Writes to OUT: table.md, a folder for each model and evaluation, samplers/ and samplers-r32/.

source "$(dirname "$0")/jobs.sh"
tokenizer=${1:?name a tokenizer: OUT=FOLDER depth.sh TOKENIZER}

packages=(torch transformers sympy) texts=8000 limit=240 depths=1,2,4,8,16,32,64 documents=32 asked=48
base=(train.steps=400 train.global_batch_size=64 train.micro_batch_size=32 train.log_every=20 optimizer.lr=1e-3
  schedule.warmup_steps=40 checkpoint.every=0 log.tensorboard=false)
ramp=100 cola=(--simulations 100 --leaves 16) texts_of_samplers=(--num-prompts 4 --new-tokens 48)
if [[ $small ]]; then
  packages=(sympy.core) texts=200 documents=2 asked=9 ramp=2
  base+=(train.steps=6 schedule.warmup_steps=1 model.hidden_size=64 model.intermediate_size=128 model.attention.num_heads=2
    model.attention.head_dim=32 data.seq_len=128 train.global_batch_size=4 train.micro_batch_size=2 train.log_every=2
    train.dtype=fp32)
  cola=(--simulations 10) texts_of_samplers=(--num-prompts 1 --prompt-tokens 16 --new-tokens 8)
fi

find_package='import importlib.util, sys
for name in sys.argv[1:]:
    print(importlib.util.find_spec(name).submodule_search_locations[0])'
mapfile -t folders < <(python3 -c "$find_package" "${packages[@]}")
job questions 30 env PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" \
  bash -c 'python3 "$1" "$2" "$3" > "$4"' - "$here/depth_questions.py" "$texts" "$asked" "$work/questions.jsonl"
job prepare-code 60 "${riverrun[@]}" data prepare "${folders[@]}" --glob '*.py' --tokenizer "$tokenizer" --held-out 0.03 \
  --out "$work/data"
job prepare-questions 30 "${riverrun[@]}" data prepare "$work/questions.jsonl" --tokenizer "$tokenizer" \
  --out "$work/questions"
base+=(data.train="[{path='$work/data/train',weight=9},{path='$work/questions/train',weight=1}]"
  data.tokenizer="$tokenizer")

on 0 train recurrent "$limit" recurrent-depth-50m "${base[@]}" train.recurrence.ramp_steps="$ramp" \
  train.recurrence.eval_steps=[] &
on 1 train fixed "$limit" "$here/depth.toml" "${base[@]}" &
wait

# evaluate NAME TASK SECONDS OPTION…
evaluate() {
  local name=$1 task=$2 limit=$3
  shift 3
  job "$task-$name" "$limit" "${riverrun[@]}" eval "$task" --model "$work/$name" "$@" --device "$device" \
    --out "$OUT/$name/$task"
}
held_out=(--data "$work/data/held_out" --limit "$documents")
evaluate recurrent perplexity 140 "${held_out[@]}" --num-steps "$depths" &
evaluate fixed perplexity 90 "${held_out[@]}" &
for name in recurrent fixed; do evaluate "$name" cola 140 --generate "$asked" "${cola[@]}" & done
wait

samplers() {
  local name=$1
  shift
  job "$name" 200 "${riverrun[@]}" bench-samplers "$work/recurrent" --data "$work/data/held_out" "${texts_of_samplers[@]}" \
    "$@" --device "$device" --out "$OUT/$name"
}
samplers samplers
samplers samplers-r32 --num-steps 32
job table 60 python3 "$here/depth_table.py" "$OUT"
cat "$OUT/table.md" "$OUT"/samplers*/samplers.md
finish
