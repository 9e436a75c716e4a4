"""Figures of runs of ppo_llm.py, ppo_llm_multigpu.py and ppo_classic.py, from their training_metrics.csv.

    python scripts/plot.py RUN                                   # one run, all its panels: RUN/curves.png
    python scripts/plot.py RUN RUN RUN                           # runs compared, seeds averaged: curves.png
    python scripts/plot.py RUN... --by lr --out lr.pdf           # one curve for each value of --lr
    python scripts/plot.py RUN... --metrics eval/score reward/kl # only these panels

RUN is the folder of a run, or a copy of its CSV. One run: points are steps, lines are running means. Several:
those that differ in nothing but the seed make one curve, their mean, in a band from the smallest to the
largest seed. That is the statistic of all figures of this script, and each figure says so.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import tyro

NOT_A_SETTING = {"seed", "output_dir", "resume", "track", "device", "rollout_slots", "micro_batch_tokens"}
COLORS = ["#1f65b0", "#ce5c18", "#2f8f5b", "#7b4fa3", "#b8860b", "#4d4d4d", "#c2407f", "#2a9db0"]
DASHES = ["-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2))]  # where lines coincide, each is still seen
STYLE = {
    "axes.spines.top": False,
    "axes.edgecolor": "#8a8880",
    "axes.grid": True,
    "grid.color": "#e6e4de",
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.labelcolor": "#3c3b37",
    "xtick.color": "#6d6b64",
    "ytick.color": "#6d6b64",
    "pdf.fonttype": 42,
}


class UsageError(Exception):
    """What the user can mend: shown as one sentence, exit code 2."""


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


@dataclass
class Config:
    runs: Annotated[list[Path], tyro.conf.Positional]  # folders of runs, or copies of training_metrics.csv
    by: str | None = None  # option whose values tell the curves apart; default: all that differ, but the seed
    metrics: list[str] = field(default_factory=list)  # panels when runs are compared; default: the usual ones
    out: Path | None = None  # .png, .pdf or .svg; default: RUN/curves.png for one run, else curves.png
    title: str | None = None  # title of the figure; default: model, data and reward, or the environment
    dpi: int = 110  # resolution of a PNG, dots per inch


@dataclass
class Run:
    """What is known of one run. Each curve: x [N], y [N], the finite points of a metric; x counts steps."""

    name: str
    options: dict
    summary: dict
    x_name: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Panel:
    """A panel of one run's figure: pairs (metric, label) on the left axis, and others on the right one."""

    title: str
    unit: str
    left: list[tuple[str, str]]
    right: list[tuple[str, str]] = field(default_factory=list)
    right_unit: str = ""
    is_log: bool = False  # logarithmic where that is of use
    bounds: tuple[float, float] | None = None  # values outside are drawn at the bound, and the panel says so


PHASES = [
    ("time/rollout", "rollout"),
    ("time/score", "scoring"),
    ("time/update_critic", "critic"),
    ("time/update_actor", "actor"),
    ("time/update", "update"),
]
PANELS = [
    Panel(
        "Score",
        "mean score of the responses",
        [("eval/score", "evaluation"), ("reward/score", "rollouts")],
    ),
    Panel(
        "Return",
        "return per episode",
        [("eval/score", "evaluation"), ("rollout/return_100", "last 100 episodes")],
    ),
    Panel(
        "KL to the reference",
        "nats per token",
        [("reward/kl", "KL")],
        [("reward/kl_coef", "coefficient")],
        "KL coefficient",
    ),
    Panel("Entropy of the policy", "nats", [("policy/entropy", "entropy")]),
    Panel(
        "Size of the update",
        "clip fraction",
        [("policy/clipfrac", "clip fraction")],
        [("policy/approx_kl", "KL(old, new)")],
        "approx_kl, nats",
    ),
    Panel(
        "Critic",
        "value loss, half squared error",
        [("value/loss", "value loss")],
        [("value/explained_variance", "explained variance")],
        "explained variance",
        bounds=(-1, 1),
    ),
    Panel(
        "Response length",
        "tokens",
        [("rollout/response_length", "length")],
        [("rollout/eos_rate", "stop rate")],
        "share that ends by itself",
    ),
    Panel("Episode length", "steps", [("rollout/length_100", "last 100 episodes")]),
    Panel(
        "Learning rates",
        "learning rate",
        [("optim/lr", "actor"), ("optim/critic_lr", "critic")],
        is_log=True,
    ),
    Panel(
        "Gradient norms",
        "norm before clipping",
        [("optim/grad_norm", "actor"), ("optim/critic_grad_norm", "critic")],
        is_log=True,
    ),
    Panel("Time by phase", "seconds per rollout and update", PHASES),
]
COMPARED_CLASSIC = {  # metric -> title and unit, when runs of ppo_classic.py are compared
    "rollout/return_100": ("Return, mean of the last 100 episodes", "return per episode"),
    "rollout/length_100": ("Episode length", "steps"),
    "policy/entropy": ("Entropy of the policy", "nats"),
    "policy/approx_kl": ("KL(old, new) in an update", "nats"),
    "value/explained_variance": ("Explained variance of the critic", "share of the returns' variance"),
    "value/loss": ("Value loss", "half squared error"),
}
COMPARED = {  # the same for language models
    "eval/score": ("Evaluation", "mean score"),
    "reward/score": ("Score of the rollouts", "mean score"),
    "reward/kl": ("KL to the reference", "nats per token"),
    "policy/entropy": ("Entropy of the policy", "nats"),
    "value/explained_variance": ("Explained variance of the critic", "share of the returns' variance"),
    "rollout/response_length": ("Response length", "tokens"),
}
OTHERS = {"reward/kl_coef": ("KL coefficient", "weight of a nat")}  # known, but not drawn unless asked for
NOT_SMOOTHED = (
    "eval/",
    "rollout/return_100",
    "rollout/length_100",
    "reward/kl_coef",
    "optim/lr",
    "optim/critic_lr",
)  # beginnings of names
DESCRIBED = [
    ("env_id", ""),
    ("model", "model "),
    ("dataset", "data "),
    ("reward", "reward "),
    ("adv_estimator", ""),
]


# ---- Reading -----------------------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """The curves and options of a run. Raises UsageError if there is no table, or no number in it."""
    table = path
    summary = {}
    if path.is_dir():
        table = path / "training_metrics.csv"
        if (path / "summary.json").exists():
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    if not table.exists():
        raise UsageError(f"{table} does not exist: give folders of runs, or copies of training_metrics.csv")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    x_column = "step"
    x_name = "step"
    if rows and "global_step" in rows[0]:
        x_column = "global_step"
        x_name = "environment steps"
    if not rows or x_column not in rows[0]:
        raise UsageError(f"{table} has no rows with a column {x_column}")
    curves = {}
    for column in rows[0]:
        metric = column
        if column == "return_100":  # as docs/results/classic has it
            metric = "rollout/return_100"
        points = [(number(row[x_column]), number(row[column])) for row in rows]
        points = [point for point in points if all(map(math.isfinite, point))]
        if points and metric not in ("step", "global_step"):
            curves[metric] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
    if not curves:
        raise UsageError(f"{table} holds no number yet")
    add_last_evaluation(curves, summary)
    return Run(path.resolve().name.removesuffix(".csv"), summary.get("config", {}), summary, x_name, curves)


def number(text: str | None) -> float:
    """NaN for a field that is empty, or that a killed run left unfinished."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def add_last_evaluation(curves: dict, summary: dict) -> None:
    """ppo_classic.py evaluates once, after the last step, and writes that only into summary.json."""
    evaluation = summary.get("last_evaluation")
    if not isinstance(evaluation, dict) or "eval/score" in curves:
        return
    last_step = np.array([max(x[-1] for x, _ in curves.values())])
    for metric in ("eval/score", "eval/standard_error"):
        if evaluation.get(metric) is not None:
            curves[metric] = (last_step, np.array([evaluation[metric]]))


def short(option) -> str:
    """An option for a label: the last part of a path."""
    text = str(option)
    if isinstance(option, str):
        text = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return text


def describe(runs: list[Run]) -> str:
    """What all runs have in common: model, data, reward and estimator, or the environment."""
    parts = []
    for name, label in DESCRIBED:
        values = {short(run.options[name]) for run in runs if run.options.get(name) is not None}
        if len(values) == 1:
            parts.append(label + values.pop())
    seeds = sorted({run.options["seed"] for run in runs if "seed" in run.options})
    if seeds:
        parts.append(("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)))
    return " · ".join(parts)


def group_runs(runs: list[Run], by: str | None) -> dict[str, list[Run]]:
    """Label -> the runs of one curve: equal in option `by`, or else in all settings but the seed.

    Raises UsageError if a run does not know the option.
    """
    names = [by] if by else differing_options(runs)
    groups = {}
    for run in runs:
        if by and by not in run.options:
            raise UsageError(f"--by {by}: the summary.json of {run.name} has no such option")
        label = ", ".join(f"{name} {short(run.options.get(name))}" for name in names)
        if not run.options:
            label = re.sub(r"[-_]?seed[-_]?\d+", "", run.name)
        groups.setdefault(label or "all runs", []).append(run)
    for label, group in groups.items():
        mixed = differing_options(group)
        if mixed:
            warn(f"the curve of {label} mixes runs that also differ in {', '.join(mixed)}")
        seeds = [run.options["seed"] for run in group if "seed" in run.options]
        if len(seeds) > len(set(seeds)):
            warn(f"the curve of {label} has runs of one seed twice")
    return groups


def differing_options(runs: list[Run]) -> list[str]:
    """The settings in which runs differ, in the order of the options."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    differing = []
    for name in names:
        values = {json.dumps(run.options.get(name), sort_keys=True) for run in runs if run.options}
        if len(values) > 1 and name not in NOT_A_SETTING:
            differing.append(name)
    return differing


# ---- Numbers -----------------------------------------------------------------------------------------------


def window_of(count: int) -> int:
    """Points in a running mean over a curve of `count` points: an odd number, about a tenth of them."""
    return 2 * (count // 20) + 1


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` points around each, [N]; symmetric everywhere, so narrower towards the ends."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    half = np.minimum(np.minimum(index, len(y) - 1 - index), window // 2)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def average_seeds(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """(x, mean, smallest, largest), each [N], over the seeds, where all of them have been measured.

    x are the points of all curves; between its own points a curve is interpolated linearly.
    """
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(0), values.min(0), values.max(0)


# ---- Drawing -----------------------------------------------------------------------------------------------


def make_figure(panels: list, draw: Callable, columns: int, size: tuple[float, float]):
    """A figure with an axis for each panel, drawn by draw(axis, panel)."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = matplotlib.figure.Figure(figsize=(size[0] * columns, size[1] * rows + 0.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, hspace=0.02)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def add_head(figure, title: str, note: str) -> None:
    """Title, and below it what points, lines and bands are."""
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold")  # the second line keeps room for the note
    height = 0.995 - 0.33 / figure.get_figheight()
    figure.text(0.5, height, note, ha="center", va="top", fontsize=9, color="#6d6b64")


def finish_axis(axis, title: str, unit: str, x_name: str, legend: list) -> None:
    """Title and legend stand above the axis, so that no legend lies over a curve."""
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=24 if legend else 8)
    axis.set_xlabel(x_name)
    axis.set_ylabel(unit)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    if axis.get_xlim()[1] >= 10_000:
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if legend:
        axis.legend(
            handles=legend,
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.99),
            ncols=5,
            frameon=False,
            fontsize=8,
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


def draw_metric(axis, run: Run, metric: str, label: str, color: str, dashes="-", bounds=None):
    """Points and their running mean, or an evaluation with its error. Returns the handle for the legend."""
    x, y = run.curves[metric]
    if metric == "eval/score":
        at, error = run.curves.get("eval/standard_error", (x, np.zeros_like(y)))
        error = np.interp(x, at, error)
        return axis.errorbar(x, y, error, color=color, marker="o", markersize=4, capsize=2.5, label=label)
    if bounds is not None and (y < bounds[0]).any():
        y = np.maximum(y, bounds[0])
        label = f"{label} (below {bounds[0]:g} drawn there)"
    smooth = y
    if not metric.startswith(NOT_SMOOTHED):
        axis.plot(x, y, ".", color=color, markersize=5, alpha=0.6, markeredgewidth=0)
        smooth = running_mean(y, window_of(len(y)))
    marker = "o" if len(y) == 1 else None
    return axis.plot(x, smooth, color=color, linewidth=1.6, linestyle=dashes, label=label, marker=marker)[0]


def set_limits(axis, may_be_log: bool = False) -> None:
    """Leaves a margin, so that no curve lies on the frame; one that never changes stands above zero.

    A logarithmic axis is taken where it may be, all is positive, and curves lie a factor of 20 apart.
    """
    axis.margins(0.03, 0.1)
    curves = [line.get_ydata() for line in axis.get_lines() if len(line.get_ydata())]
    lowest = min(np.min(y) for y in curves)
    highest = max(np.max(y) for y in curves)
    levels = [np.median(y) for y in curves]
    if may_be_log and lowest > 0 and max(levels) > 20 * min(levels):
        axis.set_yscale("log")
        return
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    if highest > 0 and highest - lowest < 1e-6 * highest:
        axis.set_ylim(0, 1.25 * highest)
    elif highest == lowest == 0:
        axis.set_ylim(-0.05, 1)


def draw_panel(axis, panel: Panel, run: Run) -> None:
    legend = []
    colors = iter(COLORS)
    for metric, label in panel.left:
        if metric in run.curves:
            legend.append(draw_metric(axis, run, metric, label, next(colors)))
    set_limits(axis, panel.is_log)
    axis.spines["right"].set_visible(False)
    if panel.right and all(metric in run.curves for metric, _ in panel.right):
        for metric, label in panel.right:
            twin = axis.twinx()
            twin.grid(False)
            color = next(colors)
            legend.append(draw_metric(twin, run, metric, label, color, DASHES[1], panel.bounds))
            set_limits(twin)
            twin.set_ylabel(panel.right_unit, color=color)
            twin.tick_params(axis="y", labelcolor=color)
            axis.spines["right"].set_visible(True)
            axis.tick_params(axis="y", labelcolor=COLORS[0])
    finish_axis(axis, panel.title, panel.unit, run.x_name, legend)


def draw_phases(axis, panel: Panel, run: Run) -> None:
    """Seconds of the phases, stacked."""
    present = [(metric, label) for metric, label in panel.left if metric in run.curves]
    x = run.curves[present[0][0]][0]
    heights = [np.interp(x, *run.curves[metric]) for metric, _ in present]
    heights = [running_mean(y, window_of(len(y))) for y in heights]
    areas = axis.stackplot(x, heights, labels=[label for _, label in present], colors=COLORS, alpha=0.75)
    axis.set_ylim(0, 1.15 * np.sum(heights, 0).max())
    axis.margins(x=0.03)
    axis.spines["right"].set_visible(False)
    finish_axis(axis, panel.title, panel.unit, run.x_name, list(areas))


def draw_run(run: Run, title: str | None):
    """The figure of one run: all panels of which something was measured."""
    panels = []
    for panel in PANELS:
        is_other_script = panel.title == "Return" and "rollout/return_100" not in run.curves
        is_other_script |= panel.title == "Score" and "rollout/return_100" in run.curves
        if any(metric in run.curves for metric, _ in panel.left) and not is_other_script:
            panels.append(panel)

    def draw(axis, panel: Panel) -> None:
        if panel.left is PHASES:
            draw_phases(axis, panel, run)
        else:
            draw_panel(axis, panel, run)

    figure = make_figure(panels, draw, columns=3, size=(4.6, 3.1))
    window = window_of(max(len(x) for x, _ in run.curves.values()))
    note = "evaluation: mean ± standard error"
    if window > 1:
        note = f"points: single steps; lines: running mean of {window} steps; {note}"
    add_head(figure, title or describe([run]) or run.name, note)
    return figure


def draw_comparison(groups: dict[str, list[Run]], metrics: list[str], title: str | None):
    """The figure of several runs. Raises UsageError if none of the metrics was measured."""
    runs = [run for group in groups.values() for run in group]
    known = COMPARED | COMPARED_CLASSIC | OTHERS
    wanted = metrics or COMPARED
    if not metrics and "rollout/return_100" in runs[0].curves:
        wanted = COMPARED_CLASSIC
    panels = [metric for metric in wanted if any(len(run.curves.get(metric, [[]])[0]) > 1 for run in runs)]
    if not panels:
        known = ", ".join(sorted(runs[0].curves))
        raise UsageError(f"no run has a curve of {', '.join(wanted)}; there are {known}")
    legend = {}

    def draw(axis, metric: str) -> None:
        for i, (label, group) in enumerate(groups.items()):
            curves = [run.curves[metric] for run in group if len(run.curves.get(metric, [[]])[0]) > 1]
            if curves:
                legend[label] = draw_group(axis, curves, metric, label, i)
        set_limits(axis)
        axis.spines["right"].set_visible(False)
        panel_title, unit = known.get(metric, (metric, metric))
        finish_axis(axis, panel_title, unit, runs[0].x_name, [])

    columns = 2 if len(panels) in (2, 4) else 3
    figure = make_figure(panels, draw, columns, size=(4.6, 3.1) if len(panels) > 1 else (6.4, 3.9))
    handles = [legend[label] for label in groups if label in legend]
    labels = [f"{label} (seeds: {len(groups[label])})" for label in groups if label in legend]
    columns = max(1, int(figure.get_figwidth() * 12 / max(len(label) + 6 for label in labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    note = "line: mean over seeds; band: smallest to largest seed"
    window = window_of(max(len(x) for run in runs for x, _ in run.curves.values()))
    if window > 1 and not all(metric.startswith(NOT_SMOOTHED) for metric in panels):
        note += f"; what is measured at every step: running mean of {window} steps"
    add_head(figure, title or describe(runs) or "Comparison", note)
    return figure


def draw_group(axis, curves: list, metric: str, label: str, i: int):
    """The mean of some seeds, with a band from the smallest to the largest: curve i of the figure."""
    color = COLORS[i % len(COLORS)]
    if not metric.startswith(NOT_SMOOTHED):
        curves = [(x, running_mean(y, window_of(len(y)))) for x, y in curves]
    lengths = [x[-1] for x, _ in curves]
    if max(lengths) > 1.05 * min(lengths):
        warn(f"{metric}, {label}: runs end at {min(lengths):g} to {max(lengths):g}; drawn up to the shortest")
    x, middle, low, high = average_seeds(curves)
    marker = "o" if metric.startswith("eval/") else None
    if len(curves) > 1:
        axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    dashes = DASHES[(i + i // len(COLORS)) % len(DASHES)]  # no two of 32 curves look the same
    return axis.plot(x, middle, color=color, linewidth=1.8, linestyle=dashes, marker=marker, markersize=4)[0]


def main(config: Config) -> Path:
    """Draws, and returns the path of the figure. Raises UsageError where there is nothing to draw."""
    if not config.runs:
        raise UsageError("give the folder of at least one run")
    runs = [read_run(path) for path in config.runs]
    if len({run.x_name for run in runs}) > 1:
        raise UsageError("runs of ppo_classic.py and of a language model do not fit in one figure")
    with matplotlib.rc_context(STYLE):
        if len(runs) == 1 and not config.metrics:
            figure = draw_run(runs[0], config.title)
            out = config.runs[0] / "curves.png" if config.runs[0].is_dir() else Path("curves.png")
        else:
            figure = draw_comparison(group_runs(runs, config.by), config.metrics, config.title)
            out = Path("curves.png")
        out = config.out or out
        figure.savefig(out, dpi=config.dpi)
    print(out)
    return out


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, use_underscores=True))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
