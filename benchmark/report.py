"""Tables and learning curves of a folder of runs.

    python benchmark/report.py runs/ddpg_continuous_action

writes results.md, results.csv (one row per run, not rounded), learning_curves.png and q_estimates.png into
runs/ddpg_continuous_action/report. With --export benchmark/results/NAME it also copies the runs' raw data there, which
is small enough to commit, and

    python benchmark/report.py --pages README.md RESULTS.md

regenerates the pages from the committed data: what stands between <!-- results:NAME:begin FLAGS --> and
<!-- results:NAME:end -->. FLAGS are flags of this command, --show and the folders of the runs among them; the folder is
benchmark/results/NAME unless they name others.

Runs are shown side by side under the flags in which they differ. An incomplete run, a broken one and the second of two
equal ones are named on stderr and left out.
"""

import filecmp
import importlib
import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7})

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
FINAL_EVALUATIONS = 10  # a final return is the mean of the last ten, as in most of the published tables
TRAINING_EPISODES = 100
Q_COLUMNS = ["q_estimate", "discounted_return"]
EXPORTED = "args.json", "eval.csv", "result.json", "q_estimates.csv", "training_return.csv"
BASELINES, PUBLISHED = (pd.read_csv(HERE / name) for name in ("baselines.csv", "published_returns.csv"))
# The best published under our own protocol: noise-free evaluations at the end of training, not their maximum
COMPARABLE = PUBLISHED["statistic"].str.contains("noise-free") & ~PUBLISHED["statistic"].str.contains("maximum")
BEST = PUBLISHED[COMPARABLE].sort_values("mean").drop_duplicates("env", keep="last").set_index("env")
# Flags that change neither the algorithm nor the protocol: runs that differ in nothing else share a row
NOT_A_VARIANT = (
    "exp_name env_id seed run_name resume evaluate total_timesteps num_threads cuda cudagraphs compile matmul "
    "torch_deterministic track wandb_project_name wandb_entity save_model checkpoint_interval keep_checkpoint "
    "capture_video final_eval_episodes max_eval_steps"
).split()


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders that hold runs, at any depth (with --show file: one Markdown or CSV file)"""
    out: Path | None = None
    """folder for the tables and figures; by default report/ in the first folder of runs"""
    export: Path | None = None
    """copy the runs' raw data here, without their models and logs; runs that are there already stay"""
    pages: tuple[Path, ...] = ()
    """regenerate the sections of these pages instead, from committed data"""
    show: Literal["all", "curves", "best", "published", "file"] = "all"
    """in a page's section: table and figures; the learning curves alone; the final returns beside the best published
    ones of the same protocol; the table of all published returns; the file itself"""
    env_ids: tuple[str, ...] = ()
    """show only these environments, in this order"""
    up_to: float = math.inf
    """leave out evaluations after this step, to compare runs of different lengths"""
    solved_above: float | None = None
    """count the seeds that solve the task: those with an evaluation above this return"""
    published: bool = True
    """draw the best published return of the same protocol as a line among the learning curves"""
    training_return: bool = False
    """show the training return, with exploration noise, over the last 100 episodes"""


@dataclass
class Run:
    path: Path
    env_id: str
    seed: int
    args: dict  # all flags, with today's defaults for those that are newer than the run
    versions: dict
    hardware: dict
    result: dict | None = None  # of a complete run only, like all that follows
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)  # eval.csv, by step
    q_estimates: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=Q_COLUMNS, dtype=float))  # by step
    training_return: float = math.nan
    label: str = ""

    @property
    def row(self) -> tuple[str, str, int]:
        """What the runs in one row of a table share."""
        return self.env_id, self.label, int(self.evaluations.index[-1])


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# Reading runs


def script_of(flags: dict) -> str:
    """The script whose flags these are; the peer has the tuned script's."""
    return "ddpg_paper_faithful" if "critic_lr" in flags else "ddpg_continuous_action"


def as_today(flags: dict) -> dict:
    if isinstance(flags.get("batch_norm"), bool):  # what --batch-norm and --no-batch-norm set in older runs
        return flags | {"batch_norm": "both" if flags["batch_norm"] else "none"}
    return flags


def default_flags(script: str) -> dict:
    return as_today(vars(importlib.import_module(script).Args()))


def read_steps(path: Path) -> pd.DataFrame:
    """A CSV file of numbers, by their global_step."""
    frame = pd.read_csv(path).astype(float).set_index("global_step")
    if frame.empty or not np.isfinite(frame.to_numpy()).all():
        raise ValueError(f"{path.name} has no rows, or a broken one")
    return frame


def read_log(path: Path) -> tuple[pd.DataFrame, float]:
    """The Q estimates and the training return from a TensorBoard log."""
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()

    def scalars(tag):
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        return pd.Series({event.step: event.value for event in events}, dtype=float)

    q_estimates = pd.DataFrame({column: scalars(f"eval/{column}") for column in Q_COLUMNS}).dropna()
    last = scalars("charts/episodic_return").tail(TRAINING_EPISODES)
    return q_estimates, last.mean() if len(last) == TRAINING_EPISODES else math.nan


def read_run(path: Path, up_to: float) -> Run:
    record = json.loads((path / "args.json").read_text())
    flags = default_flags(script_of(record["args"])) | as_today(record["args"])
    run = Run(path, flags["env_id"], record["args"]["seed"], flags, record["versions"], record["hardware"])
    if not (path / "result.json").exists():
        return run
    result = json.loads((path / "result.json").read_text())
    run.result = {name: result[name] for name in ("global_step", "seconds", "steps_per_second")}
    run.result["final_evaluation"] = (result.get("final_eval") or {"mean": math.nan})["mean"]
    run.evaluations = read_steps(path / "eval.csv")
    if (path / "q_estimates.csv").exists():
        run.q_estimates = read_steps(path / "q_estimates.csv")
        if (path / "training_return.csv").exists():
            run.training_return = float(pd.read_csv(path / "training_return.csv")["mean"].iloc[0])
    else:
        run.q_estimates, run.training_return = read_log(path)
    run.evaluations, run.q_estimates = (frame[frame.index <= up_to] for frame in (run.evaluations, run.q_estimates))
    if run.evaluations.empty:
        raise ValueError(f"no evaluations up to step {up_to:,.0f}")
    return run


def read_runs(args: Args) -> tuple[list[Run], list[Run], list[str]]:
    """The complete runs, in the order in which they are shown, and the incomplete ones, both labelled; and a line for
    each thing that is wrong."""
    found, problems = [], []
    for path in sorted({file.parent for folder in args.runs for file in folder.rglob("args.json")}):
        try:
            run = read_run(path, args.up_to)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path}: cannot be read and is left out ({type(error).__name__}: {error})")
        else:
            if not args.env_ids or run.env_id in args.env_ids:
                found.append(run)
    set_labels(found)
    incomplete = [run for run in found if run.result is None]
    problems += [f"{run.path}: incomplete (it has no result.json) and left out" for run in incomplete]
    complete = {}
    for run in found:
        if run.result is not None:
            first = complete.setdefault((*run.row, run.seed), run)
            if first is not run:
                problems.append(f"{run.path}: left out, {first.path} is the same run")
    env_ids = args.env_ids or sorted({run.env_id for run in found})
    order = sorted(complete, key=lambda key: (env_ids.index(key[0]), key[1] != "default", key))
    return [complete[key] for key in order], incomplete, problems


def set_labels(runs: list[Run]):
    """Label each run by the flags in which the runs of its script differ, as far as they are not the defaults."""
    exp_names = {run.args["exp_name"] for run in runs}
    for exp_name in exp_names:
        same = [run for run in runs if run.args["exp_name"] == exp_name]
        flags = dict.fromkeys(flag for run in same for flag in run.args if flag not in NOT_A_VARIANT)
        varied = [flag for flag in flags if len({json.dumps(run.args.get(flag)) for run in same}) > 1]
        defaults = default_flags(script_of(same[0].args))
        for run in same:
            words = [exp_name] if len(exp_names) > 1 else []
            words += [as_typed(flag, run.args[flag]) for flag in varied if run.args.get(flag) != defaults.get(flag)]
            run.label = " ".join(words) or "default"


def as_typed(flag: str, value) -> str:
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


# Tables


def best_published(env_id: str) -> pd.Series | None:
    name = re.sub(r"-v\d+$", "", env_id)
    return BEST.loc[name] if name in BEST.index else None


def number(value: float, digits=1) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")


def mean_and_std(mean: float, std: float) -> str:
    return number(mean) if math.isnan(mean) or math.isnan(std) else f"{number(mean)} ± {number(std)}"


def over_seeds(values: pd.Series) -> str:
    """Mean and sample standard deviation; nothing where a seed is missing."""
    return mean_and_std(values.mean(skipna=False), values.std())


def table(frame: pd.DataFrame) -> str:
    """In Markdown, without the columns that are empty, and without the variants where there is only the default."""
    frame = frame.map(lambda cell: f"{cell:,}" if isinstance(cell, int | np.integer) else cell).fillna("")
    frame = frame[[name for name in frame if set(frame[name]) not in ({""}, {"default"})]]
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def baselines(run: Run) -> dict[str, float]:
    """Returns of policies that have learned nothing, in the environment of this run."""
    if run.args.get("pixels"):  # acts at other time steps than those measured; its own first evaluation may do
        first = run.evaluations.iloc[0]
        return {"untrained": first["mean"]} if first.name <= run.args["learning_starts"] else {}
    means = BASELINES[BASELINES["env_id"] == run.env_id].set_index("policy")["mean"]
    policies = {"untrained": f"untrained {script_of(run.args)}", "random": "random"}
    return {name: means[policy] for name, policy in policies.items() if policy in means}


SCORES = (
    "environment variant steps seed final_return final_evaluation q_minus_discounted_return first_solved_at "
    "training_return untrained random steps_per_second hours"
).split()


def scores(runs: list[Run], args: Args) -> pd.DataFrame:
    """One row per run, not rounded: what results.csv holds."""
    rows = []
    for run in runs:
        means, q = run.evaluations["mean"], run.q_estimates.tail(FINAL_EVALUATIONS)
        row = dict(zip(SCORES, (*run.row, run.seed), strict=False)) | baselines(run)
        row["final_return"] = means.tail(FINAL_EVALUATIONS).mean()
        row["q_minus_discounted_return"] = (q["q_estimate"] - q["discounted_return"]).mean()
        if args.solved_above is not None and (means > args.solved_above).any():
            row["first_solved_at"] = (means > args.solved_above).idxmax()
        if row["steps"] == run.result["global_step"]:  # what was measured at the end, or over the whole run
            row |= run.result | {"training_return": run.training_return, "hours": run.result["seconds"] / 3600}
        rows.append(row)
    return pd.DataFrame(rows, columns=SCORES)


def results_table(runs: list[Run], args: Args) -> str:
    """One row per environment and variant."""
    seeds = scores(runs, args).groupby(SCORES[:3], sort=False)
    columns = {
        "seeds": seeds.size(),
        "final return": seeds["final_return"].agg(lambda values: f"**{over_seeds(values)}**"),
        "each seed": seeds["final_return"].agg(lambda values: ", ".join(number(value, 0) for value in values)),
        "final evaluation": seeds["final_evaluation"].agg(over_seeds),
    }
    if args.solved_above is not None:
        columns["solved (seeds)"] = seeds["first_solved_at"].agg(lambda steps: f"{steps.count()} of {len(steps)}")
        columns["first solved at step (median)"] = seeds["first_solved_at"].median().map(lambda steps: number(steps, 0))
    if args.training_return:
        columns[f"training return, last {TRAINING_EPISODES} episodes"] = seeds["training_return"].agg(over_seeds)
    columns |= {
        "Q − discounted return": seeds["q_minus_discounted_return"].agg(over_seeds),
        "untrained": seeds["untrained"].mean().map(number),
        "random": seeds["random"].mean().map(number),
        "steps/s": seeds["steps_per_second"].median().map(lambda steps: number(steps, 0)),
        "hours": seeds["hours"].median().map(lambda hours: number(hours, 2)),
    }
    return table(pd.DataFrame(columns).reset_index())


def best_table(runs: list[Run], args: Args) -> str:
    """One row per environment and variant, beside the best published return of the same protocol."""
    rows = []
    for (env_id, label, steps), seeds in scores(runs, args).groupby(SCORES[:3], sort=False):
        row = {"environment": env_id, "variant": label, "ours": over_seeds(seeds["final_return"])}
        row |= {"steps": steps, "seeds": len(seeds), "best published": "none"}
        if (best := best_published(env_id)) is not None:
            row["best published"] = mean_and_std(best["mean"], best["std"])
            row["its steps"], row["its seeds"] = best["timesteps"], best["seeds"]
            row["by"] = f"{best['source'].split(',')[0]}, {best['implementation']}, {best['env_version']}"
            row["ours is"] = "**lower**" if seeds["final_return"].mean() < best["mean"] else "higher"
        rows.append(row)
    return table(pd.DataFrame(rows, dtype=object))


def results_markdown(runs: list[Run], incomplete: list[Run], args: Args) -> str:
    """The table, what it was measured with, and what it lacks."""
    versions = {f"{name} {run.versions[name]}" for run in runs for name in ("gymnasium", "mujoco", "torch", "python")}
    devices = {run.hardware["gpu"] or f"CPU, {run.hardware['threads']} thread(s) per run" for run in runs}
    text = f"{results_table(runs, args)}\n{', '.join(sorted(versions))}; {'; '.join(sorted(devices))}.\n"
    if incomplete:
        names = [f"{run.env_id} {run.label} seed {run.seed}" for run in incomplete]
        text += f"\nIncomplete, and not in the table: {', '.join(names)}.\n"
    return text


def published_table() -> str:
    """One row per implementation and kind of figure, one column per environment."""
    cells = [f"{mean_and_std(row.mean, row.std)} ({row.env_version})" for row in PUBLISHED.itertuples(index=False)]
    keys = ["source", "implementation", "statistic", "seeds", "timesteps"]
    rows = PUBLISHED.assign(cell=cells).pivot_table("cell", keys, "env", aggfunc="first", sort=False)
    return table(rows.reset_index().rename(columns={"source": "published by", "statistic": "what the figure is"}))


# Figures

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # told apart by all readers
LEVELS = {"untrained": ":", "random": (0, (1, 4)), "best published": "-."}  # line styles
FEW_VARIANTS = 4  # so many are shown with the estimate and the return as two lines; more with their difference


def panels(env_ids: list[str], ylabel: str):
    """A figure with one panel per environment, and the panels by environment."""
    columns = min(3, len(env_ids))
    rows = math.ceil(len(env_ids) / columns)
    size = max(3.1 * columns, 4.6), 2.4 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(env_ids) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis, env_id in zip(axes.flat, env_ids, strict=False):
        axis.set(title=env_id, xlabel="steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k")
        axis.yaxis.set_major_formatter("{x:,g}")
    return figure, dict(zip(env_ids, axes.flat, strict=False))


def save(figure, path: Path):
    """With one legend for all panels, below them."""
    legends = [axis.get_legend_handles_labels() for axis in figure.axes]
    handles = {name: handle for legend in legends for handle, name in zip(*legend, strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.055 * max(map(len, handles)))))  # inches
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(handles) / columns))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_band(axis, by_seed: list[pd.Series], **style):
    """The mean over seeds, in a band from the lowest to the highest of them."""
    values = pd.concat(by_seed, axis=1, join="inner")
    axis.plot(values.index, values.mean(axis=1), marker="." if len(values) == 1 else "", **style)
    band = values.index, values.min(axis=1), values.max(axis=1)
    axis.fill_between(*band, color=style["color"], alpha=0.15, linewidth=0)


def draw_figures(runs: list[Run], args: Args, folder: Path):
    env_ids = list(dict.fromkeys(run.env_id for run in runs))
    labels = sorted({run.label for run in runs}, key=lambda label: (label != "default", label))
    few = len(labels) <= FEW_VARIANTS
    returns_figure, returns_axes = panels(env_ids, "return")
    q_figure, q_axes = panels(env_ids, "discounted return" if few else "Q − discounted return")
    for env_id, label, steps in dict.fromkeys(run.row for run in runs):
        seeds, place = [run for run in runs if run.row == (env_id, label, steps)], labels.index(label)
        style = {"color": COLORS[place % len(COLORS)], "linestyle": "-" if place < len(COLORS) else "--"}
        draw_band(returns_axes[env_id], [run.evaluations["mean"] for run in seeds], label=label, **style)
        q = [run.q_estimates for run in seeds if len(run.q_estimates)]
        if q and few:
            draw_band(q_axes[env_id], [run["discounted_return"] for run in q], label=f"{label}: return", **style)
            style["linestyle"] = "--"
            draw_band(q_axes[env_id], [run["q_estimate"] for run in q], label=f"{label}: critic's estimate", **style)
        elif q:
            draw_band(q_axes[env_id], [run["q_estimate"] - run["discounted_return"] for run in q], label=label, **style)
    for env_id, axis in returns_axes.items():
        levels = baselines(next(run for run in runs if run.env_id == env_id))
        if args.published and (best := best_published(env_id)) is not None:
            levels["best published"] = best["mean"]
        for name, level in levels.items():
            axis.axhline(level, color="black", linestyle=LEVELS[name], linewidth=0.8, label=name, zorder=1)
    folder.mkdir(parents=True, exist_ok=True)
    save(returns_figure, folder / "learning_curves.png")
    if any(len(run.q_estimates) for run in runs):
        save(q_figure, folder / "q_estimates.png")


# Output


def export(runs: list[Run], folder: Path):
    """Copy what is small. Complete runs that are there already stay, so that a sweep can be exported as it grows."""
    if any(run.path.resolve().is_relative_to(folder.resolve()) for run in runs):
        fail(f"{folder} holds the runs themselves: --export needs another folder")
    for path in folder.glob("*/**/*"):
        if path.is_file() and path.name not in EXPORTED:
            fail(f"{folder} holds more than an export, {path} for one: --export needs a folder of its own")
    targets = {folder / run.path.name: run for run in runs}
    if len(targets) < len(runs):
        fail("two of the runs have the same name: export their folders one by one")
    for target, run in targets.items():
        known = target / "eval.csv"
        if (target / "result.json").exists() and not filecmp.cmp(known, run.path / "eval.csv", shallow=False):
            fail(f"{target} holds another run of that name: remove it first if this one is to take its place")
    for target, run in targets.items():
        target.mkdir(parents=True, exist_ok=True)
        for name in EXPORTED:
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, target / name)
        if len(run.q_estimates):
            q_estimates = run.q_estimates.set_axis(run.q_estimates.index.astype(int))
            q_estimates.to_csv(target / "q_estimates.csv", index_label="global_step", float_format="%.6g")
        if not math.isnan(run.training_return):
            (target / "training_return.csv").write_text(f"episodes,mean\n{TRAINING_EPISODES},{run.training_return}\n")


SECTION = re.compile(r"(<!-- results:([\w-]+):begin(.*?)-->\n).*?(<!-- results:\2:end -->)", re.DOTALL)


def section(page: Path, name: str, flags: str, figures: Path | None) -> str:
    """The text of a page's section; its figures are drawn into figures/NAME, if that is given."""
    args = tyro.cli(Args, args=shlex.split(flags))
    args.runs = tuple(page.parent / path for path in args.runs or (f"benchmark/results/{name}",))
    if args.show == "published":
        return published_table()
    if args.show == "file":
        (path,) = args.runs
        return path.read_text() if path.suffix == ".md" else table(pd.read_csv(path, dtype=str))
    runs, incomplete, problems = read_runs(args)
    for problem in problems if runs else [*problems, f"section {name} stays empty: it has no complete runs"]:
        print(f"warning: {problem}", file=sys.stderr)
    if not runs:
        return ""
    if args.show == "best":
        return best_table(runs, args)
    if figures:
        draw_figures(runs, args, figures / name)
    curves = f"![Learning curves](benchmark/results/{name}/learning_curves.png)\n"
    if args.show == "curves":
        return curves
    q_estimates = f"![Q estimates and discounted returns](benchmark/results/{name}/q_estimates.png)\n"
    return f"{results_markdown(runs, incomplete, args)}\n{curves}\n{q_estimates}"


def rendered(page: Path, figures: Path | None = None) -> str:
    """The page with its sections made from the committed data."""
    return SECTION.sub(lambda match: match[1] + section(page, match[2], match[3], figures) + match[4], page.read_text())


def main(args: Args):
    if args.pages:
        for page in args.pages:
            if not page.exists() or not SECTION.search(page.read_text()):
                fail(f"{page} has no section between <!-- results:NAME:begin --> and <!-- results:NAME:end -->")
            page.write_text(rendered(page, page.parent / "benchmark/results"))
        return
    runs, incomplete, problems = read_runs(args)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not runs:
        fail(f"no complete runs in {', '.join(map(str, args.runs)) or 'no folder: name one'}")
    if args.export:
        export(runs + incomplete, args.export)
    out = args.out or args.runs[0] / "report"
    draw_figures(runs, args, out)
    scores(runs, args).to_csv(out / "results.csv", index=False)
    text = results_markdown(runs, incomplete, args)
    (out / "results.md").write_text(text)
    print(text, end="")
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
