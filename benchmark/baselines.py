"""Scores of policies that never learned: uniformly random actions, and the scripts' actors as they are initialised.

    python benchmark/baselines.py

A final return means little without them: on Ant-v5 standing still scores about 1,000. Writes benchmark/baselines.csv,
which report.py reads. `mean` and `std` are over episodes for the random policy, and over networks, each with as many
episodes as an evaluation has, for an untrained one.
"""

import csv
import functools
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action
from ddpg_continuous_action import exit_unless

ROOT = Path(__file__).resolve().parents[1]
EVAL_EPISODES = 10  # as in the scripts' own evaluations


@dataclass
class Args:
    env_ids: tuple[str, ...] = (
        "HalfCheetah-v5",
        "Walker2d-v5",
        "Hopper-v5",
        "InvertedPendulum-v5",
        "Humanoid-v5",
        "Pusher-v5",
        "Swimmer-v5",
        "Reacher-v5",
        "InvertedDoublePendulum-v5",
        "Ant-v5",
        "MountainCarContinuous-v0",
        "Pendulum-v1",
    )
    """environments to measure"""
    scripts: tuple[str, ...] = ("ddpg_continuous_action", "ddpg_paper_faithful")
    """training scripts whose untrained actors are measured"""
    episodes: int = 100
    """episodes of the random policy, and of the untrained networks together, 10 each"""
    out: Path = ROOT / "benchmark" / "baselines.csv"
    """table to write"""


def random_returns(env_id: str, episodes: int) -> list[float]:
    env, returns = ddpg_continuous_action.make_env(ddpg_continuous_action.Args(env_id=env_id)), []
    for episode in range(episodes):
        env.reset(seed=episode)
        env.action_space.seed(episode)
        episode_return, ended = 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            episode_return += float(reward)
            ended = terminated or truncated
        returns.append(episode_return)
    return returns


def untrained_returns(script: str, env_id: str, episodes: int) -> list[float]:
    """The mean returns of freshly initialised agents, by the script's own evaluation."""
    module, returns = importlib.import_module(script), []
    envs = [module.make_env(module.Args(env_id=env_id)) for _ in range(EVAL_EPISODES)]
    for seed in range(1, episodes // EVAL_EPISODES + 1):
        torch.manual_seed(seed)
        spaces = envs[0].observation_space, envs[0].action_space
        agent = module.DDPG(module.Args(seed=seed), *spaces, torch.device("cpu"))
        returns.append(module.evaluate(agent, envs)[0].mean())
    return returns


def main(args: Args):
    whole = args.episodes >= 2 * EVAL_EPISODES and args.episodes % EVAL_EPISODES == 0
    exit_unless(whole, f"--episodes must be a multiple of {EVAL_EPISODES}, at least two of them")
    torch.set_num_threads(1)
    measured = {"random": random_returns}
    for script in args.scripts:
        measured[f"untrained {script}"] = functools.partial(untrained_returns, script)
    rows = []
    if args.out.exists():  # what was measured of other environments stays
        rows = [row for row in csv.DictReader(args.out.open(encoding="utf-8")) if row["env_id"] not in args.env_ids]
    for env_id in args.env_ids:
        for policy, measure in measured.items():
            returns = measure(env_id, args.episodes)
            # + 0.0 makes a 0 of -0.0
            mean, std = round(float(np.mean(returns)), 2) + 0.0, round(float(np.std(returns, ddof=1)), 2)
            rows.append(dict(env_id=env_id, policy=policy, mean=mean, std=std, episodes=args.episodes))
            rows[-1] |= {package: version(package) for package in ("gymnasium", "mujoco")}
            print(f"{env_id}, {policy}: {mean} ± {std}", flush=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
