#!/bin/sh
# A pretrained model learns to check itself, on ASDiv's word problems. Run it from the root of the repository:
#
#     sh docs/real_model.sh MODEL asdiv.jsonl FOLDER SEED DTYPE
#
# MODEL is the Hugging Face folder of a small instruct model, after the practice of docs/real_model.md. Everything goes to
# FOLDER. DTYPE: float32 or bfloat16.
# What is made is not made again: to resume, give the same command again.
set -eu
[ $# = 5 ] || { echo "usage: sh docs/real_model.sh MODEL asdiv.jsonl FOLDER SEED DTYPE" >&2; exit 2; }
model=$1 data=$2 F=$3 seed=$4 dtype=$5

make() { # file, command: the command, unless the file is there
  [ -e "$1" ] || { shift; python "$@"; }
}
train() { # name, flags: the run folder FOLDER/name; one that has been evaluated is finished
  name=$1
  shift
  make "$F/$name.json" "$@" --out "$F/$name" --seed "$seed" --dtype "$dtype" --save-every 10 --resume
}
longer() { # name, finished run, flags: a copy of the run, trained on
  [ -e "$F/$1" ] || { rm -rf "$F/$1.part"; cp -r "$F/$2" "$F/$1.part"; mv "$F/$1.part" "$F/$1"; }
  name=$1
  shift 2
  train "$name" "$@"
}
sample() { # file that is there at the end, model, problem file, flags
  file=$1 from=$2 problems=$3
  shift 3
  make "$file" sample.py --model "$from" --data "$problems" --seed "$seed" --dtype "$dtype" --show 0 "$@"
}
greedy() { # name, model folder: greedy answers to the test problems
  sample "$F/$1.json" "$2" "$F/test.jsonl" --max-new-tokens 400 --out "$F/$1.test.jsonl" --report "$F/$1.json"
}
evaluate() { # name, model folder: greedy answers, and four sampled ones per problem
  greedy "$1" "$2"
  sample "$F/$1.sampled.json" "$2" "$F/test.jsonl" --max-new-tokens 400 --n 4 --temperature 0.7 \
    --out "$F/$1.sampled.jsonl" --report "$F/$1.sampled.json"
}
stage0() { # samples, problem file, trajectory file that is there at the end: checks by the rule, trajectories
  make "$3" -m s2r.stage0.verifications --rollouts "$1" --out "$3.checks" --by formula --data "$2"
  make "$3" -m s2r.stage0.build --rollouts "$1" --verifications "$3.checks" --seed "$seed" --keep 1 1 1 1 --out "$3"
}
sft="train_sft.py --kl 0 --lr 2e-4 --batch-size 16 --max-length 1024 --tokens-per-microbatch 2048"
rl="train_rl.py --problems 16 --rollouts 4 --updates 4 --beta 0.01 --lr 2e-5 --steps 24 --max-new-tokens 400
  --tokens-per-microbatch 2048"

# Problems whose formula can be undone: for stages 0 and 1, for RL, for the test.
make "$F/test.jsonl" -m s2r.stage0.formula --data "$data" --folder "$F"
greedy base "$model"

# Warm-up: the base model rarely boxes an answer. It learns the form of a solution from the solutions. Calculations among
# them, so that it does not forget what it practised; drawn with another seed than those of the practice (0).
make "$F/arithmetic.jsonl" -m s2r.stage0.arithmetic --out "$F/arithmetic.jsonl" --rows 300 --seed $((seed + 1))
cat "$F/sft.jsonl" "$F/arithmetic.jsonl" > "$F/warm.jsonl"
train warm-2 $sft --model "$model" --data "$F/warm.jsonl" --epochs 2
greedy warm-2 "$F/warm-2"
longer warm warm-2 $sft --model "$model" --data "$F/warm.jsonl" --epochs 4
evaluate warm "$F/warm"

# Stage 0: five samples per problem, checks by the rule, trajectories. Sampled after two epochs: later there are fewer wrong
# answers to check. Stage 1: SFT from the model of four epochs, the calculations among the trajectories.
sample "$F/samples.jsonl" "$F/warm-2" "$F/sft.jsonl" --n 5 --temperature 0.7 --max-new-tokens 128 --out "$F/samples.jsonl"
stage0 "$F/samples.jsonl" "$F/sft.jsonl" "$F/trajectories.jsonl"
cat "$F/trajectories.jsonl" "$F/arithmetic.jsonl" > "$F/stage1.jsonl"
train sft $sft --model "$F/warm" --data "$F/stage1.jsonl" --epochs 3
evaluate sft "$F/sft"

# Stage 2: on problems that no stage has seen, without those that the warm-up model never solves.
sample "$F/rl.samples.jsonl" "$F/warm" "$F/rl.jsonl" --n 5 --temperature 0.7 --max-new-tokens 128 \
  --out "$F/rl.samples.jsonl"
make "$F/rl.selected.jsonl" -m s2r.stage0.select --rollouts "$F/rl.samples.jsonl" --out "$F/rl.selected.jsonl" \
  --accuracy 0.1 1.0
for level in outcome process; do
  train rl-$level $rl --model "$F/sft" --data "$F/rl.selected.jsonl" --level $level
  evaluate rl-$level "$F/rl-$level"
done

# Controls. The same RL without checks: of the warm-up model, which gives answers alone. Warm-up and SFT continued, for at
# least as many updates as the models that they stand beside. SFT continued on trajectories of RL's problems. Majority vote.
train rl-warm $rl --model "$F/warm" --data "$F/rl.selected.jsonl" --level outcome
evaluate rl-warm "$F/rl-warm"
longer warm-plus warm $sft --model "$model" --data "$F/warm.jsonl" --epochs 9
evaluate warm-plus "$F/warm-plus"
longer sft-plus sft $sft --model "$F/warm" --data "$F/stage1.jsonl" --epochs 6
evaluate sft-plus "$F/sft-plus"
stage0 "$F/rl.samples.jsonl" "$F/rl.jsonl" "$F/rl.trajectories.jsonl"
cat "$F/rl.trajectories.jsonl" "$F/arithmetic.jsonl" > "$F/stage2.jsonl"
train sft-more $sft --model "$F/sft" --data "$F/stage2.jsonl" --epochs 3
evaluate sft-more "$F/sft-more"
sample "$F/votes.json" "$F/warm" "$F/test.jsonl" --n 16 --temperature 0.7 --max-new-tokens 128 \
  --out "$F/votes.jsonl" --report "$F/votes.json"

python -m s2r.stage0.audit "$F/sft.test.jsonl" "$F/sft-plus.test.jsonl" "$F/sft-more.test.jsonl" \
  "$F/rl-outcome.test.jsonl" "$F/rl-process.test.jsonl"
python -m s2r.view.report "$F/base.json"
for kind in "" .sampled; do
  python -m s2r.view.report "$F/warm$kind.json" "$F/rl-warm$kind.json" "$F/warm-plus$kind.json" "$F/sft$kind.json" \
    "$F/sft-plus$kind.json" "$F/sft-more$kind.json" "$F/rl-outcome$kind.json" "$F/rl-process$kind.json" "$F/votes.json"
  for pair in "warm-plus sft" "sft rl-outcome" "sft-plus rl-outcome" "sft-more rl-outcome" "warm-plus rl-outcome" \
    "rl-warm rl-outcome" "sft rl-process" "sft-plus rl-process" "sft-more rl-process" "rl-outcome rl-process"; do
    python -m s2r.view.report "$F/${pair% *}$kind.json" "$F/${pair#* }$kind.json" | tail -1
  done
done
