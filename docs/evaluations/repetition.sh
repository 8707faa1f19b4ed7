#!/usr/bin/env bash
# A small model of code continues prompts that invite repetition, under greedy decoding and under controls of repetition,
# RPG among them; then 300 steps of DITTO, and for comparison 300 more of ordinary training (`lm`).
#
#   OUT=results/repetition docs/evaluations/repetition.sh DATA TOKENIZER
#
# DATA: a folder of `riverrun data prepare` with train/ and held_out/, such as that of the standard library which
# `riverrun quickstart` makes, with 8,192 words; TOKENIZER: its tokenizer. Half of the prompts are from the standard
# library, too: of what the model was trained on. About 4 minutes on one H200.
# Writes to OUT: a folder for each model with results.json, repetition.png, curves.png and the losses; ditto-against-before,
# the differences; and the tables in logs/eval-*.log.

source "$(dirname "$0")/jobs.sh"
data=${1:?name the data: OUT=FOLDER repetition.sh DATA TOKENIZER}
tokenizer=${2:?name the tokenizer: OUT=FOLDER repetition.sh DATA TOKENIZER}

prompts=64 tokens=256 sentences=32 copies=32
base=(data.train="$data/train" data.held_out="$data/held_out" data.tokenizer="$tokenizer")
more=(train.steps=300 optimizer.lr=3e-4 schedule.warmup_steps=20)
if [[ $small ]]; then
  prompts=4 tokens=24 sentences=2 copies=4
  base+=(train.steps=12 schedule.warmup_steps=2 model.hidden_size=64 model.num_hidden_layers=2 train.global_batch_size=4
    train.micro_batch_size=4 train.log_every=4 train.dtype=fp32 train.eval_rows=4)
  more=(train.steps=6 schedule.warmup_steps=1)
fi

# evaluate NAME DECODINGS
evaluate() {
  job "eval-$1" 200 "${riverrun[@]}" eval repetition --model "$work/$1" --decoding "$2" --limit "$prompts" \
    --max-new-tokens "$tokens" --no-recall --sentences "$sentences" --copies "$copies" --batch-size 64 \
    --device "$device" --out "$OUT/$1"
}

train before 120 "$here/repetition.toml" "${base[@]}" || finish || exit
for objective in lm ditto; do
  {
    train "$objective" 90 "$here/repetition.toml" "${base[@]}" "${more[@]}" train.init_from="$work/before" \
      train.objective="$objective" && evaluate "$objective" greedy,rpg
  } &
done
evaluate before greedy,repetition,no_repeat_ngram,dry,lz,rpg,rpg:mode=additive
wait
for objective in lm ditto; do
  job "$objective-against-before" 60 "${riverrun[@]}" eval compare "$OUT/before" "$OUT/$objective" \
    --out "$OUT/$objective-against-before"
done
tail -n +1 "$OUT"/logs/eval-*.log "$OUT"/logs/*-against-before.log
finish
