"""ddpg_paper_faithful.py with modes of batch normalisation on which the paper is silent and that are no flags of it.

    python benchmark/paper_batch_norm.py --target-statistics slow --actor-loss-statistics running --seed 2
    SCRIPT=benchmark/paper_batch_norm.py ENVS=InvertedPendulum-v5 SEEDS="1 2 3" STEPS=200e3 benchmark/sweep.sh \\
        VARIANT=default VARIANT="--target-statistics copied" \\
        VARIANT="--target-statistics slow --actor-loss-statistics running"

The last variant is rllab's. All else is the script's own: its flags, its loop, its files, its checkpoints.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_paper_faithful as paper

SCRIPT = Path(__file__).stem


@dataclass
class Args(paper.Args):
    exp_name: str = SCRIPT
    """name of the experiment, part of the run's name"""

    # Modes of batch normalisation
    target_statistics: Literal["batch", "copied", "slow"] = "batch"
    """the targets normalise by the batch's statistics, the online networks' running averages, or those moved by tau"""
    actor_loss_statistics: Literal["batch", "running"] = "batch"
    """the critic in the actor's loss normalises by the batch's statistics, or by its running averages"""


def running_averages(*networks: nn.Module) -> list[torch.Tensor]:
    norms = [layer for network in networks for layer in network.modules() if isinstance(layer, nn.BatchNorm1d)]
    return [average for norm in norms for average in (norm.running_mean, norm.running_var)]


class DDPG(paper.DDPG):
    """The paper's script has all four networks normalise by the batch in an update: here some are switched back."""

    def critic_loss(self, batch: paper.Batch):
        for target in self.target_actor, self.target_qf:
            target.train(self.args.target_statistics == "batch")
        self.qf.train()
        return super().critic_loss(batch)

    def actor_loss(self, obs):
        self.qf.train(self.args.actor_loss_statistics == "batch")
        return super().actor_loss(obs)

    @torch.no_grad()
    def update_targets(self):
        super().update_targets()
        if self.args.target_statistics != "batch":
            weight = 1.0 if self.args.target_statistics == "copied" else self.args.tau
            online = running_averages(self.actor, self.qf)
            torch._foreach_lerp_(running_averages(self.target_actor, self.target_qf), online, weight)


if __name__ == "__main__":
    paper.SCRIPT, paper.__file__, paper.Args, paper.DDPG = SCRIPT, __file__, Args, DDPG
    sys.stdout.reconfigure(line_buffering=True)  # in a log file too
    paper.main(paper.parse_args())
