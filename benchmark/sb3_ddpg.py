"""The peer: stable-baselines3's DDPG under the protocol of ddpg_continuous_action.py.

    python benchmark/sb3_ddpg.py --env-id HalfCheetah-v5 --seed 1 --total-timesteps 100e3

Same flags, networks, hyperparameters, warm-up, exploration noise and evaluation (the script's own, on the same seeds),
and the same eval.csv, args.json, result.json and TensorBoard log in runs/<run name>/, so that its curves can be laid
over ours. Learning is stable-baselines3's alone. It has no checkpoints: --resume starts an interrupted run over.
"""

import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action as script

SCRIPT = Path(__file__).stem
NOT_FOR_SB3 = "evaluate warm_start track save_model matmul cudagraphs compile policy_frequency noise "
NOT_FOR_SB3 += "noise_anneal_steps layer_norm n_step target_noise"


@dataclass
class Args(script.Args):
    exp_name: str = SCRIPT  # name of the experiment, part of the run's name
    matmul: str = "mkl"  # not for SB3, which multiplies as torch does by itself
    save_model: bool = False  # not for SB3, whose model is no agent of the script's


class Actor(nn.Module):
    """SB3's policy, whose network deals in actions from -1 to 1, with the interface of the script's Actor."""

    def __init__(self, model: DDPG):
        super().__init__()
        self.network = model.actor
        low, high = model.action_space.low, model.action_space.high
        self.low, self.high = (torch.as_tensor(bound, device=model.device) for bound in (low, high))

    def forward(self, obs):
        return self.low + 0.5 * (self.network(obs) + 1) * (self.high - self.low)

    def clip(self, action):
        return action.clamp(self.low, self.high)


class QNetwork(Actor):
    """SB3's critic, which takes those actions, with the interface of the script's QNetwork."""

    def __init__(self, model: DDPG):
        super().__init__(model)
        self.network = model.critic

    def forward(self, obs, action):
        scaled = 2 * (action - self.low) / (self.high - self.low) - 1
        return self.network.q1_forward(obs, scaled).squeeze(1)


def as_agent(model: DDPG, args: script.Args) -> SimpleNamespace:
    """SB3's model as the script's evaluate() and Run take an agent; there is nothing in it to save."""
    return SimpleNamespace(actor=Actor(model), qf=QNetwork(model), args=args, device=model.device, state_dict=dict)


class Protocol(BaseCallback):
    """What the script's loop does around learning, at the same steps."""

    def __init__(self, run: script.Run):
        super().__init__()
        self.run, self.steps = run, run.steps()

    def _on_step(self) -> bool:
        """After each step of the environment, before its update."""
        args, step, info = self.run.args, next(self.steps), self.locals["infos"][0]
        if self.locals["dones"][0]:  # and SB3 has reset the environment
            episode = info[script.SCRIPT]
            self.run.log({"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})
        if step >= args.learning_starts and self.model.action_noise is None:  # SB3 would add it to random actions too
            zeros = np.zeros(self.model.action_space.shape)
            self.model.action_noise = NormalActionNoise(zeros, zeros + args.exploration_noise)
        return True

    def _on_rollout_start(self):
        """Before each step of the environment, and so after the last one's update."""
        if self.run.global_step:
            self.after_update()

    def _on_training_end(self):
        self.after_update()
        next(self.steps, None)  # the end of the last one

    def after_update(self):
        run, args, step = self.run, self.run.args, self.run.global_step
        if step % 200 == 0 and step > args.learning_starts:
            run.log({"charts/SPS": step / (time.time() - run.start_time)})
        if args.eval_interval and (step % args.eval_interval == 0 or step == args.total_timesteps):
            run.add_evaluation()


def provenance(device: torch.device, of_ours=script.provenance) -> dict:
    record = of_ours(device)
    record["versions"]["stable_baselines3"] = version("stable_baselines3")
    return record


def main(args: Args):
    for name in NOT_FOR_SB3.split():
        allowed = getattr(args, name) == getattr(Args, name)
        script.exit_unless(allowed, f"--{name.replace('_', '-')} is not for stable-baselines3's DDPG")
    device = script.set_up(args)
    env = script.make_env(args)
    model = DDPG(
        "MlpPolicy",
        env,
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        tau=args.tau,
        gamma=args.gamma,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs=dict(net_arch=[256, 256]),  # SB3's own default is 400-300
        seed=args.seed,  # of the environment and its action space too
        device=device,
    )
    agent = as_agent(model, args)
    with script.Run(args, device, env, agent, buffer=agent) as run:
        model.learn(args.total_timesteps, callback=Protocol(run), log_interval=None)
        run.finish()


if __name__ == "__main__":
    script.SCRIPT, script.__file__, script.Args, script.provenance = SCRIPT, __file__, Args, provenance
    sys.stdout.reconfigure(line_buffering=True)  # in a log file too
    main(script.parse_args())
