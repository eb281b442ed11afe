#!/usr/bin/env bash
# Runs SCRIPT with every seed in SEEDS, every variant of its flags and every environment in ENVS, JOBS runs at a time.
#
#     benchmark/ddpg_continuous_action.sh [SETTING=value ...] [--dry-run | --slurm] [-- flags of the script]
#     benchmark/ddpg_continuous_action.sh ENVS="Hopper-v5 Ant-v5" SEEDS="1 2 3 4 5" JOBS=4 -- --gamma 0.98
#     benchmark/ddpg_continuous_action.sh VARIANT=default VARIANT="--learning-rate 1e-3" VARIANT="--n-step 3 --tau 0.01"
#
# Settings, given as above or in the environment:
#   SCRIPT   the training script, a path in this repository
#   ENVS     environment ids, separated by spaces
#   SEEDS    seeds, separated by spaces
#   VARIANT  flags of one variant, or "default" for none; repeat it for more variants (default: only "default").
#            In the environment it is VARIANTS, one variant per line. A value in JSON has no spaces:
#            VARIANT='--env-kwargs {"max_episode_steps":500}'
#   STEPS    environment steps of each run
#   JOBS     number of runs at a time (default: the cores divided by THREADS; with --slurm: no limit)
#   THREADS  CPU threads of each run (default: 1)
#   OUT      folder for the runs and their logs, under runs/ (default: runs/<the script's name>)
#   PYTHON   the interpreter (default: python)
#
# The flags after -- are those that all runs share; a variant's own flags come after them and win. A variant is part of
# the name of its runs: Hopper-v5__ddpg_continuous_action__learning-rate-1e-3__2. Only the default's have no such part.
#
# Runs start in the order of the seeds, then the variants, then the environments: seed 1 of everything comes first, so
# that a sweep that is still running already compares everything.
#
# Re-running the command skips finished runs, resumes the rest, and waits for those that are still running. A failed run
# does not stop the others, but the sweep then ends with exit code 1. Ctrl-C ends all the runs cleanly. Environments,
# seeds and variants can be added to a sweep later; SCRIPT, STEPS, THREADS and the shared flags have to stay.
#
#   --dry-run  prints the commands of the runs that are left, and does nothing else
#   --slurm    submits those runs as a job array instead. sbatch reads its options from the environment:
#              SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=1-0 SBATCH_GRES=gpu:1 benchmark/ddpg_continuous_action.sh --slurm
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mode=local variants=()
while (($#)); do
  case $1 in
    SCRIPT=* | ENVS=* | SEEDS=* | STEPS=* | JOBS=* | THREADS=* | OUT=* | PYTHON=*) declare "${1%%=*}=${1#*=}" ;;
    VARIANT=*) variants+=("${1#*=}") ;;
    --dry-run | --slurm | --slurm-task) [[ $mode == dry-run ]] || mode=${1#--} ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    --) shift && break ;;
    *) die "unknown setting $1 (--help lists them; flags of the script go after --)" ;;
  esac
  shift
done

read -rd '' -a env_list <<<"${ENVS:-}" || true # read fails at the end of its input
read -rd '' -a seed_list <<<"${SEEDS:-}" || true
((${#env_list[@]} && ${#seed_list[@]})) || die "ENVS and SEEDS must name at least one environment and one seed"
[[ -f $root/${SCRIPT:=} ]] || die "SCRIPT must be a file of this repository, not '$SCRIPT'"
: "${OUT:=runs/$(basename "$SCRIPT" .py)}" "${THREADS:=1}" "${PYTHON:=python}"
while [[ $OUT == */ ]]; do OUT=${OUT%/}; done
[[ $OUT == runs/?* && $OUT != *..* ]] || die "OUT must lie under runs/, not '$OUT' (for another disk, make runs a link)"
[[ ${STEPS:=} =~ ^[0-9][0-9_]*(\.[0-9]+)?([eE][0-9]+)?$ ]] && steps=$(LC_ALL=C printf '%f' "${STEPS//_/}")
[[ ${steps:-} == *[1-9]*.000000 ]] || die "STEPS must be a number of steps, not '$STEPS'"
steps=${steps%.*}
[[ $THREADS =~ ^[1-9][0-9]*$ ]] || die "THREADS must be a positive number, not '$THREADS'"
[[ ${JOBS:=} =~ ^([1-9][0-9]*)?$ ]] || die "JOBS must be a positive number, not '$JOBS'"
python=$(command -v "$PYTHON") || die "no interpreter '$PYTHON'"
export OMP_NUM_THREADS=$THREADS
# Memory in huge pages, from glibc 2.35 on and where the kernel gives them: an update is 1.1 times as fast on Zen 5
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
flags=(--total-timesteps "$steps" --num-threads "$THREADS" "$@")

if ((!${#variants[@]})); then # none on the command line
  while IFS= read -r variant; do
    if [[ $variant == *[![:space:]]* ]]; then variants+=("$variant"); fi
  done <<<"${VARIANTS:-}"
fi
((${#variants[@]})) || variants=(default)
json='[{[][]A-Za-z0-9._/:,"{}[-]*[]}]'
flag="--[a-z0-9]+(-[a-z0-9]+)*( [A-Za-z0-9._+-]+| $json)*"
reserved='--(env-id|seed|run-name|total-timesteps|num-threads|resume|evaluate)'
parts=() # of the runs' names: each variant's flags in alphabetical order
for i in "${!variants[@]}"; do
  read -ra words <<<"${variants[i]}" || true
  variant=${words[*]:-default} part=''
  if [[ $variant != default ]]; then
    [[ $variant =~ ^$flag(\ $flag)*$ ]] ||
      die "a variant is flags like '--learning-rate 1e-3' or '--env-kwargs {\"a\":1}', without spaces, not '$variant'"
    [[ ! " $variant " =~ \ ($reserved)\  ]] || die "${BASH_REMATCH[1]} is for the sweep to set, not for a variant"
    part=$(LC_ALL=C sort <<<"${variant// --/$'\n'--}")
    part=${part#--} part=${part//$'\n'--/_} part=${part//[]\"{\}[]/} part=__${part//[ :,\/]/-}
  fi
  variants[i]=$variant parts+=("$part")
done

names=() envs=() seeds=() flags_of=() state=() pids=()
for seed in "${seed_list[@]}"; do
  for i in "${!variants[@]}"; do
    for env in "${env_list[@]}"; do
      name=${env//[\/:]/-}__$(basename "$SCRIPT" .py)${parts[i]}__$seed
      [[ " ${names[*]-} " != *" $name "* ]] || die "$env, ${variants[i]}, seed $seed is there twice"
      names+=("$name") envs+=("$env") seeds+=("$seed") flags_of+=("${variants[i]#default}")
      if [[ -e $OUT/$name/result.json ]]; then state+=(finished); else state+=(waiting); fi
    done
  done
done

set_command() { # of run $1
  local name=${names[$1]} own
  read -ra own <<<"${flags_of[$1]}" || true
  command=("$python" "$root/$SCRIPT" --env-id "${envs[$1]}" --seed "${seeds[$1]}" --run-name "${OUT#runs/}/$name")
  command+=("${flags[@]}" ${own[@]+"${own[@]}"})
  if [[ -e $OUT/$name/args.json ]]; then command+=(--resume "$OUT/$name"); fi
}

# Becomes the run: signals reach it directly. Its log is its lock too, so that two sweeps never write the same run.
launch() {
  exec >>"$OUT/${names[$1]}.log" 2>&1
  if command -v flock >/dev/null && ! flock -n 1; then
    echo "waiting for another process that runs it" && flock 1
    if [[ -e $OUT/${names[$1]}/result.json ]]; then exit; fi
  fi
  set_command "$1"
  printf '$' && printf ' %q' "${command[@]}" && echo
  exec "${command[@]}"
}

if [[ $mode == slurm-task ]]; then
  if [[ ${state[SLURM_ARRAY_TASK_ID]} == waiting ]]; then launch "$SLURM_ARRAY_TASK_ID"; fi
  exit # finished since it was submitted
fi

# Runs with other settings must not end up in one table: they belong in another folder
settings=$(printf '%q ' "$SCRIPT" "${flags[@]}")
if [[ -e $OUT/settings ]] && compgen -G "$OUT/*/args.json" >/dev/null && [[ $settings != "$(<"$OUT/settings")" ]]; then
  die "$OUT holds a sweep with other settings, $(<"$OUT/settings"): choose another OUT"
fi
if [[ $mode == dry-run ]]; then
  for i in "${!names[@]}"; do
    set_command "$i"
    if [[ ${state[i]} == waiting ]]; then printf '%q ' "${command[@]}" && echo; fi
  done
  exit
fi
mkdir -p "$OUT"
echo "$settings" >"$OUT/settings"

if [[ $mode == slurm ]]; then
  todo=()
  for i in "${!names[@]}"; do if [[ ${state[i]} == waiting ]]; then todo+=("$i"); fi; done
  ((${#todo[@]})) || { echo "all ${#names[@]} runs are done: $OUT" && exit; }
  array=$(IFS=, && echo "${todo[*]}")${JOBS:+%$JOBS}
  task=("$root/benchmark/sweep.sh" SCRIPT="$SCRIPT" ENVS="$ENVS" SEEDS="$SEEDS" "${variants[@]/#/VARIANT=}"
    STEPS="$STEPS" THREADS="$THREADS" OUT="$OUT" PYTHON="$python" --slurm-task -- "$@")
  # A preempted task is put back into the queue by --requeue and resumes from its checkpoint
  job=$(sbatch --parsable --array="$array" --job-name="$(basename "$OUT")" --cpus-per-task="$THREADS" --requeue \
    --open-mode=append --output="$OUT/slurm-%A_%a.log" <<<"#!/usr/bin/env bash
exec $(printf '%q ' "${task[@]}")")
  echo "job array $job of ${#todo[@]} runs (${#names[@]} in the sweep): squeue --job $job; logs in $OUT"
  exit
fi

count() { # runs in state $1
  local i n=0
  for i in "${state[@]}"; do if [[ $i == "$1" ]]; then n=$((n + 1)); fi; done
  echo "$n"
}

show() {
  local i step now=0 total=0 left='' line
  for i in "${!names[@]}"; do
    step=0
    case ${state[i]} in
      failed) continue ;;
      finished) step=$steps ;;
      running) step=$(tail -qn 1 "$OUT/${names[i]}/eval.csv" 2>/dev/null | cut -d, -f1) || true ;;
    esac
    if [[ $step =~ ^[0-9]+$ ]]; then now=$((now + step)); fi
    total=$((total + steps))
  done
  : "${first:=$now}"
  if ((now > first && now < total)); then
    left=$(((total - now) * SECONDS / (now - first)))
    left=$(printf ', about %d:%02d:%02d left' $((left / 3600)) $((left / 60 % 60)) $((left % 60)))
  fi
  line="$(count finished) done, $(count running) running, $(count waiting) waiting, $(count failed) failed"
  if [[ -t 1 ]]; then
    printf '\r%s%s\033[K' "$line" "$left"
  else
    echo "$line$left"
  fi
}

stop() {
  trap - INT TERM HUP # a second Ctrl-C ends this script at once
  # shellcheck disable=SC2046 # one argument for each
  kill -TERM $(jobs -pr) 2>/dev/null || true
  wait
  printf '\nstopped; run the same command again to resume\n' >&2
  exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$((cores > THREADS ? cores / THREADS : 1))}
every=60 && if [[ -t 1 ]]; then every=10; fi # seconds between lines of progress
echo "${#names[@]} runs of $SCRIPT, $steps steps each, $JOBS at a time; logs in $OUT"
SECONDS=0 next=0
while :; do
  running=$(count running)
  for i in "${!names[@]}"; do
    if [[ ${state[i]} == running ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
      if wait "${pids[i]}"; then state[i]=finished; else state[i]=failed; fi
      running=$((running - 1)) next=0
    fi
  done
  for i in "${!names[@]}"; do
    if [[ ${state[i]} == waiting ]] && ((running < JOBS)); then
      launch "$i" &
      pids[i]=$! state[i]=running
      running=$((running + 1)) next=0
    fi
  done
  if ((SECONDS >= next)); then
    show
    next=$((SECONDS + every))
  fi
  ((running)) || break
  sleep 1 &
  wait $! # and not in the foreground, where it would hold up Ctrl-C
done

if [[ -t 1 ]]; then echo; fi
for i in "${!names[@]}"; do
  if [[ ${state[i]} == failed ]]; then
    printf '\nfailed: %s, %s ends with\n' "${names[i]}" "$OUT/${names[i]}.log"
    tail -n 5 "$OUT/${names[i]}.log"
  fi
done >&2
(($(count failed) == 0))
