#!/usr/bin/env bash
# The published set-up of ddpg_paper_faithful.py, with the paper's batch normalisation; with and without it:
#     benchmark/ddpg_paper_faithful.sh VARIANT=default VARIANT="--batch-norm none"
# Each line can be overridden from the environment or the command line; --help tells how.
set -euo pipefail

export SCRIPT=ddpg_paper_faithful.py
export ENVS=${ENVS:-HalfCheetah-v5 Walker2d-v5 Hopper-v5 InvertedPendulum-v5 Humanoid-v5 Pusher-v5}
export SEEDS=${SEEDS:-1 2 3}
export STEPS=${STEPS:-1e6}
exec "$(dirname "$0")/sweep.sh" "$@"
