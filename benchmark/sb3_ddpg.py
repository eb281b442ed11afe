"""The peer: stable-baselines3's DDPG under the protocol of ddpg_continuous_action.py.

    python benchmark/sb3_ddpg.py --env-id HalfCheetah-v5 --seed 1 --total-timesteps 100e3

Same flags, networks, hyperparameters, warm-up, exploration noise and evaluation (the script's own, on the same seeds),
and the same eval.csv, args.json, result.json and TensorBoard log in runs/<run name>/, so that its curves can be laid
over ours. Learning is stable-baselines3's alone. It has no checkpoints: --resume starts an interrupted run over.
"""

import sys
from dataclasses import dataclass, replace
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
NOT_FOR_SB3 = (
    "evaluate track cudagraphs compile policy_frequency noise noise_anneal_steps layer_norm n_step target_noise"
)


@dataclass
class Args(script.Args):
    exp_name: str = SCRIPT
    """name of the experiment, part of the run's name"""

    PACKAGES = *script.Args.PACKAGES, "stable_baselines3"
    SCRIPT = SCRIPT


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


def as_agent(model: DDPG, args: script.Args) -> SimpleNamespace:
    """SB3's model as the script's evaluate() takes an agent."""
    actor = Actor(model)

    def qf(obs, action):
        scaled = 2 * (action - actor.low) / (actor.high - actor.low) - 1
        return model.critic.q1_forward(obs, scaled).squeeze(1)

    return SimpleNamespace(actor=actor, qf=qf, args=args, device=model.device)


class Protocol(BaseCallback):
    """What the script's loop does around learning, at the same steps."""

    def __init__(self, run: script.Run, agent: SimpleNamespace):
        super().__init__()
        self.run, self.agent, self.steps = run, agent, run.steps()

    def _on_step(self) -> bool:
        """After each step of the environment, before its update."""
        args, step = self.run.args, next(self.steps)
        self.outcome = self.locals["rewards"][0], self.locals["dones"][0]
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
        next(self.steps, None)  # the last line of progress

    def after_update(self):
        run, args = self.run, self.run.args
        due = run.record_step(*self.outcome)
        if run.global_step % script.LOG_INTERVAL == 0 and run.global_step > args.learning_starts:
            run.log_losses({})  # none, but with the speed
        if due.evaluation:
            run.add_evaluation(*script.evaluate(self.agent, run.eval_envs, run.eval_seed, args.max_eval_steps))


def main(args: script.Args):
    for name in NOT_FOR_SB3.split():
        allowed = getattr(args, name) == getattr(script.Args, name)
        script.exit_unless(allowed, f"--{name.replace('_', '-')} is not for stable-baselines3's DDPG")
    script.exit_unless(args.matmul != "onednn", "stable-baselines3 multiplies as torch does by itself: --matmul mkl")
    args, device, env = script.set_up(args)
    args = replace(args, matmul="mkl")  # what "auto" stands for here

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
        seed=args.seed,
        device=device,
    )
    agent = as_agent(model, args)
    with script.Run(args, device, env) as run:
        model.learn(args.total_timesteps, callback=Protocol(run, agent), log_interval=None)
        run.finish([script.evaluate(agent, *starts, args.max_eval_steps)[0] for starts in run.final_starts()])


if __name__ == "__main__":
    main(script.parse_args(Args))
