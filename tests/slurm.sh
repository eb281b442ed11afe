#!/usr/bin/env bash
# Tries benchmark/sweep.sh --slurm for real: a Slurm cluster of this one machine, as plain processes in a temporary
# folder; an array of four short runs, one of them requeued in the middle; all must end complete.
#
#     apt-get install slurm-wlm munge && sudo env PATH="$PATH" tests/slurm.sh
#
# Written for Debian's slurm-wlm 22.05. It needs root (slurmctld starts tasks for users) but neither systemd nor cgroups.
set -euo pipefail

((EUID == 0)) || { echo "error: this needs root" >&2 && exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
chmod 755 "$work"
pids=()

clean_up() {
  local code=$?
  if ((code)); then tail -n 20 "$work"/*.log "$work"/runs/slurm/*.log 2>/dev/null || true; fi
  if ((${#pids[@]})); then kill "${pids[@]}" 2>/dev/null || true; fi
  wait
  rm -rf "$work"
  exit "$code"
}
trap clean_up EXIT

until_true() { # SECONDS COMMAND...: waits for a command to succeed
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || { echo "timed out: $*" >&2 && return 1; }
    sleep 0.5
  done
}

# munged and the two Slurm daemons in the foreground, with their state, sockets and logs under $work
install -d -o munge -g munge "$work/munge"
dd if=/dev/urandom of="$work/munge/key" bs=128 count=1 status=none
chown munge:munge "$work/munge/key"
chmod 400 "$work/munge/key"
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --key-file="$work/munge/key" \
  --socket="$work/munge/socket" --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" 2>"$work/munged.log" &
pids+=($!)
until_true 10 test -S "$work/munge/socket"

node=$(hostname -s)
export SLURM_CONF=$work/slurm.conf
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CryptoType=crypto/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES State=UP
END
mkdir "$work/state" "$work/spool"
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D -N "$node" >"$work/slurmd.log" 2>&1 &
pids+=($!)
node_is_idle() { [[ $(sinfo --noheader --format %t 2>/dev/null) == idle ]]; }
until_true 30 node_is_idle
sinfo

cd "$work"
sweep() {
  "$root/benchmark/ddpg_continuous_action.sh" ENVS="InvertedPendulum-v5 Pendulum-v1" SEEDS=1 STEPS=6e3 \
    VARIANT=default VARIANT="--tau 0.01 --gamma 0.98" OUT=runs/slurm "$@" -- --learning-starts 100 --batch-size 16 --eval-interval 500 --eval-episodes 2 \
    --checkpoint-interval 500
}
sweep --slurm
job=$(squeue --noheader --format %F | head -n 1)

# Requeue the first task once it has a checkpoint behind it and most of its run before it
first=runs/slurm/InvertedPendulum-v5__ddpg_continuous_action__1
until_true 120 test -e "$first/checkpoint.pt"
scontrol requeue "${job}_0"
echo "requeued ${job}_0 at step $(tail -n 1 "$first/eval.csv" | cut -d, -f1)"

no_jobs() { [[ -z $(squeue --noheader) ]]; }
until_true 300 no_jobs
cat runs/slurm/slurm-*.log
(($(find runs/slurm -name result.json | wc -l) == 4)) || { echo "not all runs are complete" >&2 && exit 1; }
grep -q '^stopped: ' "$first.log" || { echo "the requeued run did not get SIGTERM" >&2 && exit 1; }
# It resumed from its checkpoint: the log tells of step 500 once
(($(grep -c '^step 500:' "$first.log") == 1)) || { echo "the requeued run started over" >&2 && exit 1; }
steps=$(cut -d, -f1 "$first/eval.csv" | paste -sd ' ')
[[ $steps == "global_step $(seq -s ' ' 500 500 6000)" ]] || { echo "eval.csv has the steps $steps" >&2 && exit 1; }
sweep --slurm # all done: submits nothing
sweep         # nor does it run anything here
echo "slurm: ok"
