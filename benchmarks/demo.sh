#!/bin/sh
# What `make demo` does after the installation: each step is one command, shown before it runs.
set -eu
cupytron=$BIN/cupytron
data=$RUNS/demo-data
run=$RUNS/demo

step() {
    printf '\n$ %s\n' "cupytron $*"
    "$cupytron" "$@"
}

[ -f "$data/train.json" ] || step data prepare python-docs --out "$data" --tokenizer char --val-fraction 0.1
step train --preset demo --data "$data" --out "$run"
step sample "$run" --prompt 'The ' --max-new-tokens 300
step report "$run" --text

cat <<END

The run is in $run (rm -r $run to train it again). Worth trying next:

  $cupytron sample $run --prompt 'import ' --num-samples 3
  $cupytron train --out $run --max-steps 1600     # goes on where it stopped
  $cupytron train --preset demo --set model.family=llama --data $data --out $RUNS/demo-llama
END
