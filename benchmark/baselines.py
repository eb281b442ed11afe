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

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
        "Ant-v5",
    )
    """environments to measure"""
    scripts: tuple[str, ...] = ("ddpg_continuous_action", "ddpg_paper_faithful")
    """training scripts whose untrained actors are measured"""
    episodes: int = 100
    """episodes of the random policy, and of the untrained networks together, 10 each"""
    out: Path = ROOT / "benchmark" / "baselines.csv"
    """table to write"""


def random_returns(env_id: str, episodes: int) -> list[float]:
    env, returns = gym.make(env_id), []
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
    """The mean returns of freshly initialised actors, by the script's own evaluation."""
    module = importlib.import_module(script)
    envs = [gym.make(env_id) for _ in range(EVAL_EPISODES)]
    obs_shape, action = envs[0].observation_space.shape, envs[0].action_space
    obs = obs_shape if script == "ddpg_paper_faithful" else obs_shape[0]  # that one takes images too
    returns = []
    for seed in range(1, episodes // EVAL_EPISODES + 1):
        torch.manual_seed(seed)
        actor = module.Actor(obs, *map(torch.from_numpy, module.float32_bounds(action))).eval()
        qf = module.QNetwork(obs, action.shape[0]).eval()
        returns.append(module.evaluate(actor, qf, envs, seed, gamma=0.99)[0].mean())
    return returns


def main(args: Args):
    if args.episodes < 2 * EVAL_EPISODES or args.episodes % EVAL_EPISODES:
        print(f"error: --episodes must be a multiple of {EVAL_EPISODES}, at least two of them", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(1)
    mujoco.set_mju_user_warning(functools.cache(lambda text: print(f"mujoco: {text}", file=sys.stderr)))  # each once
    measured = {"random": random_returns}
    for script in args.scripts:
        measured[f"untrained {script}"] = functools.partial(untrained_returns, script)
    rows = []
    if args.out.exists():  # what was measured of other environments stays
        rows = [row for row in csv.DictReader(args.out.open()) if row["env_id"] not in args.env_ids]
    for env_id in args.env_ids:
        for policy, measure in measured.items():
            try:
                returns = measure(env_id, args.episodes)
            except gym.error.Error as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            mean, std = round(float(np.mean(returns)), 2), round(float(np.std(returns, ddof=1)), 2)
            rows.append(dict(env_id=env_id, policy=policy, mean=mean, std=std, episodes=args.episodes))
            rows[-1] |= {package: version(package) for package in ("gymnasium", "mujoco")}
            print(f"{env_id}, {policy}: {mean} ± {std}", flush=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
