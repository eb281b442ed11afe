"""The peer: stable-baselines3's DDPG on the protocol of ddpg_continuous_action.py.

    python benchmark/sb3_ddpg.py --env-id HalfCheetah-v5 --seed 1 --total-timesteps 100e3

Same flags, networks, hyperparameters, warm-up, exploration noise and evaluation (the script's own, on the same seeds),
and the same eval.csv, args.json, result.json and TensorBoard log in runs/<run name>/, so that its curves can be laid
over ours. Learning is stable-baselines3's alone. It has no checkpoints: --resume starts a broken-off run over.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action as script

SCRIPT = Path(__file__).stem


class Greedy:
    """SB3's actor as the script's evaluation takes one: observations to actions within the environment's bounds."""

    def __init__(self, model: DDPG):
        self.model = model
        self.action_low, self.action_high = (
            torch.as_tensor(bound, device=model.device) for bound in (model.action_space.low, model.action_space.high)
        )

    def __call__(self, obs):
        scaled = self.model.actor(obs)  # SB3's networks deal in actions from -1 to 1
        return self.action_low + 0.5 * (scaled + 1) * (self.action_high - self.action_low)

    def clip(self, action):
        return action.clamp(self.action_low, self.action_high)

    def q(self, obs, action):
        scaled = 2 * (action - self.action_low) / (self.action_high - self.action_low) - 1
        return self.model.critic.q1_forward(obs, scaled).squeeze(1)


class Protocol(BaseCallback):
    """What the script does beside learning, at the same steps: its log, its evaluation, eval.csv."""

    def __init__(self, args: script.Args, run_dir: Path):
        super().__init__()
        self.args, self.run_dir, self.eval_rows = args, run_dir, []
        self.eval_envs = script.make_eval_envs(args, run_dir) if args.eval_interval else []
        self.log = script.Log(run_dir)
        self.log_time, self.log_step = time.time(), 0

    def _on_step(self) -> bool:
        """Called after each environment step, before its update."""
        step, args = self.num_timesteps, self.args
        if step >= args.learning_starts and self.model.action_noise is None:  # in the warm-up SB3 would add it as well
            zeros = np.zeros(self.model.action_space.shape)
            self.model.action_noise = NormalActionNoise(zeros, zeros + args.exploration_noise)
        if step > args.learning_starts and step % script.LOG_INTERVAL == 0:
            speed = (step - self.log_step) / (time.time() - self.log_time)
            self.log.add({"charts/SPS": speed}, step)
            self.log_time, self.log_step = time.time(), step
        info = self.locals["infos"][0]
        if "episode" in info:
            self.log.add({"charts/episodic_return": float(info["episode"]["r"])}, step)
        if args.eval_interval and step % args.eval_interval == 0 and step != args.total_timesteps:
            self.evaluate()
        return True

    def _on_training_end(self):
        if self.args.eval_interval:
            self.evaluate()
        self.log.close()

    def evaluate(self):
        args, actor = self.args, Greedy(self.model)
        returns, discounted, q = script.evaluate(actor, actor.q, self.eval_envs, args.seed, args.gamma)
        statistics = returns.mean(), returns.std(), returns.min(), returns.max()
        self.eval_rows.append([self.num_timesteps, *map(float, statistics), len(returns)])
        lines = [script.EVAL_COLUMNS, *self.eval_rows]
        script.save(self.run_dir / "eval.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
        scalars = {"episodic_return": returns, "discounted_return": discounted, "q_estimate": q}
        self.log.add({f"eval/{name}": values.mean() for name, values in scalars.items()}, self.num_timesteps)
        print(f"step {self.num_timesteps:,} of {args.total_timesteps:,}, eval {returns.mean():.1f}", flush=True)


def main(args: script.Args):
    if args.resume:
        args, _ = script.saved_run(Path(args.resume))
        script.require(args.exp_name == SCRIPT, f"{args.resume} is no run of {SCRIPT}.py")  # it would be removed below
    script.check_args(args)
    script.require(args.policy_frequency == 1, "SB3's DDPG updates its actor at every step: --policy-frequency 1")
    others = args.evaluate or args.track or args.cudagraphs or args.compile
    script.require(not others, "--evaluate, --track, --cudagraphs and --compile are not for SB3's DDPG")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    run_name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{run_name}")
    if args.resume:
        shutil.rmtree(run_dir)
        args.resume = None
    env = script.make_env(args)
    script.open_run(args, run_dir, device, checkpoint=None)

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
    start_time, protocol = time.time(), Protocol(args, run_dir)
    model.learn(args.total_timesteps, callback=protocol, log_interval=None)
    seconds = time.time() - start_time

    final = [row[1] for row in protocol.eval_rows[-10:]]
    result = {
        "global_step": args.total_timesteps,
        "final_return": float(np.mean(final)) if final else None,
        "evaluations": len(protocol.eval_rows),
        "seconds": seconds,
        "steps_per_second": args.total_timesteps / seconds,
    }
    script.save(run_dir / "result.json", json.dumps(result, indent=2))
    print(f"final return {result['final_return']}, the mean of the last {len(final)} evaluations; {run_dir}")


if __name__ == "__main__":
    main(tyro.cli(script.Args, default=script.Args(exp_name=SCRIPT)))
