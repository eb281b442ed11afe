"""Tables and learning curves of a folder of runs.

    python benchmark/report.py runs/ddpg_continuous_action

writes into runs/ddpg_continuous_action/report: results.md; results.csv, one row per run, not rounded; summary.csv and
summary.tex, with 95 % intervals; learning_curves and q_estimates as .png and, for papers, .pdf. With --export
benchmark/results/NAME it also copies the runs' raw data there, which is small enough to commit, and

    python benchmark/report.py --pages README.md RESULTS.md

regenerates the pages from the committed data: what stands between <!-- results:NAME:begin FLAGS --> and
<!-- results:NAME:end -->. FLAGS are flags of this command, --show and the folders of the runs among them, in which *, ?
and [...] are as in the shell; the folder is benchmark/results/NAME unless they name others.

Runs are shown side by side under the flags in which they differ. An incomplete run, a broken one and the second of two
with the same flags and seed (but see --pool) are named on stderr and left out.
"""

import filecmp
import functools
import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action
import ddpg_paper_faithful
from ddpg_continuous_action import exit_unless, save

plt.switch_backend("Agg")

FINAL_EVALUATIONS = 10  # a final return is the mean of the last ten after learning started, as in result.json
TRAINING_EPISODES = 100
MOST_CURVES = 6  # that can be told apart in one panel
Q_COLUMNS = ["q_estimate", "discounted_return"]
ROW = ["environment", "variant", "steps"]  # what the runs in one row of a table share
BASELINES = pd.read_csv(Path(__file__).with_name("baselines.csv"))
PUBLISHED = pd.read_csv(Path(__file__).with_name("published_returns.csv"))
# The best published under our own protocol: noise-free evaluations at the end of training, not their maximum
COMPARABLE = PUBLISHED["statistic"].str.contains("noise-free") & ~PUBLISHED["statistic"].str.contains("maximum")
BEST = PUBLISHED[COMPARABLE].sort_values("mean").drop_duplicates(["env", "timesteps"], keep="last")
BEST = BEST.set_index(["env", "timesteps"])
# Flags that change neither the algorithm nor the protocol: runs that differ in nothing else share a row
NOT_A_VARIANT = (
    "exp_name env_id seed run_name resume evaluate total_timesteps num_threads cuda cudagraphs compile matmul "
    "torch_deterministic track wandb_project_name wandb_entity save_model checkpoint_interval keep_checkpoint "
    "capture_video final_eval_episodes max_eval_steps"
).split()


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders that hold runs, at any depth (with --show file: Markdown files)"""
    out: Path | None = None
    """folder for the tables and figures; by default report/ in the first folder of runs"""
    export: Path | None = None
    """copy the runs' raw data here, without their models and logs; runs that are there already stay"""
    pages: tuple[Path, ...] = ()
    """regenerate the sections of these pages instead, from committed data"""
    show: Literal["all", "table", "curves", "variants", "best", "published", "file"] = "all"
    """in a page's section. all: table and figures; table and curves: one of them alone; variants: a row a task, a
    column a variant; best: a row a task, the default and the recommended variant beside the best published return of
    the same protocol and number of steps; published: all published returns; file: files, up to <!-- more -->"""
    env_ids: tuple[str, ...] = ()
    """show only these environments, in this order"""
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """show only these, named as in the tables and in this order: --variant=default --variant="--n-step 3" """
    recommended: tuple[str, ...] = ()
    """with --show best, the variant for an environment, as in "Hopper-v5 --n-step 3"; for others it is the default"""
    up_to: tuple[float, ...] = (math.inf,)
    """leave out evaluations after this step, to compare runs of different lengths; of several, one after the other"""
    pool: bool = False
    """keep runs of the same flags and seed whose returns differ, as on two machines"""
    solved_above: float = math.inf
    """count the seeds that solve the task: those with an evaluation above this return"""
    training_return: bool = False
    """show the training return, with exploration noise, over the last 100 episodes"""


# Reading runs


def read_steps(path: Path) -> pd.DataFrame:
    """A CSV file of numbers, by their global_step."""
    frame = pd.read_csv(path, index_col="global_step").astype(float)
    if frame.empty or not np.isfinite(frame.to_numpy()).all():
        raise ValueError(f"{path.name} has no rows, or a broken one")
    return frame


def read_log(path: Path) -> tuple[pd.DataFrame, float]:
    """The Q estimates, the share of saturated actions and the training return from a TensorBoard log."""
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()

    def scalars(tag):
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        return pd.Series({event.step: event.value for event in events}, dtype=float).sort_index()

    last = scalars("charts/episodic_return").tail(TRAINING_EPISODES)
    training_return = last.mean() if len(last) == TRAINING_EPISODES else math.nan
    by_step = {name: scalars(f"eval/{name}") for name in Q_COLUMNS}
    return pd.DataFrame(by_step | {"saturated_actions": scalars("charts/saturated_actions")}), training_return


def read_run(path: Path, args: Args, up_to: float) -> dict:
    """The run's row of results.csv, its evaluations by step, and its flags."""
    files = path / "args.json", path / "result.json"
    record, result = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    # Older runs have no defaults of their own: those of the peers, SB3's DDPG and JAX's, are the tuned script's
    script = ddpg_paper_faithful if "critic_lr" in record["args"] else ddpg_continuous_action
    defaults = asdict(script.Args()) | record.get("defaults", {})
    flags = defaults | record["args"]  # older runs lack some
    if flags.get("batch_norm") == "none":  # then its momentum, whatever it was, is no difference
        flags["batch_norm_momentum"] = defaults["batch_norm_momentum"]
    if (path / "q_estimates.csv").exists():  # of an exported run, which has no log
        logged, training_return = read_steps(path / "q_estimates.csv").assign(saturated_actions=math.nan), math.nan
        if (path / "saturated_actions.csv").exists():
            logged["saturated_actions"] = read_steps(path / "saturated_actions.csv")["saturated_actions"]
        if (path / "training_return.csv").exists():
            training_return = pd.read_csv(path / "training_return.csv")["mean"].iloc[0]
    else:
        logged, training_return = read_log(path)
    evaluations = read_steps(path / "eval.csv").join(logged)
    evaluations = evaluations[evaluations.index <= up_to]
    learned = evaluations[evaluations.index > flags["learning_starts"]]
    if learned.empty:
        raise ValueError(f"no evaluations after learning started and up to step {up_to:,.0f}")
    returns, steps = evaluations["mean"], int(evaluations.index[-1])
    last = learned["mean"].tail(FINAL_EVALUATIONS)
    q_error = (learned["q_estimate"] - learned["discounted_return"]).dropna()
    if steps != result["global_step"]:  # what was measured at the end, or over the whole run, says nothing of a part
        result, training_return = {}, math.nan
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("gymnasium", "mujoco", "python", "torch"))
    device = record["hardware"]["gpu"] or f"CPU, {record['hardware']['threads']} thread(s) per run"
    return {
        "environment": flags["env_id"],
        "variant": "default",  # until the other runs are known
        "steps": steps,
        "seed": flags["seed"],
        "final_return": last.mean(),
        "lowest_evaluation": last.min(),
        "highest_evaluation": last.max(),
        "final_evaluation": (result.get("final_eval") or {}).get("mean", math.nan),
        "q_minus_discounted_return": q_error.tail(FINAL_EVALUATIONS).mean(),
        "last_saturated_actions": learned["saturated_actions"].tail(FINAL_EVALUATIONS).mean(),
        "first_solved_at": returns.index[returns > args.solved_above].min(),  # NaN: never
        "training_return": training_return,
        **levels(flags, script.SCRIPT, returns),
        "steps_per_second": result.get("steps_per_second", math.nan),
        "hours": result.get("seconds", math.nan) / 3600,
        "measured_with": f"{versions}; {device}",
        "path": path,
        "evaluations": evaluations,
        "flags": flags,
        "defaults": defaults,
    }


def best_published(flags: dict, steps: int) -> dict:
    """The best published figure of the same task, one of Gymnasium's MuJoCo tasks as it comes, and after as many steps;
    {} if there is none."""
    task = re.fullmatch(r"(\w+)-v[45]", flags["env_id"])
    key = task and (task[1], steps)
    return BEST.loc[key].to_dict() if key in BEST.index and not json.loads(flags["env_kwargs"]) else {}


def levels(flags: dict, script: str, returns: pd.Series) -> dict[str, float]:
    """Returns to compare with, in the same environment; NaN where there is none."""
    same = (BASELINES["env_id"] == flags["env_id"]) & (not json.loads(flags["env_kwargs"]))
    means = BASELINES[same].set_index("policy")["mean"]
    untrained, random = means.get(f"untrained {script}", math.nan), means.get("random", math.nan)
    if flags.get("pixels"):  # acts at other time steps than those measured; its own first evaluation may do
        untrained, random = returns[returns.index <= flags["learning_starts"]].head(1).mean(), math.nan
    best = best_published(flags, returns.index[-1]).get("mean", math.nan)
    return {"untrained": untrained, "random": random, "best published": best}


def read_runs(args: Args) -> pd.DataFrame:
    """One row per complete run (and number of steps in --up-to), in the order in which they are shown.

    A line on stderr for each run left out."""
    runs = {}
    for path in sorted({file.parent for folder in args.runs for file in folder.rglob("args.json")}):
        if not (path / "result.json").exists():
            print(f"warning: {path}: incomplete (it has no result.json) and left out", file=sys.stderr)
            continue
        try:
            for run in [read_run(path, args, up_to) for up_to in args.up_to]:
                runs[path, run["steps"]] = run
        except (OSError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
            print(f"warning: {path}: cannot be read and is left out ({problem})", file=sys.stderr)
    env_ids = args.env_ids or sorted({run["environment"] for run in runs.values()})
    runs = [run for run in runs.values() if run["environment"] in env_ids]
    exit_unless(runs, f"no complete runs in {', '.join(map(str, args.runs)) or 'no folder: name one'}")
    set_variants(runs)
    there = sorted({run["variant"] for run in runs}, key=lambda variant: (variant != "default", variant))
    variants = args.variant or there
    unknown = ", ".join(sorted(set(variants) - set(there)))
    exit_unless(not unknown, f"no run is of the variant {unknown}; there are {', '.join(there)}")
    runs = [run for run in runs if run["variant"] in variants]

    def place(run):
        return env_ids.index(run["environment"]), variants.index(run["variant"]), run["steps"], run["seed"]

    runs = pd.DataFrame(sorted(runs, key=place))
    same = runs[[*ROW, "seed"]]
    if args.pool:
        same = same.assign(returns=[tuple(evaluations["mean"]) for evaluations in runs["evaluations"]])
    for path in runs["path"][same.duplicated()]:
        print(f"warning: {path}: left out, another run has its flags and seed (see --pool)", file=sys.stderr)
    return runs[~same.duplicated()]


def set_variants(runs: list[dict]):
    """Call each run by the flags in which the runs of its script differ, as far as they are not the defaults.

    The name of the script comes first, but not that of the one beside its peers."""
    exp_names = {run["flags"]["exp_name"] for run in runs}
    ours = exp_names & {ddpg_continuous_action.SCRIPT, ddpg_paper_faithful.SCRIPT}
    for run in runs:
        exp_name = run["flags"]["exp_name"]
        same_script = [other["flags"] for other in runs if other["flags"]["exp_name"] == exp_name]
        words = [exp_name] if len(exp_names) > 1 and ours != {exp_name} else []
        for flag, value in run["flags"].items():
            varied = flag not in NOT_A_VARIANT and any(flags.get(flag) != value for flags in same_script)
            if varied and value != run["defaults"].get(flag):
                words.append(as_typed(flag.replace("_", "-"), value))
        run["variant"] = " ".join(words) or "default"


def as_typed(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, float):  # 0.2 and 1e-3
        value = (
            f"{value:g}"
            if abs(value) >= 0.01 or not value
            else np.format_float_scientific(value, trim="-", exp_digits=1)
        )
    return f"--{name} {value}"


# Statistics


def margin(*samples: tuple[float, int]) -> float:
    """Half of the 95 % interval of a mean (Student's) or of the difference of two (Welch's), from (std, count)."""
    std, count = np.array(samples).T
    variance = std**2 / count
    if not variance.any():
        return 0.0
    degrees = variance.sum() ** 2 / (variance**2 / (count - 1)).sum()
    return stats.t.ppf(0.975, degrees) * math.sqrt(variance.sum())


def verdict(returns: pd.Series, best: dict) -> str:
    """Whether final returns are higher or lower than a published figure, which may lack a spread; and by how much."""
    if len(returns) == 1:
        return ""
    samples = [(returns.std(), len(returns)), (best["std"], best["seeds"])]
    half = margin(*[(std, count) for std, count in samples if std >= 0 and count > 1])
    difference = returns.mean() - best["mean"]
    word = "level" if abs(difference) <= half else "higher" if difference > 0 else "lower"
    return f"{word} ({mean_and_std(difference, half)})"


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and, from five runs on, interquartile means (IQM), each with the ends of its 95 % interval: Student's, and
    that of a percentile bootstrap."""
    rows = []
    for key, returns in runs.groupby(ROW, sort=False)["final_return"]:
        count, mean = len(returns), returns.mean()
        half = margin((returns.std(), count)) if count > 1 else math.nan
        row = dict(zip(ROW, key, strict=True)) | {"runs": count}
        row |= {"mean": mean, "mean low": mean - half, "mean high": mean + half}
        if count >= 5:
            middle = functools.partial(stats.trim_mean, proportiontocut=0.25)
            ends = stats.bootstrap([returns], middle, method="percentile", rng=1).confidence_interval
            row |= {"IQM": middle(returns), "IQM low": ends.low, "IQM high": ends.high}
        rows.append(row)
    return pd.DataFrame(rows)


# Tables


def number(value: float, digits=1) -> str:
    return "" if math.isnan(value) else f"{value:z,.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """One decimal below ten, none above."""
    return number(value, 1 if abs(value) < 10 else 0)


def mean_and_std(mean: float, std: float) -> str:
    digits = 0 if max(abs(mean), std) >= 1000 else 1
    return number(mean, digits) if math.isnan(std) else f"{number(mean, digits)} ± {number(std, digits)}"


def over_seeds(values: pd.Series) -> str:
    """Mean and sample standard deviation; nothing where a seed is missing."""
    return mean_and_std(values.mean(skipna=False), values.std(skipna=False))


def counted(seeds: pd.Series) -> str:
    different = f"{seeds.nunique()}"
    return different if seeds.is_unique else f"{len(seeds)} runs of {different}"


def table(frame: pd.DataFrame) -> str:
    """In Markdown, without the columns that are empty, and without the variants where there is only the default."""
    frame = frame.map(lambda cell: f"{cell:,}" if isinstance(cell, int | np.integer) else cell).fillna("")
    frame = frame[[name for name in frame if set(frame[name]) not in ({""}, {"default"})]]
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results_table(runs: pd.DataFrame, args: Args) -> str:
    """One row per environment and variant, and a line on what it was measured with."""
    training_return = f"training return, last {TRAINING_EPISODES} episodes"
    columns = {
        "seeds": ("seed", counted),
        "final return": ("final_return", lambda returns: f"**{over_seeds(returns)}**"),
        "each seed": ("final_return", lambda returns: ", ".join(map(short, returns))),
        f"lowest of last {FINAL_EVALUATIONS}": ("lowest_evaluation", lambda lowest: short(lowest.min())),
        f"highest of last {FINAL_EVALUATIONS}": ("highest_evaluation", lambda highest: short(highest.max())),
        "final evaluation": ("final_evaluation", over_seeds),
        "solved (seeds)": ("first_solved_at", lambda steps: f"{steps.count()} of {len(steps)}"),
        "first solved at step (median)": ("first_solved_at", lambda steps: number(steps.median(), 0)),
        training_return: ("training_return", over_seeds),
        "Q − discounted return": ("q_minus_discounted_return", over_seeds),
        "saturated actions (%)": ("last_saturated_actions", lambda shares: over_seeds(100 * shares)),
        "untrained": ("untrained", lambda returns: number(returns.mean())),
        "random": ("random", lambda returns: number(returns.mean())),
        "steps/s": ("steps_per_second", lambda speeds: number(speeds.median(skipna=False), 0)),
        "hours": ("hours", lambda hours: number(hours.median(skipna=False), 2)),
    }
    if math.isinf(args.solved_above):
        del columns["solved (seeds)"]
    if not args.training_return:
        del columns[training_return]
    alike = runs.groupby(ROW)["measured_with"].transform("nunique") == 1  # else a speed is of neither hardware
    speeds = runs[["steps_per_second", "hours"]].where(alike)
    rows = runs.assign(**speeds).groupby(ROW, sort=False).agg(**columns).reset_index()
    return f"{table(rows)}\n{'; '.join(sorted(set(runs['measured_with'])))}.\n"


def final_returns(runs: pd.DataFrame) -> pd.Series:
    """By environment, steps and variant; with the number of seeds where it is not the usual one."""
    groups = runs.groupby(["environment", "steps", "variant"], sort=False)
    returns, seeds = groups["final_return"].agg(over_seeds), groups["seed"].agg(counted)
    noted = (" (" + seeds + " seeds)").replace(" (1 seeds)", " (1 seed)")
    return returns + noted.mask((seeds == seeds.mode()[0]) & seeds.str.isdigit(), "")


def variants_table(runs: pd.DataFrame, args: Args) -> str:
    """One row per environment and number of steps, one column per variant."""
    rows, variants = final_returns(runs).unstack().sort_index(), args.variant or runs["variant"].unique()
    return table(rows.loc[list(runs["environment"].unique()), list(variants)].reset_index())


def best_table(runs: pd.DataFrame, args: Args) -> str:
    """One row per environment: what is recommended there after each number of steps, and the default at the end."""
    recommended = dict(text.partition(" ")[::2] for text in args.recommended)
    unknown = ", ".join(sorted(set(recommended) - set(runs["environment"])))
    exit_unless(not unknown, f"something is recommended for {unknown}, of which there is no run")
    returns, rows = final_returns(runs), []
    for env_id, of_task in runs.groupby("environment", sort=False):
        variant = recommended.get(env_id, "default")
        ours = of_task[of_task["variant"] == variant]
        exit_unless(len(ours), f"no run on {env_id} is of the recommended variant {variant}")
        steps = ours["steps"].max()
        row = {"environment": env_id, "recommended": f"`{variant}`" if variant != "default" else variant}
        row |= {"untrained": number(ours["untrained"].mean())}
        row |= {f"default, {steps:,} steps": returns.get((env_id, steps, "default"))}
        row |= {f"recommended, {each:,} steps": returns[env_id, each, variant] for each in sorted(set(ours["steps"]))}
        if best := best_published(ours["flags"].iloc[0], steps):
            row |= {"best published": mean_and_std(best["mean"], best["std"])}
            row |= {"by": f"{best['source'].split(',')[0]}, {best['env_version']}, {best['seeds']} seeds"}
            row |= {"verdict": verdict(ours[ours["steps"] == steps].groupby("seed")["final_return"].mean(), best)}
        rows.append(row)
    return table(pd.DataFrame(rows, dtype=object))


def latex(frame: pd.DataFrame) -> str:
    text = frame.to_latex(index=False, escape=True, na_rep="", float_format="{:z,.1f}".format)
    return re.sub(r"(?<= )-(?=\d)", "$-$", text).replace("--", "-{}-")  # a minus, and no dash where a flag begins


def published_table() -> str:
    """One row per implementation and kind of figure, one column per environment."""
    cells = [f"{mean_and_std(row.mean, row.std)} ({row.env_version})" for row in PUBLISHED.itertuples(index=False)]
    keys = ["source", "implementation", "statistic", "seeds", "timesteps"]
    rows = PUBLISHED.assign(cell=cells).pivot_table("cell", keys, "env", aggfunc="first", sort=False)
    return table(rows.reset_index().rename(columns={"source": "published by", "statistic": "what the figure is"}))


# Figures

LEVELS = {"untrained": (1, 1), "random": (1, 4), "best published": (4, 1, 1, 1)}  # dashes and gaps, in line widths


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """All evaluations, one per row, and what is known of their runs."""
    evaluations = pd.concat(runs["evaluations"].to_dict(), names=["run", "steps"]).reset_index("steps")
    return evaluations.join(runs.drop(columns=["steps", "evaluations"]))


def by_panel(runs: pd.DataFrame) -> pd.DataFrame:
    """With a panel for each environment and variant, in the order of these panels."""
    most_first = -runs.groupby("environment")["variant"].transform("nunique")  # so that full rows are above short ones
    panel = runs["environment"] + "\n" + runs["variant"].str.replace(" --", "\n--")
    runs = runs.assign(panel=panel, most_first=most_first, nth=runs["variant"].factorize()[0])
    return runs.sort_values(["most_first", "nth"])


def draw_returns(runs: pd.DataFrame, folder: Path, formats=("png",)):
    ends = runs.melt(["environment", "steps"], list(LEVELS), "variant", "mean").dropna()
    returns = pd.concat([curves(runs), ends.assign(steps=0), ends]).rename(columns={"mean": "return"})
    variants, panel = sorted(runs["variant"].unique(), key=lambda variant: variant != "default"), "environment"
    colors = sns.color_palette("colorblind", len(variants))
    if len(variants) > MOST_CURVES:  # then a panel each, with the default (or the first) beside it in grey
        variants, panel, colors = [variants[0], "as in the title"], "panel", ["0.6", colors[0]]
        panels = by_panel(runs)[["environment", "variant", "panel"]].drop_duplicates()
        beside = returns[returns["variant"].isin([variants[0], *LEVELS])]
        beside = panels.drop(columns="variant").merge(beside, on="environment")
        returns = pd.concat([beside, panels.merge(returns).assign(variant=variants[1])])
    look = {
        "palette": dict(zip(variants, colors, strict=True)) | dict.fromkeys(LEVELS, "black"),
        "dashes": dict.fromkeys(variants, "") | LEVELS,
        "sizes": dict.fromkeys(variants, 1.3) | dict.fromkeys(LEVELS, 0.8),
    }
    curve = dict.fromkeys(["hue", "style", "size"], "variant")
    draw(returns, folder / "learning_curves", formats, y="return", col=panel, **curve, **look)


def draw_q_estimates(runs: pd.DataFrame, folder: Path, formats=("png",)):
    if runs["q_minus_discounted_return"].isna().all():
        return  # the logs are gone
    names = {"discounted_return": "return that followed", "q_estimate": "critic's estimate"}
    q = curves(by_panel(runs)).rename(columns=names)
    q = q.melt([*ROW, "panel"], list(names.values()), "curve", "discounted return")
    curve = dict.fromkeys(["hue", "style"], "curve")
    draw(q, folder / "q_estimates", formats, y="discounted return", col="panel", palette="colorblind", **curve)


@plt.rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8, "pdf.fonttype": 42})  # 42: as journals ask
def draw(data: pd.DataFrame, path: Path, formats, **columns_and_look):
    """Means over seeds, each in a band from the lowest to the highest of them (of those that ran for so long)."""
    columns = 4 if data["environment"].nunique() == 2 else 3  # so that an environment's panels stand in columns
    panels = data[columns_and_look["col"]].nunique()
    width = 2 if panels == 4 else min(columns, panels)  # two by two, not three and one
    layout = {"col_wrap": width, "height": 2.2, "aspect": 1.3 if width > 1 else 2}
    free = {"sharex": False, "sharey": False}
    band = {"errorbar": ("pi", 100), "err_kws": {"linewidth": 0}}
    grid = sns.relplot(data, x="steps", kind="line", facet_kws=free, **layout, **band, **columns_and_look)
    grid.set_titles("{col_name}")
    grid.legend.set_title("")
    if max(len(label.get_text()) for label in grid.legend.texts) > 40:  # beside the panels, it would shrink them
        sns.move_legend(grid, "upper left", bbox_to_anchor=(0.05, 0))
    for axis in grid.axes.flat:
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k")
        axis.yaxis.set_major_formatter("{x:,g}")
    for name in formats:
        grid.savefig(path.with_suffix(f".{name}"), dpi=150)
    plt.close(grid.figure)


# Output


def export(runs: pd.DataFrame, folder: Path):
    """Copy what is small. Runs that are there already stay, so that a sweep can be exported as it grows."""
    for run in runs.itertuples():
        target = folder / run.path.name
        if not (target / "result.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            q_estimates = run.evaluations[Q_COLUMNS].dropna()
            if len(q_estimates):  # none: the run's log is gone
                q_estimates.to_csv(target / "q_estimates.csv", float_format="%.6g")
            saturated = run.evaluations["saturated_actions"].dropna()
            if len(saturated):
                saturated.to_csv(target / "saturated_actions.csv", float_format="%.6g")
            training_return = f"episodes,mean\n{TRAINING_EPISODES},{run.training_return}\n"
            (target / "training_return.csv").write_text(training_return, encoding="utf-8")
            for name in ("args.json", "eval.csv", "result.json"):
                shutil.copyfile(run.path / name, target / name)
        _, different, _ = filecmp.cmpfiles(run.path, target, ["args.json", "eval.csv"], shallow=False)
        exit_unless(not different, f"{target} holds another run of that name: remove one of them first")


MORE = "<!-- more -->"  # with --show file, what follows stays there
SECTION = re.compile(r"(<!-- results:([\w-]+):begin(.*?)-->\n).*?(<!-- results:\2:end -->)", re.DOTALL)


def section(page: Path, name: str, flags: str, figures: Path) -> str:
    """The text of a page's section; its figures are drawn into figures/NAME."""
    args = tyro.cli(Args, args=shlex.split(flags))
    if args.show == "published":
        return published_table()
    paths = []
    for pattern in args.runs or (f"benchmark/results/{name}",):
        found = sorted(page.parent.glob(str(pattern)))
        exit_unless(found, f"{page.name}, section {name}: there is nothing at {pattern}")
        paths += found
    args.runs = tuple(paths)
    if args.show == "file":
        return "".join(path.read_text(encoding="utf-8").partition(MORE)[0] for path in args.runs)
    runs = read_runs(args)
    tables = {"variants": variants_table, "best": best_table, "table": results_table}
    if args.show in tables:
        return tables[args.show](runs, args)
    (figures / name).mkdir(parents=True, exist_ok=True)
    draw_returns(runs, figures / name)
    text = f"![Learning curves](benchmark/results/{name}/learning_curves.png)\n"
    if args.show == "all":
        draw_q_estimates(runs, figures / name)
        text = f"{results_table(runs, args)}\n{text}\n"
        text += f"![Q estimates and discounted returns](benchmark/results/{name}/q_estimates.png)\n"
    return text


def rendered(page: Path, figures: Path) -> str:
    """The page with its sections made from the committed data."""
    text = page.read_text(encoding="utf-8")
    return SECTION.sub(lambda match: match[1] + section(page, match[2], match[3], figures) + match[4], text)


def main(args: Args):
    for page in args.pages:
        save(page, rendered(page, page.parent / "benchmark/results"))
    if args.pages:
        return
    runs = read_runs(args)
    if args.export:
        export(runs, args.export)
    out = args.out or args.runs[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    draw_returns(runs, out, ("png", "pdf"))
    draw_q_estimates(runs, out, ("png", "pdf"))
    runs.drop(columns=["evaluations", "flags", "defaults"]).to_csv(out / "results.csv", index=False)
    text = results_table(runs, args)
    save(out / "results.md", text)
    summary(runs).to_csv(out / "summary.csv", index=False)
    save(out / "summary.tex", latex(summary(runs)))
    print(f"{text}\nThe figures are in {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the locale lacks a minus, the files have it
    main(tyro.cli(Args))
