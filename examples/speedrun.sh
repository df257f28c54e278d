#!/usr/bin/env bash
# The whole method on one GPU of 24 GB, with DeepSeek-R1-Distill-Qwen-1.5B on GSM8K: own answers, cold start, GRPO, evaluation, report.
#
#     bash examples/speedrun.sh [FOLDER] [OPTION...]
#
# FOLDER is runs/speedrun unless told; the options (--preset rtx4090 unless told) go to every stage; MODEL=... is another model.
#
# NOT YET MEASURED ON A GPU: hours, memory and figures are unknown, see docs/gpu-unverified.md. By the plan's arithmetic and an RTX 4090's
# data sheet, were every answer as long as it may be, and without what Python, attention and loading cost:
#     *estimated*: 0.6 h for data
#     *estimated*: 1.1 h for sft
#     *estimated*: 3.4 h for grpo, with its first sampling of b_max
#     *estimated*: 0.1 h for eval, of which there are seven here
# `sbtiny plan --probe` on the card itself says it better. Needs `make setup` and the network, for the model and the questions. Start it
# again after a stop: what is finished is skipped, training goes on from its last checkpoint.
set -euo pipefail

sbtiny=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/sbtiny
model=${MODEL:-qwen-1.5b}
out=${1:-runs/speedrun}
options=("${@:2}")
if [ $# -lt 2 ]; then options=(--preset rtx4090); fi

# unless FILE ARGUMENT...: the command, where what it makes is not there yet
unless() {
    if [ -e "$1" ]; then return; fi
    echo "+ sbtiny ${*:2}" >&2
    "$sbtiny" "${@:2}"
}

# train VERB FOLDER ARGUMENT...
train() {
    local resume=()
    if compgen -G "$2/checkpoint-*" > /dev/null; then resume=(--resume); fi
    unless "$2/adapter" "$1" "${@:3}" "${options[@]}" --output "$2" "${resume[@]}"
}

unless "$out/rows.jsonl" data build "$out/rows.jsonl" --model "$model" "${options[@]}"
train sft "$out/sft" --model "$model" --data "$out/rows.jsonl"
train grpo "$out/grpo" --run "$out/sft"

unless "$out/grpo/base/eval.json" eval "$model" "${options[@]}" --output "$out/grpo/base"
unless "$out/sft/eval.json" eval "$out/sft" "${options[@]}"
unless "$out/grpo/sweep.json" eval "$out/grpo" "${options[@]}" --sweep
"$sbtiny" report "$out/grpo"
