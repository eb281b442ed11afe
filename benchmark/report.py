"""Tables and learning curves of a folder of runs.

    python benchmark/report.py runs/ddpg_continuous_action

writes results.md, results.csv (one row per run, not rounded), learning_curves.png and q_estimates.png into
runs/ddpg_continuous_action/report. With --export benchmark/results/NAME it also copies the runs' raw data there, which
is small enough to commit, and

    python benchmark/report.py --pages README.md RESULTS.md

regenerates the pages from the committed data: what stands between <!-- results:NAME:begin FLAGS --> and
<!-- results:NAME:end -->. FLAGS are flags of this command, --show and the folders of the runs among them, in which *, ?
and [...] are as in the shell; the folder is benchmark/results/NAME unless they name others.

Runs are shown side by side under the flags in which they differ. An incomplete run, a broken one and the second of two
equal ones are named on stderr and left out.
"""

import filecmp
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action
import ddpg_paper_faithful
from ddpg_continuous_action import exit_unless, save

plt.switch_backend("Agg")

FINAL_EVALUATIONS = 10  # a final return is the mean of the last ten after learning started, as in result.json
TRAINING_EPISODES = 100
Q_COLUMNS = ["q_estimate", "discounted_return"]
ROW = ["environment", "variant", "steps"]  # what the runs in one row of a table share
BASELINES = pd.read_csv(Path(__file__).with_name("baselines.csv"))
PUBLISHED = pd.read_csv(Path(__file__).with_name("published_returns.csv"))
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
    """folders that hold runs, at any depth (with --show file: Markdown files)"""
    out: Path | None = None
    """folder for the tables and figures; by default report/ in the first folder of runs"""
    export: Path | None = None
    """copy the runs' raw data here, without their models and logs; runs that are there already stay"""
    pages: tuple[Path, ...] = ()
    """regenerate the sections of these pages instead, from committed data"""
    show: Literal["all", "curves", "best", "published", "file"] = "all"
    """in a page's section: table and figures; the learning curves alone; the final returns beside the best published
    ones of the same protocol; the table of all published returns; files as they are"""
    env_ids: tuple[str, ...] = ()
    """show only these environments, in this order"""
    up_to: float = math.inf
    """leave out evaluations after this step, to compare runs of different lengths"""
    solved_above: float = math.inf
    """count the seeds that solve the task: those with an evaluation above this return"""
    published: bool = True
    """draw the best published return of the same protocol as a line among the learning curves"""
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
    """The Q estimates and the training return from a TensorBoard log."""
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()

    def scalars(tag):
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        return pd.Series({event.step: event.value for event in events}, dtype=float).sort_index()

    last = scalars("charts/episodic_return").tail(TRAINING_EPISODES)
    training_return = last.mean() if len(last) == TRAINING_EPISODES else math.nan
    return pd.DataFrame({name: scalars(f"eval/{name}") for name in Q_COLUMNS}), training_return


def read_run(path: Path, args: Args) -> dict:
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
        q_estimates, training_return = read_steps(path / "q_estimates.csv"), math.nan
        if (path / "training_return.csv").exists():
            training_return = pd.read_csv(path / "training_return.csv")["mean"].iloc[0]
    else:
        q_estimates, training_return = read_log(path)
    evaluations = read_steps(path / "eval.csv").join(q_estimates)
    evaluations = evaluations[evaluations.index <= args.up_to]
    learned = evaluations[evaluations.index > flags["learning_starts"]]
    if learned.empty:
        raise ValueError(f"no evaluations after learning started and up to step {args.up_to:,.0f}")
    returns, steps = evaluations["mean"], int(evaluations.index[-1])
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
        "final_return": learned["mean"].tail(FINAL_EVALUATIONS).mean(),
        "final_evaluation": (result.get("final_eval") or {}).get("mean", math.nan),
        "q_minus_discounted_return": q_error.tail(FINAL_EVALUATIONS).mean(),
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


def best_published(flags: dict) -> dict:
    """The best published figure of the same task, one of Gymnasium's MuJoCo tasks as it comes; {} if there is none."""
    task = re.fullmatch(r"(\w+)-v[45]", flags["env_id"])
    as_it_comes = task and task[1] in BEST.index and not json.loads(flags["env_kwargs"])
    return BEST.loc[task[1]].to_dict() if as_it_comes else {}


def levels(flags: dict, script: str, returns: pd.Series) -> dict[str, float]:
    """Returns to compare with, in the same environment; NaN where there is none."""
    same = (BASELINES["env_id"] == flags["env_id"]) & (not json.loads(flags["env_kwargs"]))
    means = BASELINES[same].set_index("policy")["mean"]
    untrained, random = means.get(f"untrained {script}", math.nan), means.get("random", math.nan)
    if flags.get("pixels"):  # acts at other time steps than those measured; its own first evaluation may do
        untrained, random = returns[returns.index <= flags["learning_starts"]].head(1).mean(), math.nan
    best = best_published(flags).get("mean", math.nan)
    return {"untrained": untrained, "random": random, "best published": best}


def read_runs(args: Args) -> pd.DataFrame:
    """One row per complete run, in the order in which they are shown; a line on stderr for each run left out."""
    runs = []
    for path in sorted({file.parent for folder in args.runs for file in folder.rglob("args.json")}):
        if not (path / "result.json").exists():
            print(f"warning: {path}: incomplete (it has no result.json) and left out", file=sys.stderr)
            continue
        try:
            runs.append(read_run(path, args))
        except (OSError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
            print(f"warning: {path}: cannot be read and is left out ({problem})", file=sys.stderr)
    env_ids = args.env_ids or sorted({run["environment"] for run in runs})
    runs = [run for run in runs if run["environment"] in env_ids]
    exit_unless(runs, f"no complete runs in {', '.join(map(str, args.runs)) or 'no folder: name one'}")
    set_variants(runs)

    def place(run):
        return env_ids.index(run["environment"]), run["variant"] != "default", *(run[name] for name in (*ROW, "seed"))

    runs = pd.DataFrame(sorted(runs, key=place))
    twice = runs.duplicated([*ROW, "seed"])
    for path in runs["path"][twice]:
        print(f"warning: {path}: left out, the same run is there twice", file=sys.stderr)
    return runs[~twice]


def set_variants(runs: list[dict]):
    """Call each run by the flags in which the runs of its script differ, as far as they are not the defaults."""
    exp_names = {run["flags"]["exp_name"] for run in runs}
    for run in runs:
        exp_name = run["flags"]["exp_name"]
        same_script = [other["flags"] for other in runs if other["flags"]["exp_name"] == exp_name]
        words = [exp_name] if len(exp_names) > 1 else []
        for flag, value in run["flags"].items():
            varied = flag not in NOT_A_VARIANT and any(flags.get(flag) != value for flags in same_script)
            if varied and value != run["defaults"].get(flag):
                words.append(as_typed(flag.replace("_", "-"), value))
        run["variant"] = " ".join(words) or "default"


def as_typed(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


# Tables


def number(value: float, digits=1) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")


def mean_and_std(mean: float, std: float) -> str:
    return number(mean) if math.isnan(std) else f"{number(mean)} ± {number(std)}"


def over_seeds(values: pd.Series) -> str:
    """Mean and sample standard deviation; nothing where a seed is missing."""
    return mean_and_std(values.mean(skipna=False), values.std(skipna=False))


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
        "seeds": ("seed", "size"),
        "final return": ("final_return", lambda returns: f"**{over_seeds(returns)}**"),
        "each seed": ("final_return", lambda returns: ", ".join(number(value, 0) for value in returns)),
        "final evaluation": ("final_evaluation", over_seeds),
        "solved (seeds)": ("first_solved_at", lambda steps: f"{steps.count()} of {len(steps)}"),
        "first solved at step (median)": ("first_solved_at", lambda steps: number(steps.median(), 0)),
        training_return: ("training_return", over_seeds),
        "Q − discounted return": ("q_minus_discounted_return", over_seeds),
        "untrained": ("untrained", lambda returns: number(returns.mean())),
        "random": ("random", lambda returns: number(returns.mean())),
        "steps/s": ("steps_per_second", lambda speeds: number(speeds.median(), 0)),
        "hours": ("hours", lambda hours: number(hours.median(), 2)),
    }
    if math.isinf(args.solved_above):
        del columns["solved (seeds)"]
    if not args.training_return:
        del columns[training_return]
    alike = runs.groupby(ROW)["measured_with"].transform("nunique") == 1  # else a speed is of neither hardware
    speeds = runs[["steps_per_second", "hours"]].where(alike)
    rows = runs.assign(**speeds).groupby(ROW, sort=False).agg(**columns).reset_index()
    return f"{table(rows)}\n{'; '.join(sorted(set(runs['measured_with'])))}.\n"


def best_table(runs: pd.DataFrame) -> str:
    """One row per environment and variant, beside the best published return of the same protocol."""
    rows = []
    for (env_id, variant, steps), seeds in runs.groupby(ROW, sort=False):
        row = {"environment": env_id, "variant": variant, "ours": over_seeds(seeds["final_return"])}
        row |= {"steps": steps, "seeds": len(seeds), "best published": "none"}
        if best := best_published(seeds["flags"].iloc[0]):
            row["best published"] = mean_and_std(best["mean"], best["std"])
            row["its steps"], row["its seeds"] = best["timesteps"], best["seeds"]
            row["by"] = f"{best['source'].split(',')[0]}, {best['implementation']}, {best['env_version']}"
            row["ours is"] = "**lower**" if seeds["final_return"].mean() < best["mean"] else "higher"
        rows.append(row)
    return table(pd.DataFrame(rows, dtype=object))


def published_table() -> str:
    """One row per implementation and kind of figure, one column per environment."""
    cells = [f"{mean_and_std(row.mean, row.std)} ({row.env_version})" for row in PUBLISHED.itertuples(index=False)]
    keys = ["source", "implementation", "statistic", "seeds", "timesteps"]
    rows = PUBLISHED.assign(cell=cells).pivot_table("cell", keys, "env", aggfunc="first", sort=False)
    return table(rows.reset_index().rename(columns={"source": "published by", "statistic": "what the figure is"}))


# Figures

LEVELS = {"untrained": (1, 1), "random": (1, 4), "best published": (4, 1, 1, 1)}  # dashes and gaps, in line widths


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """All evaluations, one per row."""
    frames = [run.evaluations.assign(environment=run.environment, variant=run.variant) for run in runs.itertuples()]
    return pd.concat(frames).reset_index(names="steps")


def draw_returns(runs: pd.DataFrame, args: Args, path: Path):
    shown = [level for level in LEVELS if args.published or level != "best published"]
    ends = runs.melt(["environment", "steps"], shown, "variant", "mean").dropna()
    returns = pd.concat([curves(runs), ends.assign(steps=0), ends]).rename(columns={"mean": "return"})
    variants = runs["variant"].unique()
    colors = dict(zip(variants, sns.color_palette("colorblind", len(variants)), strict=True))
    look = {
        "palette": colors | dict.fromkeys(LEVELS, "black"),
        "dashes": {variant: "" if i < 10 else (3, 1) for i, variant in enumerate(variants)} | LEVELS,  # ten colours
        "sizes": dict.fromkeys(variants, 1.3) | dict.fromkeys(LEVELS, 0.8),
    }
    draw(returns, path, y="return", col="environment", hue="variant", style="variant", size="variant", **look)


def draw_q_estimates(runs: pd.DataFrame, path: Path):
    if runs["q_minus_discounted_return"].isna().all():
        return  # the logs are gone
    names = {"discounted_return": "return that followed", "q_estimate": "critic's estimate"}
    most_first = -runs.groupby("environment")["variant"].transform("nunique")  # so that full rows are above short ones
    by_variant = runs.assign(most_first=most_first, nth=runs["variant"].factorize()[0])
    q = curves(by_variant.sort_values(["most_first", "nth"])).rename(columns=names)
    q = q.melt(ROW, list(names.values()), "curve", "discounted return")
    q["panel"] = q["environment"] + "\n" + q["variant"].str.replace(" --", "\n--")
    draw(q, path, y="discounted return", col="panel", hue="curve", style="curve", palette="colorblind")


@plt.rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8})
def draw(data: pd.DataFrame, path: Path, **columns_and_look):
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
    grid.savefig(path, dpi=150)
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
            training_return = f"episodes,mean\n{TRAINING_EPISODES},{run.training_return}\n"
            (target / "training_return.csv").write_text(training_return, encoding="utf-8")
            for name in ("args.json", "eval.csv", "result.json"):
                shutil.copyfile(run.path / name, target / name)
        _, different, _ = filecmp.cmpfiles(run.path, target, ["args.json", "eval.csv"], shallow=False)
        exit_unless(not different, f"{target} holds another run of that name: remove one of them first")


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
        return "".join(path.read_text(encoding="utf-8") for path in args.runs)
    runs = read_runs(args)
    if args.show == "best":
        return best_table(runs)
    (figures / name).mkdir(parents=True, exist_ok=True)
    draw_returns(runs, args, figures / name / "learning_curves.png")
    text = f"![Learning curves](benchmark/results/{name}/learning_curves.png)\n"
    if args.show == "all":
        draw_q_estimates(runs, figures / name / "q_estimates.png")
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
    draw_returns(runs, args, out / "learning_curves.png")
    draw_q_estimates(runs, out / "q_estimates.png")
    runs.drop(columns=["evaluations", "flags", "defaults"]).to_csv(out / "results.csv", index=False)
    text = results_table(runs, args)
    save(out / "results.md", text)
    print(f"{text}\nThe figures are in {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the locale lacks a minus, the files have it
    main(tyro.cli(Args))
