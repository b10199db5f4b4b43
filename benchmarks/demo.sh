#!/bin/sh
# What `make demo` does after the installation: each step is one command, shown before it runs.
set -eu
cupytron=$BIN/cupytron
data=$RUNS/demo-data
run=$RUNS/demo

# a command as it can be typed: words with other characters than these in quotes
show() {
    printf '\n$'
    for word; do
        case $word in
            *[!A-Za-z0-9_./:=,-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
}

step() {
    show cupytron "$@"
    "$cupytron" "$@"
}

step_on_two_ranks() {
    show mpirun -n 2 cupytron "$@"
    "$BIN/mpirun" -n 2 "$cupytron" "$@"
}

[ -f "$data/train.json" ] || step data prepare python-docs --out "$data" --tokenizer char --val-fraction 0.1
step_on_two_ranks train --preset demo --zero 1 --data "$data" --out "$run"
step sample "$run" --prompt 'The ' --max-new-tokens 300
step report "$run" --text

cat <<END

The run is in $run (rm -r $run to train it again). Worth trying next:

  $cupytron sample $run --prompt 'import ' --num-samples 3
  $cupytron train --out $run --max-steps 1600 --set optim.decay_steps=800
      # goes on where it stopped, now in one process, at the learning rate that it ended with
  $cupytron verify --tp 2 --dp 2 --zero 3 --sp    # the same numbers on any mesh?
  $cupytron train --preset demo --set model.family=llama --data $data --out $RUNS/demo-llama
END
