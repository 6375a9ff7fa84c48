#!/bin/sh
# Measures a fork in the toy world, over three seeds:
#
#     for s in 0 1 2; do python -m s2r.toy --folder runs/findings/seed-$s --seed $s; done      # once, before any fork
#     git apply docs/forks/grpo.md
#     sh docs/forks/run.sh grpo --level outcome
#     git apply -R docs/forks/grpo.md
#
# NAME, FLAGS: RL with the toy's settings and these flags, from the SFT model of each seed; greedy answers to its test
# problems. The reports go to docs/forks/seed-N/NAME.json, with what s2r.toy.findings adds. What is made is not made again:
# delete it to measure a fork whose reports are there.
set -eu
[ $# -gt 0 ] || { echo "usage: sh docs/forks/run.sh NAME FLAGS…" >&2; exit 2; }
name=$1
shift
toy() { # seed, an expression of s2r.toy: its words, in the seed's folder
  python -c "from s2r.toy.__main__ import RL, evaluation; print(($2).replace('F/', 'runs/findings/seed-$1/'))"
}
for seed in 0 1 2; do
  kept=docs/forks/seed-$seed
  [ -e "$kept/$name.json" ] && { echo "$kept/$name.json is there: not measured again" >&2; continue; }
  mkdir -p "$kept"
  F=runs/findings/seed-$seed
  python $(toy $seed RL) --data "$F/train.jsonl" --out "$F/$name" --seed $seed "$@"
  python $(toy $seed "evaluation('$name')[2]") --seed $seed
  python -c "
import json
from s2r.data import read_jsonl
from s2r.toy.findings import extended
report = extended(json.load(open('$F/$name.json')), read_jsonl('$F/$name.test.jsonl'))
print(json.dumps(report, indent=1))" > "$kept/$name.partial"
  mv "$kept/$name.partial" "$kept/$name.json"
done
core="sft sft-plus rl-outcome rl-process"
python -m s2r.view.report $(for model in $core; do echo docs/findings/seed-[012]/$model.json; done) docs/forks/seed-[012]/"$name".json
for model in $core; do
  python -m s2r.view.report docs/findings/seed-[012]/$model.json docs/forks/seed-[012]/"$name".json | tail -1
done
