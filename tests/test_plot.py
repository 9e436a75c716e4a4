"""scripts/plot.py: what it reads, how it groups and averages runs, and what it draws."""

import csv
import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import plot  # noqa: E402

METRICS = """reward/score reward/kl reward/kl_coef policy/entropy policy/clipfrac policy/approx_kl value/loss
    value/explained_variance rollout/response_length rollout/eos_rate optim/lr optim/critic_lr optim/grad_norm
    optim/critic_grad_norm time/rollout time/score time/update_critic time/update_actor""".split()
CLASSIC = """rollout/return_100 rollout/length_100 policy/entropy policy/clipfrac policy/approx_kl value/loss
    value/explained_variance optim/lr optim/grad_norm time/rollout time/update""".split()


def write_run(
    folder: Path, steps: int = 6, level: float = 0.5, metrics: list[str] = METRICS, **options
) -> Path:
    """A run of ppo_llm.py: every metric is level + step / 10, with an evaluation at every second step."""
    folder.mkdir(parents=True)
    with open(folder / "training_metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "eval/score", "eval/standard_error", *metrics])
        writer.writeheader()
        for step in range(steps + 1):
            row = {"step": step}
            if step % 2 == 0:
                row |= {"eval/score": level + step / 10, "eval/standard_error": 0.125}
            if step > 0:
                row |= dict.fromkeys(metrics, level + step / 10)
            writer.writerow(row)
    (folder / "summary.json").write_text(
        json.dumps({"status": "finished", "config": {"seed": 1, "lr": 0.1} | options})
    )
    return folder


def write_classic_run(folder: Path, seed: int) -> Path:
    """A run of ppo_classic.py: one evaluation, in summary.json, and no finished episode in the first step."""
    folder.mkdir(parents=True)
    with open(folder / "training_metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "global_step", *CLASSIC])
        writer.writeheader()
        for step in range(1, 31):
            row = dict.fromkeys(CLASSIC, step + seed)
            row |= {"step": step, "global_step": 500 * step - seed}
            if step == 1:
                row["rollout/return_100"] = "nan"
            writer.writerow(row)
    evaluation = {"eval/score": 99.0, "eval/standard_error": 3.0, "eval/episodes": 10}
    config = {"env_id": "CartPole-v1", "seed": seed}
    (folder / "summary.json").write_text(json.dumps({"last_evaluation": evaluation, "config": config}))
    return folder


def draw(*runs: Path, **options):
    """The figure of some runs, before it is saved."""
    read = [plot.read_run(run) for run in runs]
    with plot.matplotlib.rc_context(plot.STYLE):
        if len(runs) == 1:
            return plot.draw_run(read[0], None)
        return plot.draw_comparison(
            plot.group_runs(read, options.get("by")), options.get("metrics", []), None
        )


def titles(figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


# ---- Numbers -----------------------------------------------------------------------------------------------


def test_the_running_mean_is_symmetric_and_equals_a_loop():
    y = np.random.default_rng(1).normal(size=23)
    for window in (1, 3, 7):
        smooth = plot.running_mean(y, window)
        for i in range(23):
            half = min(window // 2, i, 22 - i)
            assert smooth[i] == pytest.approx(y[i - half : i + half + 1].mean())


def test_the_running_mean_of_a_line_is_the_line():
    y = np.linspace(3, 5, 40)
    assert plot.running_mean(y, 9) == pytest.approx(y)


def test_seeds_are_averaged_where_all_of_them_are_known():
    first = (np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0]))
    second = (np.array([1.0, 3.0]), np.array([5.0, 7.0]))
    x, mean, low, high = plot.average_seeds([first, second])
    assert x.tolist() == [1, 2, 3]
    assert mean.tolist() == [3, 4, 5]
    assert low.tolist() == [1, 2, 3]
    assert high.tolist() == [5, 6, 7]


# ---- Reading and grouping ----------------------------------------------------------------------------------


def test_a_curve_has_only_the_steps_that_measured_it(tmp_path):
    run = plot.read_run(write_run(tmp_path / "run"))
    assert run.curves["eval/score"][0].tolist() == [0, 2, 4, 6]
    assert run.curves["reward/kl"][0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_row_that_is_not_finished_is_read_as_far_as_it_goes(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "training_metrics.csv", "a") as file:
        file.write("7,,,0.25,1e")
    run = plot.read_run(folder)
    assert run.curves["reward/score"][1][-1] == 0.25
    assert run.curves["reward/kl"][0][-1] == 6


def test_a_classic_run_counts_environment_steps_and_knows_its_evaluation(tmp_path):
    run = plot.read_run(write_classic_run(tmp_path / "run", seed=3))
    assert run.x_name == "environment steps"
    assert run.curves["rollout/return_100"][0][0] == 997
    assert [x.tolist() for x in run.curves["eval/score"]] == [[14997], [99]]


@pytest.mark.parametrize("text", ["", "step,reward/score\n", "a,b\n1,2\n", "step,reward/score\n1,\n"])
def test_a_table_without_numbers_is_refused_with_a_sentence(tmp_path, text):
    (tmp_path / "training_metrics.csv").write_text(text)
    with pytest.raises(plot.UsageError, match="training_metrics.csv"):
        plot.read_run(tmp_path)


def test_runs_that_differ_only_in_the_seed_make_one_curve(tmp_path):
    folders = [
        write_run(tmp_path / f"{lr}{seed}", lr=lr, seed=seed, output_dir=f"{lr}{seed}")
        for lr, seed in ((0.1, 1), (0.1, 2), (0.2, 1))
    ]
    groups = plot.group_runs([plot.read_run(folder) for folder in folders], None)
    assert {label: len(runs) for label, runs in groups.items()} == {"lr 0.1": 2, "lr 0.2": 1}


def test_an_option_of_choice_tells_curves_apart_and_a_mixture_is_said(tmp_path, capsys):
    folders = [
        write_run(tmp_path / str(i), lr=lr, lam=lam, seed=i)
        for i, (lr, lam) in enumerate(((0.1, 1.0), (0.2, 1.0), (0.1, 0.95)))
    ]
    runs = [plot.read_run(folder) for folder in folders]
    groups = plot.group_runs(runs, "lam")
    assert {label: len(group) for label, group in groups.items()} == {"lam 1.0": 2, "lam 0.95": 1}
    assert "lam 1.0 mixes runs that also differ in lr" in capsys.readouterr().err
    with pytest.raises(plot.UsageError, match="no such option"):
        plot.group_runs(runs, "gamma")


def test_copies_of_tables_are_grouped_by_their_names(tmp_path):
    for name in ("demo_seed1", "demo_seed2", "control"):
        folder = write_run(tmp_path / name)
        (folder / "training_metrics.csv").rename(tmp_path / f"{name}.csv")
    runs = [plot.read_run(path) for path in sorted(tmp_path.glob("*.csv"))]
    assert {label: len(group) for label, group in plot.group_runs(runs, None).items()} == {
        "control": 1,
        "demo": 2,
    }


# ---- Drawing -----------------------------------------------------------------------------------------------


def test_the_figure_of_one_run_has_the_nine_panels(tmp_path):
    figure = draw(write_run(tmp_path / "run"))
    assert titles(figure) == [
        "Score",
        "KL to the reference",
        "Entropy of the policy",
        "Size of the update",
        "Critic",
        "Response length",
        "Learning rates",
        "Gradient norms",
        "Time by phase",
    ]


def test_a_run_without_critic_or_kl_has_no_panel_for_them(tmp_path):
    metrics = [
        name for name in METRICS if "critic" not in name and not name.startswith(("value/", "reward/kl"))
    ]
    figure = draw(write_run(tmp_path / "run", metrics=metrics))
    assert "Critic" not in titles(figure)
    assert "KL to the reference" not in titles(figure)
    assert len(titles(figure)) == 7


def test_the_figure_of_a_classic_run_shows_returns_and_the_evaluation(tmp_path):
    figure = draw(write_classic_run(tmp_path / "run", seed=1))
    assert titles(figure)[0] == "Return"
    assert "Score" not in titles(figure)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["evaluation", "last 100 episodes"]


def test_evaluations_have_error_bars(tmp_path):
    figure = draw(write_run(tmp_path / "run"))
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    ends = np.array([bar[:, 1] for bar in bars])
    assert ends == pytest.approx(np.array([[0.375, 0.625], [0.575, 0.825], [0.775, 1.025], [0.975, 1.225]]))


def test_a_comparison_draws_the_mean_in_a_band_over_seeds(tmp_path):
    runs = [
        write_run(tmp_path / str(seed), level=level, seed=seed) for seed, level in enumerate((0.0, 0.25, 1.0))
    ]
    figure = draw(*runs, metrics=["eval/score"])
    axis = figure.axes[0]
    assert axis.get_lines()[0].get_ydata() == pytest.approx(
        np.mean([0, 0.25, 1]) + np.array([0, 0.2, 0.4, 0.6])
    )
    corners = axis.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0)
    assert corners[:, 1].max() == pytest.approx(1.6)
    words = [text.get_text() for text in figure.texts]
    assert any("band: smallest to largest seed" in text for text in words)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all runs (seeds: 3)"]


def test_a_very_negative_explained_variance_is_drawn_at_the_edge_and_said(tmp_path):
    figure = draw(write_run(tmp_path / "run", level=-300.0))
    critic = titles(figure).index("Critic")
    labels = [text.get_text() for text in figure.axes[critic].get_legend().get_texts()]
    assert labels == ["value loss", "explained variance (below -1 drawn there)"]


@pytest.mark.parametrize("write", [write_run, write_classic_run])
def test_no_legend_lies_over_a_curve_and_no_curve_on_the_frame(tmp_path, write):
    figure = draw(write(tmp_path / "run", seed=1))
    figure.savefig(tmp_path / "figure.png")
    for axis in figure.axes:
        frame = axis.get_window_extent()
        if axis.get_legend():
            assert axis.get_legend().get_window_extent().y0 >= frame.y1 - 2
        for line in axis.get_lines():
            points = axis.transData.transform(line.get_xydata())
            if len(points) and axis.get_title(loc="left") != "Time by phase":
                assert points[:, 1].min() > frame.y0 + 2
                assert points[:, 1].max() < frame.y1 - 2


@pytest.mark.slow
def test_files_are_written_where_they_are_asked_for(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    other = write_run(tmp_path / "other", lr=0.5)
    assert plot.main(plot.Config([run], dpi=50)) == run / "curves.png"
    assert matplotlib.image.imread(run / "curves.png").shape[1] > 500
    plot.main(plot.Config([run, other], by="lr", metrics=["eval/score"], out=tmp_path / "figure.pdf"))
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    monkeypatch.chdir(tmp_path)
    plot.main(plot.Config([run, other], metrics=["eval/score"]))
    assert (tmp_path / "curves.png").exists()


def test_language_models_and_environments_do_not_share_a_figure(tmp_path):
    runs = [write_run(tmp_path / "a"), write_classic_run(tmp_path / "b", 1)]
    with pytest.raises(plot.UsageError, match="do not fit"):
        plot.main(plot.Config(runs))
