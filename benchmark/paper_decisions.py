"""Where the paper is silent and learning may depend on it: the experiment behind ddpg_paper_faithful.py's defaults.

    python benchmark/paper_decisions.py --jobs 2

Each variant changes one decision of the default. Runs go to runs/paper_decisions/; the same command again skips the
finished ones and starts the others over. The table goes to benchmark/results/paper_decisions.csv and to the terminal:
mean and standard deviation over the seeds of the mean of the last 10 evaluations, 10 episodes each.
"""

import csv
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs"  # the scripts write to runs/ of the folder they are started in
STEPS = {"Pendulum-v1": 20_000, "InvertedPendulum-v5": 20_000}
VARIANTS = {
    "default": [],
    "targets use slowly following running averages": [],
    "targets use copied running averages": [],
    "OU time step 0.01": ["--ou-dt", "0.01"],
    "learning starts after 64 steps": ["--learning-starts", "64"],
    "learning starts after 10,000 steps": ["--learning-starts", "10_000"],
}


@dataclass
class Args:
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 2
    """runs at a time, one thread each"""


def run_name(variant: str, env_id: str, seed: int) -> str:
    return f"paper_decisions/{env_id}__{variant.replace(' ', '_').replace(',', '')}__{seed}"


def run(variant: str, env_id: str, seed: int):
    """One run, in a process of its own: some variants change the script's functions."""
    name = run_name(variant, env_id, seed)
    if (RUNS / name / "result.json").exists():
        return
    shutil.rmtree(RUNS / name, ignore_errors=True)
    command = [sys.executable, __file__, "--variant", variant, "--env-id", env_id, "--seed", str(seed)]
    command += ["--total-timesteps", str(STEPS[env_id]), "--eval-interval", "1000", "--run-name", name]
    command += ["--num-threads", "1", "--checkpoint-interval", "0", *VARIANTS[variant]]
    print(name, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(variant: str, flags: list[str]):
    """Train with the variant's change to the script's functions."""
    sys.path.insert(0, str(ROOT))
    import torch

    import ddpg_paper_faithful as ddpg

    update, critic_loss = ddpg.update, ddpg.critic_loss

    def critic_loss_with_averages(qf, target_actor, target_qf, batch, gamma):
        target_actor.eval(), target_qf.eval()
        return critic_loss(qf, target_actor, target_qf, batch, gamma)

    def update_with_averages(actor, qf, target_actor, target_qf, *rest, tau):
        losses = update(actor, qf, target_actor, target_qf, *rest)
        with torch.no_grad():
            for network, target in (actor, target_actor), (qf, target_qf):
                for buffer, target_buffer in zip(network.buffers(), target.buffers(), strict=True):
                    if buffer.is_floating_point():
                        target_buffer.lerp_(buffer, tau)
        return losses

    if "running averages" in variant:
        tau = 1.0 if "copied" in variant else 0.001
        ddpg.critic_loss = critic_loss_with_averages
        ddpg.update = functools.partial(update_with_averages, tau=tau)
    ddpg.main(tyro.cli(ddpg.Args, args=flags))


def main(args: Args):
    runs = [(v, env_id, seed) for seed in range(1, args.seeds + 1) for env_id in STEPS for v in VARIANTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda arguments: run(*arguments), runs))
        except BaseException:  # a failed run, or Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise
    table = [["variant", "environment", "steps", "seeds", "mean", "std", "each seed"]]
    for env_id in STEPS:
        for variant in VARIANTS:
            scores = []
            for seed in range(1, args.seeds + 1):
                result = json.loads((RUNS / run_name(variant, env_id, seed) / "result.json").read_text())
                scores.append(result["final_return"])
            spread = statistics.stdev(scores) if len(scores) > 1 else 0
            row = [variant, env_id, STEPS[env_id], len(scores), f"{statistics.mean(scores):.1f}", f"{spread:.1f}"]
            table.append([*row, " ".join(f"{score:.1f}" for score in scores)])
    path = ROOT / "benchmark/results/paper_decisions.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    for row in table:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    if "--variant" in sys.argv:
        train(sys.argv[2], sys.argv[3:])
    else:
        main(tyro.cli(Args))
