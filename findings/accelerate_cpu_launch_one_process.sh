#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0, CPU only, Linux): `accelerate launch --cpu --num_processes 2` starts ONE process.
#
# One expects two processes over gloo, as --num_processes says. Seen: the script runs once, with a world of one, and
# the exit status is 0. With `--multi_gpu --num_processes 2` (on a machine without a GPU) two processes run over gloo.
# A data-parallel test on a CPU that uses the first form passes without testing anything.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qqq torch==2.13.0 accelerate==1.15.0
cat > world.py <<'P'
from accelerate import Accelerator
a = Accelerator(cpu=True)
open(f"seen.{a.process_index}", "w").write(f"process {a.process_index} of {a.num_processes}\n")
P
export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= HF_HOME="$work/hf" OMP_NUM_THREADS=1
launch() { # prints what the processes saw; fails if their number is not $1
    expected=$1
    shift
    rm -f seen.*
    venv/bin/accelerate launch "$@" world.py 2> log || { cat log; exit 1; }
    echo "$*:" && cat seen.*
    [ "$(ls seen.* | wc -l)" = "$expected" ]
}
launch 1 --cpu --num_processes 2
launch 2 --multi_gpu --num_processes 2
