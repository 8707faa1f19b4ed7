#!/usr/bin/env bash
# Titans' memory as a gate and alone, gated DeltaNet and attention, of one size, beside each other: the loss on the same
# text, up to 8 times the training length; and recall of pairs (MQAR) up to 8 times the length it was trained on.
#
#   OUT=results/memory docs/evaluations/memory.sh TOKENIZER
#
# TOKENIZER: a sentencepiece model of 8,192 tokens (`riverrun data tokenizer`). The text is the Python of torch,
# transformers and sympy, about 40M tokens. 8 minutes on one H200 until MQAR, which may take 12; several GPUs share the
# models.
# Writes to OUT: table.md, a folder for each model and evaluation, and the study's in mqar/.

source "$(dirname "$0")/jobs.sh"
tokenizer=${1:?name a tokenizer: OUT=FOLDER memory.sh TOKENIZER}

mixers=(titans_mag titans_lmm gated_delta attention)
packages=(torch transformers sympy) length=8192 limit=500 base=() tiny=()
if [[ $small ]]; then
  packages=(sympy.core) length=512
  base=(train.steps=4 schedule.warmup_steps=1 model.hidden_size=64 model.num_hidden_layers=2 data.seq_len=128
    train.global_batch_size=4 train.micro_batch_size=4 train.log_every=2 train.dtype=fp32 model.titans_lmm.chunk_size=16
    model.titans_mag.chunk_size=16 model.titans_lmm.head_dim=16 model.titans_mag.head_dim=16
    model.titans_mag.attention_window=64)
  tiny=(--steps 4 --batch-size 4 --held-out 8 --width 32 --train-length 16 --test-lengths 32 --lr 1e-3 --seeds 1 --jobs 2)
fi

find_package='import importlib.util, sys
for name in sys.argv[1:]:
    print(importlib.util.find_spec(name).submodule_search_locations[0])'
mapfile -t folders < <(python3 -c "$find_package" "${packages[@]}")
job prepare 120 "${riverrun[@]}" data prepare "${folders[@]}" --glob '*.py' --tokenizer "$tokenizer" --held-out 0.03 \
  --out "$work/data"
base+=(data.train="$work/data/train" data.tokenizer="$tokenizer")

model() {
  train "$1" "$limit" "$here/memory.toml" "${base[@]}" model.layer_pattern="[\"$1\"]" || return
  job "eval-$1" 150 "${riverrun[@]}" eval length --model "$work/$1" --data "$work/data/held_out" --concatenate \
    --max-length "$length" --batch-size 8 --states 0 --device "$device" --out "$OUT/$1/length"
}

for n in "${!mixers[@]}"; do on "$n" model "${mixers[n]}" & done
wait
mixer_list=$(IFS=,; echo "${mixers[*]}")
heads=() # of a size that the memories have kernels for
for mixer in "${mixers[@]}"; do heads+=(--set "$mixer.head_dim=64"); done
job mqar 700 "${riverrun[@]}" study mqar --mixer "$mixer_list" --set mqar.vocabulary=1024 "${heads[@]}" --width 128 \
  --train-length 128 --test-lengths 256,512,1024 --lr 5e-4,1.5e-3,5e-3 --seeds 1 --steps 3000 --batch-size 128 --jobs 12 "${tiny[@]}" \
  --device "$device" --out "$OUT/mqar"
job table 60 python3 "$here/memory_table.py" "$OUT" "$length"
cat "$OUT/table.md" "$OUT"/mqar/study.md
finish
