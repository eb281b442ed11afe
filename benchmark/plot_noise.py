"""A figure of the exploration noises: how they look, how far they reach, and how long they remember.

    python benchmark/plot_noise.py

Gaussian noise of 0.1, and the paper's Ornstein-Uhlenbeck process (theta 0.15, sigma 0.2) at two time steps, since the
paper states none. With dt = 0.01, as in several libraries, it is nearly constant over an episode and reaches its
stationary spread only after a thousand steps. Both are the tuned script's own classes, in units of half the
action range.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ddpg_continuous_action import GaussianNoise, OrnsteinUhlenbeckNoise

PROCESSES = 2_000  # simulated side by side
STEPS = 1_000  # shown
LAGS = np.unique([0, *np.geomspace(1, STEPS, 60).astype(int)])  # steps, of the autocorrelation
SETTLED = 4_000  # steps after which the slowest process, which forgets in 666, is stationary


@dataclass
class Args:
    out: Path = Path(__file__).resolve().parent / "results" / "noise.png"
    """the figure"""


def main(args: Args):
    torch.manual_seed(1)
    ones = torch.ones(PROCESSES)
    noises = {
        "Gaussian, standard deviation 0.1": (GaussianNoise(0.1 * ones), "#009E73"),
        "Ornstein-Uhlenbeck, sigma 0.2, dt = 1": (OrnsteinUhlenbeckNoise(ones, 0.15, 0.2, 1.0), "#0072B2"),
        "Ornstein-Uhlenbeck, sigma 0.2, dt = 0.01": (OrnsteinUhlenbeckNoise(ones, 0.15, 0.2, 0.01), "#D55E00"),
    }
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8})
    figure, (paths, reach, memory) = plt.subplots(1, 3, figsize=(9.3, 2.8), layout="constrained")
    for label, (noise, color) in noises.items():
        x = torch.stack([noise.sample().clone() for _ in range(SETTLED + 2 * STEPS)])  # (steps, processes)
        late = x[SETTLED:]
        paths.plot(x[:200, 0], color=color, linewidth=1.2, label=label)
        reach.plot(range(1, STEPS + 1), x[:STEPS].std(1), color=color)
        products = [(late[:STEPS] * late[lag : lag + STEPS]).mean() for lag in LAGS]
        memory.plot(LAGS, torch.stack(products) / products[0], color=color)
    for dt, label in (1.0, "theory"), (0.01, None):
        memory.plot(LAGS, (1 - 0.15 * dt) ** LAGS, color="black", linewidth=0.8, linestyle=":", label=label)
    paths.set(title="one episode", xlabel="step of the episode", ylabel="noise")
    reach.set(title="spread over episodes", xlabel="step of the episode", ylabel="standard deviation", xscale="log")
    memory.set(title="autocorrelation, settled", xlabel="lag, steps", ylabel="autocorrelation")
    memory.set_xscale("symlog", linthresh=1)  # shows lag 0 too
    memory.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    reach.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=200)


if __name__ == "__main__":
    main(tyro.cli(Args))
