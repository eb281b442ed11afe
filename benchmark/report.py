"""Tables and learning curves of a folder of runs.

    python benchmark/report.py runs/ddpg_continuous_action

Writes results.md, results.csv, learning_curves and q_estimates (.png and .svg) into runs/ddpg_continuous_action/report.
With --export benchmark/results/NAME it also copies the runs' raw data there, small enough to commit, and

    python benchmark/report.py --readme README.md

makes the page's results again from that data alone: each section between <!-- results:NAME:begin --> and
<!-- results:NAME:end -->, with its figures. Flags of this command may stand before the first marker's closing -->.

What is missing or broken in the runs is said in a line on stderr each; the table then shows what is there.
"""

import csv
import json
import math
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy.stats import bootstrap, trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7, "svg.hashsalt": "ddpg"})

HERE = Path(__file__).resolve().parent
FINAL_EVALUATIONS = 10  # a final return is the mean of so many last evaluations, as in most of the published tables
RESAMPLES = 10_000
EXPORTED = "args.json", "eval.csv", "result.json", "q_estimates.csv"
# Flags that make no other algorithm or protocol: runs that differ in nothing else share a row
NOT_A_VARIANT = (
    "env_id seed run_name resume evaluate total_timesteps num_threads cuda cudagraphs compile torch_deterministic "
    "track wandb_project_name wandb_entity save_model checkpoint_interval keep_checkpoint capture_video"
).split()

NEEDED = {
    "args": {"exp_name", "env_id", "seed", "eval_episodes"},
    "versions": {"gymnasium", "mujoco", "torch", "python"},
    "hardware": {"gpu", "threads"},
    "result": {"global_step", "seconds", "steps_per_second"},
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders that hold runs, at any depth"""
    out: Path | None = None
    """folder for the tables and figures; by default report/ in the first folder of runs"""
    export: Path | None = None
    """copy the runs' raw data here: eval.csv, args.json, result.json and the Q estimates"""
    readme: Path | None = None
    """make this page's results sections again instead, from benchmark/results/"""
    curves_only: bool = False
    """in a page's section: show the learning curves without the tables"""
    published: bool = True
    """show published figures beside the runs"""
    env_ids: tuple[str, ...] = ()
    """show only these environments"""
    up_to: float = math.inf
    """leave out evaluations after this step, to compare runs of different lengths"""
    reference: str = "CleanRL docs"
    """source in published_returns.csv whose first row for an environment is a normalised score of 1"""


@dataclass
class Run:
    path: Path
    args: dict
    record: dict
    result: dict | None
    evaluations: list[tuple[int, float]]  # (global_step, mean return)
    label: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def env_id(self) -> str:
        return self.args["env_id"]

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def script(self) -> str:
        """The script whose networks it has: the peer has the tuned script's."""
        return "ddpg_paper_faithful" if "critic_lr" in self.args else "ddpg_continuous_action"

    @property
    def last_step(self) -> int:
        return self.evaluations[-1][0]

    @property
    def final_return(self) -> float:
        return float(np.mean([mean for _, mean in self.evaluations[-FINAL_EVALUATIONS:]]))


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_run(path: Path, up_to: float) -> Run:
    record = json.loads((path / "args.json").read_text())
    result = json.loads((path / "result.json").read_text()) if (path / "result.json").exists() else None
    parts = record | {"result": NEEDED["result"] if result is None else result}
    for part, names in NEEDED.items():
        if missing := names - set(parts[part]):
            raise KeyError(", ".join(sorted(missing)))
    run = Run(path, record["args"], record, result, [])
    lines = (path / "eval.csv").read_text().splitlines(keepends=True) if (path / "eval.csv").exists() else []
    for number, line in enumerate(lines[1:], 2):
        try:
            step, mean, *others = map(float, line.split(","))
            if len(others) != 4 or not line.endswith("\n") or not math.isfinite(step + mean):
                raise ValueError
        except ValueError:
            run.problems.append(f"line {number} of eval.csv is broken and left out: {line.strip()!r}")
        else:
            if step <= up_to:
                run.evaluations.append((int(step), mean))
    if run.result is None:
        run.problems.append(f"the run is not complete (no result.json): {len(run.evaluations)} evaluations")
    if not run.evaluations:
        run.problems.append("no evaluations: left out")
    elif len(run.evaluations) < FINAL_EVALUATIONS:
        run.problems.append(f"{len(run.evaluations)} evaluations: the final return is the mean of those")
    return run


def read_runs(args: Args) -> tuple[list[Run], list[str]]:
    """The runs that can be shown, labelled, by environment and label; and a line for whatever is wrong with them."""
    found, problems = {}, []
    for path in sorted({file.parent for folder in args.runs for file in folder.rglob("args.json")}):
        try:
            run = read_run(path, args.up_to)
            if args.env_ids and run.env_id not in args.env_ids:
                continue
            problems += [f"{path}: {problem}" for problem in run.problems]
            if run.evaluations:
                found[path] = run
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: cannot be read and is left out ({type(error).__name__}: {error})")
    scripts = sorted({run.args["exp_name"] for run in found.values()})
    if len(scripts) > 1:
        problems.append(f"{len(scripts)} scripts, each in rows of its own: {', '.join(scripts)}")
    set_labels(found.values())

    complete = {(run.env_id, run.label) for run in found.values() if run.result}
    for path, run in list(found.items()):
        if not run.result and (run.env_id, run.label) in complete:  # it would end the curves, and lower the mean
            problems.append(f"{path}: left out, other seeds of its row are complete")
            del found[path]
    order = {env_id: i for i, env_id in enumerate(args.env_ids or sorted({run.env_id for run in found.values()}))}
    runs = {}
    for run in sorted(found.values(), key=lambda run: (order[run.env_id], run.label, run.seed, str(run.path))):
        first = runs.setdefault((run.env_id, run.label, run.seed), run)
        if first is not run:
            problems.append(f"{run.path}: left out, {first.path} has the same environment, flags and seed")
    runs = list(runs.values())
    for label in sorted({run.label for run in runs}):
        seeds = {env_id: {run.seed for run in same} for env_id, its_label, same in group(runs) if its_label == label}
        for env_id in order:
            missing = sorted(set.union(*seeds.values()) - seeds.get(env_id, set()))
            if missing:
                problems.append(f"{env_id}, {label}: no run of seed {', '.join(map(str, missing))}")
    for env_id, label, same in group(runs):
        if len({run.last_step for run in same}) > 1:
            problems.append(f"{env_id}, {label}: runs of {span([run.last_step for run in same])} steps in one row")
    return runs, problems


def set_labels(runs):
    """Label each run by its script and those of its flags in which the script's runs here differ."""
    for exp_name in {run.args["exp_name"] for run in runs}:
        same = [run for run in runs if run.args["exp_name"] == exp_name]
        flags = dict.fromkeys(flag for run in same for flag in run.args if flag not in NOT_A_VARIANT)
        varied = [flag for flag in flags if len({json.dumps(run.args.get(flag)) for run in same}) > 1]
        for run in same:
            run.label = " ".join([exp_name, *(as_typed(flag, run.args.get(flag)) for flag in varied)])


def as_typed(flag: str, value) -> str:
    name = flag.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"


def group(runs: list[Run]) -> list[tuple[str, str, list[Run]]]:
    """(env_id, label, the runs of its seeds), in the order of the runs."""
    return [(*key, list(same)) for key, same in groupby(runs, key=lambda run: (run.env_id, run.label))]


def base_name(env_id: str) -> str:
    return re.sub(r"-v\d+$", "", env_id)


def published_rows(env_id: str) -> list[dict]:
    return [row for row in read_csv(HERE / "published_returns.csv") if row["env"] == base_name(env_id)]


def baselines(runs: list[Run]) -> tuple[float | None, float | None]:
    """Scores of the random and of the untrained policy in the environment of these runs, which share their flags."""
    if runs[0].args.get("pixels"):  # the table's policies act at other times; the runs' first evaluation may do
        first = [run.evaluations[0][1] for run in runs if run.evaluations[0][0] <= run.args["learning_starts"]]
        return None, float(np.mean(first)) if first else None
    path = HERE / "baselines.csv"
    rows = read_csv(path) if path.exists() else []
    scores = {row["policy"]: float(row["mean"]) for row in rows if row["env_id"] == runs[0].env_id}
    return scores.get("random"), scores.get(f"untrained {runs[0].script}")


def interval(samples, statistic, axis=-1):
    """95 % percentile bootstrap interval; every sample is resampled by itself, that is, stratified."""
    result = bootstrap(
        samples, statistic, axis=axis, method="percentile", n_resamples=RESAMPLES, vectorized=True, rng=0, batch=1000
    )
    return result.confidence_interval


def interquartile_mean(*samples, axis=-1):
    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def number(value: float | None, form=",.1f") -> str:
    return "" if value is None else format(value, form).replace("-", "−")


def span(values: list) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def table(rows: list[dict]) -> str:
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def result_rows(runs: list[Run]) -> list[dict]:
    """One row for each environment and label, with unrounded numbers: what results.csv holds."""
    rows = []
    for env_id, label, same in group(runs):
        finals = [run.final_return for run in same]
        done = [run.result for run in same if run.result and run.result["global_step"] == run.last_step]
        random, untrained = baselines(same)
        rows.append(
            {
                "env_id": env_id,
                "run": label,
                "final_return": float(np.mean(finals)),
                "std_over_seeds": float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
                "returns": " ".join(map(str, finals)),
                "seeds": " ".join(str(run.seed) for run in same),
                "steps_min": min(run.last_step for run in same),
                "steps_max": max(run.last_step for run in same),
                "untrained": untrained,
                "random": random,
                "steps_per_second": float(np.median([result["steps_per_second"] for result in done])) if done else None,
                "seconds": float(np.median([result["seconds"] for result in done])) if done else None,
            }
        )
    return rows


def aggregate_rows(runs: list[Run], reference: str) -> tuple[list[dict], list[str]]:
    """Interquartile mean of the normalised scores of each label; and the environments that could not be normalised."""
    rows, left_out = [], []
    for label in sorted({run.label for run in runs}):
        env_ids, samples, at_start = [], [], []
        for env_id, _, same in group([run for run in runs if run.label == label]):
            random, untrained = baselines(same)
            one = [float(row["mean"]) for row in published_rows(env_id) if reference in row["source"]]
            if random is None or untrained is None or not one:
                left_out.append(env_id)
                continue
            env_ids.append(env_id)
            samples.append(np.array([(run.final_return - random) / (one[0] - random) for run in same]))
            at_start.append((untrained - random) / (one[0] - random))
        if len(samples) > 1:
            row = {"run": label, "IQM": number(interquartile_mean(*samples), ".2f"), "95 % interval": ""}
            if min(map(len, samples)) > 1:
                low, high = interval(samples, interquartile_mean)
                row["95 % interval"] = f"{number(low, '.2f')} to {number(high, '.2f')}"
            row["untrained policy"] = number(interquartile_mean(np.array(at_start)), ".2f")
            rows.append(row | {"environments": ", ".join(env_ids), "runs": sum(map(len, samples))})
    return rows, sorted(set(left_out))


def published_table(env_ids: list[str]) -> list[dict]:
    """A row for each published implementation and kind of figure, a column for each environment."""
    rows = {}
    for env_id in env_ids:
        for row in published_rows(env_id):
            key = row["source"], row["implementation"], row["statistic"]
            cells = dict(zip(("published by", "implementation", "what the figure is"), key, strict=True))
            cells |= {"seeds": row["seeds"], "steps": f"{int(row['timesteps']):,}"} | dict.fromkeys(env_ids, "")
            spread = f" ± {number(float(row['std']))}" if row["std"] else ""
            rows.setdefault(key, cells)[env_id] = f"{number(float(row['mean']))}{spread} ({row['env_version']})"
    return [{base_name(column): cell for column, cell in row.items()} for row in rows.values()]


def markdown(runs: list[Run], args: Args) -> str:
    episodes = span([run.args["eval_episodes"] for run in runs])
    fewest = min(len(same) for _, _, same in group(runs))
    versions = [
        f"{package} {', '.join(sorted({run.record['versions'][package] for run in runs}))}"
        for package in ("gymnasium", "mujoco", "torch", "python")
    ]
    devices = {run.record["hardware"]["gpu"] or f"CPU, threads: {run.record['hardware']['threads']}" for run in runs}
    shown = []
    for row in result_rows(runs):
        spread = "" if row["std_over_seeds"] is None else f" ± {number(row['std_over_seeds'])}"
        shown.append(
            {
                "environment": row["env_id"],
                "run": row["run"],
                "final return": f"**{number(row['final_return'])}**{spread}",
                "of each seed": ", ".join(number(float(value), ",.0f") for value in row["returns"].split()),
                "seeds": len(row["seeds"].split()),
                "steps": span([row["steps_min"], row["steps_max"]]),
                "untrained": number(row["untrained"]),
                "random": number(row["random"]),
                "steps/s": number(row["steps_per_second"], ",.0f"),
                "hours": number(row["seconds"] and row["seconds"] / 3600, ".2f"),
            }
        )
    text = [
        table(shown),
        f"Final return: the mean of a run's last {FINAL_EVALUATIONS} evaluations, {episodes} episodes each without "
        "exploration noise; then mean ± sample standard deviation over the seeds. Untrained and random: the same "
        "environments under the script's actor as initialised and under uniformly random actions "
        "(`benchmark/baselines.csv`; from pixels: the runs' own evaluation before learning). Steps/s and hours: the "
        "median run, evaluations included, beside whatever else the machine ran. "
        f"{', '.join(versions)}; {'; '.join(sorted(devices))}.",
    ]
    if fewest < 5:
        text[-1] += f" With so few seeds (from {fewest} an environment), mean and spread are rough themselves."

    rows, left_out = aggregate_rows(runs, args.reference)
    if rows:
        note = f" Left out for want of a reference: {', '.join(left_out)}." if left_out else ""
        text += [
            table(rows),
            "Across environments: interquartile mean (IQM) of normalised final returns, 0 being the random policy's "
            f'score and 1 the first figure of "{args.reference}" in the table of published figures, with its protocol '
            "and environment version; 95 % stratified bootstrap interval over seeds. Untrained policy: the same for "
            f"the actors as initialised, which is where the runs start from.{note}",
        ]
    published = published_table(list(dict.fromkeys(run.env_id for run in runs)))
    if published and args.published:
        text += [
            "Published figures, each under its own protocol and on the environment version named:",
            table(published),
        ]
    return "\n\n".join(text) + "\n"


def q_estimates(run: Run) -> list[tuple[int, float, float]]:
    """(global_step, Q(s0, mu(s0)), discounted return) of each evaluation, from the export or the TensorBoard log."""
    if (run.path / "q_estimates.csv").exists():
        try:
            return [tuple(map(float, row.values())) for row in read_csv(run.path / "q_estimates.csv")]
        except (ValueError, TypeError):
            print(f"warning: {run.path}: q_estimates.csv is broken and left out", file=sys.stderr)
            return []
    log = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    tags = "eval/q_estimate", "eval/discounted_return"
    if not set(tags) <= set(log.Tags()["scalars"]):
        return []
    return [(q.step, q.value, ret.value) for q, ret in zip(*map(log.Scalars, tags), strict=False)]


def export(runs: list[Run], folder: Path):
    """Copy what is small; what an earlier export left there goes, so that two experiments don't mix."""
    if any(run.path.resolve().is_relative_to(folder.resolve()) for run in runs):
        fail(f"{folder} holds the runs themselves: --export needs another folder")
    for path in folder.glob("*/**/*"):
        if path.is_file() and path.name not in EXPORTED:
            fail(f"{folder} holds more than an export, {path} for one: --export needs a folder of its own")
    sweeps = {run.path.parent for run in runs}
    targets = {folder / (run.path.parent.name if len(sweeps) > 1 else "") / run.path.name: run for run in runs}
    if len(targets) < len(runs):
        fail("sweeps of the same name would overwrite each other: export them one by one")
    for old in list(folder.rglob("args.json")):
        shutil.rmtree(old.parent)
    for target, run in targets.items():
        target.mkdir(parents=True, exist_ok=True)
        for name in EXPORTED:
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, target / name)
        if rows := q_estimates(run):
            with open(target / "q_estimates.csv", "w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["global_step", "q_estimate", "discounted_return"])
                writer.writerows((int(step), f"{q:.6g}", f"{discounted:.6g}") for step, q, discounted in rows)


def common_steps(curves: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all the curves have, and their values there: (curves, steps)."""
    steps = sorted(set.intersection(*map(set, curves)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def draw_band(axis, steps, values, **style):
    """Mean over seeds and its 95 % bootstrap band."""
    axis.plot(steps, values.mean(0), marker="." if len(steps) == 1 else "", **style)
    if len(values) > 1 and len(steps):
        low, high = interval((values,), np.mean, axis=0)
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: told apart by all readers
PUBLISHED_MARKERS = "osD^vPX*"


def panels(env_ids: list[str], ylabel: str):
    """A figure with a panel for each environment, three in a row, and a function that ends and saves it."""
    columns = min(3, len(env_ids))
    rows = math.ceil(len(env_ids) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(3.1 * columns, 4.6), 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(env_ids) :]:
        axis.remove()
    for axis, env_id in zip(axes.flat, env_ids, strict=False):
        axis.set_title(env_id)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(
            lambda step, _: f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k" if step else "0"
        )
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis in axes.flat[max(0, len(env_ids) - columns) : len(env_ids)]:
        axis.set_xlabel("steps")

    def save(path: Path):
        legends = [axis.get_legend_handles_labels() for axis in figure.axes]
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        columns = 2 if figure.get_figwidth() > 6 else 1
        lines = sum(label.count("\n") + 1 for label in handles) / columns
        figure.set_figheight(figure.get_figheight() + 0.15 * lines)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)

    return figure, axes.flat, save


def draw_learning_curves(runs: list[Run], args: Args, path: Path):
    env_ids = list(dict.fromkeys(run.env_id for run in runs))
    labels = sorted({run.label for run in runs})
    published = {env_id: published_rows(env_id) if args.published else [] for env_id in env_ids}
    versions = {}  # of the environments, by source and implementation
    for row in sum(published.values(), []):
        versions.setdefault((row["source"], row["implementation"]), set()).add(row["env_version"])
    sources = list(versions)
    _, axes, save = panels(env_ids, "return")
    for axis, env_id in zip(axes, env_ids, strict=False):
        levels = {}
        for its_env_id, label, same in group(runs):
            if its_env_id == env_id:
                steps, values = common_steps([dict(run.evaluations) for run in same])
                color = COLORS[labels.index(label) % len(COLORS)]
                draw_band(axis, steps, values, color=color, label=label, zorder=3)
                levels["random policy"], levels[f"untrained {same[0].script}"] = baselines(same)
        for (label, level), style in zip(levels.items(), ("-.", ":", (0, (1, 4))), strict=False):
            if level is not None:
                axis.axhline(level, color="black", linestyle=style, linewidth=0.9, label=label)
        if not published[env_id]:
            continue
        left, right = axis.get_xlim()
        axis.set_xlim(left, left + (right - left) / 0.75)  # a margin for the published figures: they have no steps here
        axis.axvline(right, color="#cccccc", linewidth=0.8)
        axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
        for row in published[env_id]:
            key = row["source"], row["implementation"]
            place = 0.75 + 0.25 * (sources.index(key) + 0.5) / len(sources)
            label = f"{row['source'].split()[0]}, {row['implementation']}, {'/'.join(sorted(versions[key]))}: "
            label = textwrap.fill(label + row["statistic"], 64, break_on_hyphens=False)
            style = dict(color="#666666", linewidth=0.4, markersize=4, markevery=[1], label=label)
            style["marker"] = PUBLISHED_MARKERS[sources.index(key) % len(PUBLISHED_MARKERS)]
            axis.plot([0, place, 1], [float(row["mean"])] * 3, transform=axis.get_yaxis_transform(), **style)
    save(path)


def draw_q_estimates(runs: list[Run], path: Path):
    """The critic's estimate at the start of an evaluation against the discounted return that followed."""
    found = {run.path: [row for row in q_estimates(run) if row[0] <= run.last_step] for run in runs}
    runs = [run for run in runs if found[run.path]]
    if not runs:
        return
    env_ids, labels = list(dict.fromkeys(run.env_id for run in runs)), sorted({run.label for run in runs})
    _, axes, save = panels(env_ids, "discounted return")
    for axis, env_id in zip(axes, env_ids, strict=False):
        for its_env_id, label, same in group(runs):
            if its_env_id == env_id:
                color = COLORS[labels.index(label) % len(COLORS)]
                for column, name, style in ((1, "Q(s, μ(s)) at the start", "--"), (2, "discounted return", "-")):
                    curves = [{row[0]: row[column] for row in found[run.path]} for run in same]
                    steps, values = common_steps(curves)
                    draw_band(axis, steps, values, color=color, linestyle=style, label=f"{label}: {name}")
    save(path)


def write_report(runs: list[Run], args: Args, out: Path):
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(markdown(runs, args))
    rows = result_rows(runs)
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_learning_curves(runs, args, out / "learning_curves")
    draw_q_estimates(runs, out / "q_estimates")


SECTION = re.compile(r"(<!-- results:([\w-]+):begin(.*?)-->\n).*?(<!-- results:\2:end -->)", re.DOTALL)


def section_args(name: str, flags: str, page: Path) -> Args:
    args = tyro.cli(Args, args=shlex.split(flags))
    folders = args.runs or (Path("benchmark/results") / name,)
    args.runs = tuple(page.parent / folder for folder in folders)
    args.out = page.parent / "benchmark/results" / name
    return args


def section_text(name: str, flags: str, page: Path) -> str:
    args = section_args(name, flags, page)
    runs, _ = read_runs(args)
    if not runs:  # no data committed yet
        return ""
    text = "" if args.curves_only else f"{markdown(runs, args)}\n"
    text += f"![Learning curves](benchmark/results/{name}/learning_curves.png)\n"
    captions = []
    seeds = [len(same) for _, _, same in group(runs)]
    if max(seeds) > 1:
        few = ", which with three seeds or fewer spans them all" if min(seeds) <= 3 else ""
        captions.append(f"Mean and 95 % bootstrap band over seeds{few}.")
    published = [row for run in runs for row in published_rows(run.env_id)] if args.published else []
    if published:
        steps = span([int(row["timesteps"]) for row in published])
        captions.append(f"Right of the grey line: published figures, after {steps} steps.")
    if captions:
        text += f"\n{' '.join(captions)}\n"
    if not args.curves_only and any(q_estimates(run) for run in runs):
        text += f"\n![Q estimates](benchmark/results/{name}/q_estimates.png)\n\n"
        text += "The critic's estimate at the start of the evaluations, and the discounted return that followed; after "
        text += "a time limit no more rewards are counted, which matters for short episodes: the critic counts on.\n"
    return text


def rendered(page: Path) -> str:
    """The page with its results sections made from the committed data."""
    return SECTION.sub(lambda m: m[1] + section_text(m[2], m[3], page) + m[4], page.read_text())


def main(args: Args):
    if args.readme:
        sections = SECTION.findall(args.readme.read_text()) if args.readme.exists() else []
        if not sections:
            fail(f"{args.readme} has no section between <!-- results:NAME:begin --> and <!-- results:NAME:end -->")
        for _, name, flags, _ in sections:
            section = section_args(name, flags, args.readme)
            runs, problems = read_runs(section)
            if runs:
                write_report(runs, section, section.out)
            else:
                problems.append(f"section {name} stays empty: no runs for it")
            for problem in problems:
                print(f"warning: {problem}", file=sys.stderr)
        args.readme.write_text(rendered(args.readme))
        return
    runs, problems = read_runs(args)
    if not any(args.reference in row["source"] for row in read_csv(HERE / "published_returns.csv")):
        problems.append(f"published_returns.csv has no source named {args.reference}: returns are not normalised")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not runs:
        fail(f"no runs with evaluations in {', '.join(map(str, args.runs)) or 'no folder: name one'}")
    if args.export:
        export(runs, args.export)
    out = args.out or args.runs[0] / "report"
    write_report(runs, args, out)
    print((out / "results.md").read_text(), end="")
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())), file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
