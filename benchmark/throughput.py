"""Steps a second: our script and stable-baselines3 on the same work, the update against its limit, runs side by side.

    python benchmark/throughput.py

Training runs are real ones, each a process of its own, without evaluations and checkpoints, timed after the warm-up by
the clock in their TensorBoard logs. Whatever is compared alternates, round by round, since a machine's speed drifts.
Leave the machine alone meanwhile. Prints Markdown tables.
"""

import copy
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ddpg_continuous_action import LOG_INTERVAL, Actor, QNetwork, ReplayBuffer, require, update

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 1_000  # random steps before learning, not timed; nor are those up to the log's first row after it
OBS_DIM, ACTION_DIM, BATCH_SIZE = 17, 6, 256  # HalfCheetah-v5
UPDATE_FLOPS = 357e6  # the matrix products that an update at these sizes cannot do without


@dataclass
class Args:
    scripts: tuple[str, ...] = ("ddpg_continuous_action.py", "benchmark/sb3_ddpg.py", "ddpg_paper_faithful.py")
    """scripts to compare, each with flags if need be: "ddpg_continuous_action.py --cudagraphs" """
    env_id: str = "HalfCheetah-v5"
    """environment of the training runs"""
    steps: int = 5_000
    """timed steps of each run, 200 or a multiple of it: the log's rows are so far apart"""
    rounds: int = 5
    """rounds, each with one measurement of everything that is compared"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads"""
    cores: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    """runs side by side, one thread each, against one alone"""


def train(args: Args, script: str, threads: int, copies: int = 1) -> list[float]:
    """Steps a second of so many runs at once."""
    flags = f"--total-timesteps {WARM_UP + LOG_INTERVAL + args.steps} --learning-starts {WARM_UP} "
    flags += f"--num-threads {threads} --env-id {args.env_id} --eval-interval 0 --checkpoint-interval 0 --no-save-model"
    path, *own_flags = shlex.split(script)
    command = [sys.executable, ROOT / path, *own_flags, *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        names = [f"run{i}" for i in range(copies)]
        runs = [
            subprocess.Popen([*command, "--run-name", name], cwd=folder, env=env, stdout=subprocess.DEVNULL)
            for name in names
        ]
        if any([run.wait() for run in runs]):  # a list: wait for all of them
            sys.exit(1)
        return [logged_speed(f"{folder}/runs/{name}") for name in names]


def logged_speed(run_dir: str) -> float:
    rows = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    return (rows[-1].step - rows[0].step) / (rows[-1].wall_time - rows[0].wall_time)


def make_learner():
    """The script's own update on a batch of its own replay buffer, at HalfCheetah's sizes."""
    high = torch.ones(ACTION_DIM)
    actor, qf = Actor(OBS_DIM, -high, high), QNetwork(OBS_DIM, ACTION_DIM)
    target_actor, target_qf = (copy.deepcopy(network).requires_grad_(False) for network in (actor, qf))
    optimizers = [torch.optim.Adam(network.parameters(), lr=3e-4, fused=True) for network in (actor, qf)]
    buffer, rng = ReplayBuffer(100_000, OBS_DIM, ACTION_DIM, torch.device("cpu")), np.random.default_rng(0)
    for _ in range(10_000):
        obs, next_obs = rng.normal(size=(2, OBS_DIM))
        buffer.add(obs, rng.uniform(-1, 1, ACTION_DIM), rng.normal(), next_obs, False)
    return lambda: update(actor, qf, target_actor, target_qf, *optimizers, buffer.sample(BATCH_SIZE), 0.99, 0.005)


def seconds_each(function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def time_update(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of an update, and of its matrix products alone at the rate of a 256 x 256 x 256 product."""
    learn, a, b, out = make_learner(), *torch.rand(3, 256, 256)
    updates, limits = [], []
    for i in range(rounds + 1):
        limit = seconds_each(lambda: torch.mm(a, b, out=out), 500) * UPDATE_FLOPS / (2 * 256**3)
        seconds = seconds_each(learn, 100)
        if i:  # the first round warms up
            limits.append(limit)
            updates.append(seconds)
    return updates, limits


def spread(values, form=".0f") -> str:
    """Median, and the range in brackets."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(args: Args):
    require(args.steps > 0 and args.steps % LOG_INTERVAL == 0, f"--steps must be a multiple of {LOG_INTERVAL}")
    print(
        f"Median of {args.rounds} rounds (range). torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    )

    print(f"\nTraining on {args.env_id}, {args.steps:,} steps after the warm-up, without evaluations:\n")
    print("| steps a second | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in args.threads) + " |")
    print("| --- |" + " --- |" * len(args.threads), flush=True)
    speeds = {(script, threads): [] for script in args.scripts for threads in args.threads}
    for _ in range(args.rounds):
        for (script, threads), values in speeds.items():
            values += train(args, script, threads)
    for script in args.scripts:
        print(f"| {script} | " + " | ".join(spread(speeds[script, threads]) for threads in args.threads) + " |")

    print("\nOne update of ddpg_continuous_action.py (batch sampled from the buffer, both networks, both targets):\n")
    print("| threads | update, ms | its matrix products alone, ms | update / limit |\n| --- | --- | --- | --- |")
    for threads in args.threads:
        torch.set_num_threads(threads)
        updates, limits = time_update(args.rounds)
        ratios = spread(np.divide(updates, limits), ".2f")
        milliseconds = (spread([1e3 * value for value in values], ".2f") for values in (updates, limits))
        print(f"| {threads} | " + " | ".join([*milliseconds, ratios]) + " |", flush=True)
    print(f"\nThe limit: {UPDATE_FLOPS / 1e6:.0f} MFLOP at the rate of a 256 x 256 x 256 product, measured in turn.")

    print(f"\n{args.scripts[0]}, {args.cores} runs side by side on {args.cores} cores, one thread each:\n")
    alone, together = [], []
    for _ in range(args.rounds):
        alone += train(args, args.scripts[0], 1)
        together.append(sum(train(args, args.scripts[0], 1, args.cores)))
    print("| runs | steps a second, all runs together | times one run |\n| --- | --- | --- |")
    print(f"| 1 | {spread(alone)} | |")
    print(f"| {args.cores} | {spread(together)} | {spread(np.divide(together, alone), '.2f')} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
