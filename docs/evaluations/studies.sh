#!/usr/bin/env bash
# What small models of four mixers learn, and whether it holds on longer sequences than they were trained on.
#
#   OUT=results/studies docs/evaluations/studies.sh [s3|parity|mqar]…      by default all three
#
# s3: the word problem of S3, trained at 128 tokens, tested to 512. One layer of DeltaProduct (arXiv 2502.10297: width
#     128, 8 heads of 32) with n = 2 Householder steps and β in [0, 2], without decay and with it, and with n = 1, β in
#     [0, 2] and in [0, 1]. A cycle of three is a product of two reflections: n = 2 has what it takes, n = 1 has not.
# parity: one layer, trained on up to 128 bits, tested to 512. mqar: zoology's recall, two layers without MLP, 8 pairs in
#     128 tokens; tested with 4 in 64, 16 in 256 and 32 in 512.
#
# About 5 minutes for s3 on one H200, and as much for the other two together on another one beside it. What each study
# had finished at its limit of 450 s is in its table, and the same command goes on with the rest.
# Writes to OUT: a folder a study with study.md, study.png and runs.jsonl (every run's losses and accuracies).

source "$(dirname "$0")/jobs.sh"
limit=450 tiny=() started=0
if [[ $small ]]; then
  tiny=(--steps 4 --batch-size 4 --held-out 8 --width 32 --train-length 16 --test-lengths 32 --lr 1e-3
    --seeds 2 --jobs 2)
fi

# study NAME TASK OPTION…  In the background: the processes of all studies share the GPU, each launching small kernels.
study() {
  local name=$1
  shift
  ((started += 1))
  on "$started" job "$name" "$limit" "${riverrun[@]}" study "$@" "${tiny[@]}" --device "$device" --out "$OUT/$name" &
}

s3() {
  # A convolution would mix neighbours into the keys, while each token alone decides about its permutation.
  local delta=gated_delta name n negative gate
  while read -r name n negative gate; do
    study "s3-$name" s3 --mixer $delta --set $delta.num_householder="$n" --set $delta.allow_neg_eigval="$negative" \
      --set $delta.use_gate="$gate" --set $delta.conv_kernel=1 --set $delta.num_heads=8 --set $delta.head_dim=32 \
      --set $delta.expand_v=1 --lr 5e-3,1e-2 --seeds 2 --steps 3000 --patience 0 --batch-size 128 --jobs 4
  done <<< 'n2-beta2 2 true false
n2-beta2-decay 2 true true
n1-beta2 1 true false
n1-beta1 1 false false'
}

parity() {
  # The bound of 0.5 that ParaRNN puts on recurrent weights in language models is too low to flip a state.
  study parity parity --mixer gated_delta,mamba2,para_lstm,attention --set gated_delta.num_heads=4 \
    --set gated_delta.conv_kernel=1 --set para_lstm.max_recurrent_weight=4.0 --set para_lstm.num_heads=1 \
    --set para_lstm.conv_kernel=1 --lr 3e-3,1e-2,2e-2 --seeds 2 --steps 2000 --patience 0 --test-lengths 256,512 --jobs 8
}

mqar() {
  study mqar mqar --mixer gated_delta,mamba2,para_lstm,attention --set mqar.vocabulary=1024 --width 128 \
    --train-length 128 --test-lengths 64,256,512 --lr 5e-4,1.5e-3,5e-3,1.5e-2 --seeds 1 --steps 3000 --batch-size 128 \
    --jobs 8
}

(($#)) || set -- s3 parity mqar
for name in "$@"; do
  [[ $name =~ ^(s3|parity|mqar)$ ]] || { echo "there is no study '$name': choose from s3, parity, mqar" >&2; exit 2; }
done
for name in "$@"; do "$name"; done
wait
cat "$OUT"/*/study.md
finish
