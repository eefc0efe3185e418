"""The panel of a run's curves: what it shows, and that a person can read it."""

import json
import re
import runpy
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.evaluation.panel import draw_panel, panel_figure, running_median
from am_diffusers.system.files import read_lines

SCRIPT = Path(__file__).parents[2] / "scripts/plot_run.py"
CONFIG = {"output_dir": "outputs/mine", "rewards": [{"name": "pickscore"}], "max_grad_norm": 1.0}


def training_lines(iterations, steps=6):
    rng = np.random.default_rng(0)
    return [
        {
            "iteration": i,
            "loss": float(rng.lognormal(6, 1)),
            "reward": 19 + i / 100,
            "path_kl": i / 3,
            "grad_norm": float(rng.lognormal(3, 1)),
            "learning_rate": 1e-3 * (1 - i / iterations),
            **{f"adjoint_norm/{k:02d}": float(rng.lognormal(k / steps, 1)) for k in range(1, steps + 1)},
        }
        for i in range(iterations)
    ]


def validation_lines(iterations, names=("pickscore", "hpsv2"), diversity=True, certified=False):
    lines = []
    for i in iterations:
        line = {"iteration": i}
        for place, name in enumerate(names):
            gain = i / 100 * (-1) ** place
            key = f"validation/{name}_gain"
            line |= {key: gain, f"{key}_low": gain - 0.1, f"{key}_high": gain + 0.1}
        if diversity:
            kept = 1 - i / 1000
            line |= {
                f"validation/diversity_kept{e}": kept + d
                for e, d in (("", 0), ("_low", -0.1), ("_high", 0.1))
            }
        if certified:
            line |= {"validation/path_kl": i / 100, "validation/gain": i / 300}
            line |= {"validation/gain_low": i / 400, "validation/gain_high": i / 200}
        lines.append(line)
    return lines


REWARDS = ("pickscore", "hpsv2", "image_reward", "clip_score", "aesthetic", "imagenet_class")
CASES = {
    "200 iterations": (training_lines(200), validation_lines(range(0, 201, 50))),
    "before the first iteration": ([], validation_lines([0])),
    "one iteration": (training_lines(1), validation_lines([0])),
    "no validation yet": (training_lines(12), []),
    "40 steps, 6 rewards": (training_lines(600, 40), validation_lines(range(0, 601, 50), REWARDS)),
    "no diversity": (training_lines(12), validation_lines(range(0, 12, 3), diversity=False)),
    "certified": (
        training_lines(200),
        validation_lines(range(0, 201, 50), certified=True),
        Frontier(np.random.default_rng(0).normal(size=(8, 32)), {}),
    ),
    "another method": ([{"iteration": i, "loss": -1.0, "reward": 1.0} for i in range(5)], []),
}


def texts_of(figure):
    """Every text that is drawn, with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ticks = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in labels_of(axis)}
    drawn = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in shown(axis)}
    return [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and (text not in ticks or text in drawn)
    ]


def labels_of(axis):
    return [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True), axis.label]


def shown(axis):
    """Labels of the axis within its limits; matplotlib keeps others that it doesn't draw."""
    low, high = sorted(axis.get_view_interval())
    place = 0 if axis.axis_name == "x" else 1
    labels = [t for t in labels_of(axis) if t is axis.label or low <= t.get_position()[place] <= high]
    return labels if axis.get_visible() else []


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_text_overlaps_another_or_leaves_the_picture(case):
    figure = panel_figure(CONFIG, *case)
    texts = texts_of(figure)
    assert len(texts) > 10
    for text, box in texts:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (one, box), (other, other_box) in combinations(texts, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (one, other)


def test_every_axis_says_what_it_is():
    figure = panel_figure(CONFIG, *CASES["certified"])
    plots = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(plots) == 8
    assert {axes.get_xlabel() for axes in plots} == {"iteration", "KL from the base (nats)"}
    assert all(axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_plots_have_the_same_whole_iterations(case):
    figure = panel_figure(CONFIG, *case)
    FigureCanvasAgg(figure).draw()
    plots = [axes for axes in figure.axes if axes.get_xlabel() == "iteration"]
    assert len({axes.get_xlim() for axes in plots}) == 1
    for axes in plots:
        ticks = [text for text in axes.get_xticklabels() if text in shown(axes.xaxis)]
        assert all(re.fullmatch(r"\d+", text.get_text()) for text in ticks)


def test_curves_are_the_metrics_and_say_who_was_trained():
    training, validation = CASES["200 iterations"]
    figure = panel_figure(CONFIG, training, validation)
    gains, diversity, kl = figure.axes[:3]
    curves = {line.get_label(): line for line in gains.lines}
    assert curves["pickscore (trained)"].get_linestyle() == "-"
    assert curves["hpsv2 (held-out)"].get_linestyle() == "--"
    assert list(curves["hpsv2 (held-out)"].get_xdata()) == [0, 50, 100, 150, 200]
    assert curves["hpsv2 (held-out)"].get_ydata() == pytest.approx([0, -0.5, -1, -1.5, -2])
    assert diversity.lines[1].get_ydata() == pytest.approx([1, 0.95, 0.9, 0.85, 0.8])
    assert kl.lines[0].get_ydata() == pytest.approx([i / 3 for i in range(200)])


def test_the_way_of_a_run_is_drawn_under_the_frontier():
    figure = panel_figure(CONFIG, *CASES["certified"])
    (plane,) = [axes for axes in figure.axes if "KL from" in axes.get_xlabel()]
    frontier, curves = CASES["certified"][2], {line.get_label(): line for line in plane.lines}
    unit = frontier.rewards.std()
    assert curves["this run"].get_xdata() == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert curves["this run"].get_ydata() == pytest.approx(np.arange(5) / 6 / unit)
    kl, gain = curves["the tilt"].get_data()
    assert gain[10] == pytest.approx((2 * kl[10]) ** 0.5 / unit * frontier.variance.mean() ** 0.5, rel=0.1)
    two = (frontier.best[:, 1].mean() - frontier.rewards.mean()) / unit
    assert curves["best of n"].get_xydata()[1] == pytest.approx([np.log(2) - 0.5, two])


def test_running_median_follows_a_line_and_ignores_an_outlier():
    values = np.arange(100.0)
    iterations, medians = running_median(values + 7, values)
    assert list(iterations) == list(values + 7)
    assert medians[:90] == pytest.approx(values[:90])
    values[50] = 1e9
    assert running_median(values, values)[1].max() < 100
    assert list(running_median(np.array([0, 1]), np.array([3.0, 1.0]))[1]) == [3.0, 1.0]


def test_a_long_run_has_as_many_points_as_a_short_one():
    values = np.arange(20_001.0)
    iterations, medians = running_median(values, values)
    assert len(iterations) == 500
    assert (iterations[0], iterations[-1]) == (0, 20_000)
    assert medians[:400] == pytest.approx(iterations[:400])


def write_run(folder, training, validation):
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for name, lines in (("metrics", training), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_picture_is_1400_pixels_wide_and_replaced(tmp_path):
    write_run(tmp_path, *CASES["no validation yet"])
    path = draw_panel(tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / "samples/panel.png"
    assert Image.open(path).width == 1400
    write_run(tmp_path, *CASES["200 iterations"])
    assert draw_panel(tmp_path).read_bytes() != first
    assert [file.name for file in path.parent.iterdir()] == ["panel.png"]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iterat')
    assert [line["iteration"] for line in read_lines(path)] == [0, 1]
    path.write_text('{"iterat')
    assert read_lines(path) == []


def test_the_script_draws_a_run_and_refuses_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*expected the output folder of a run"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    write_run(tmp_path, *CASES["one iteration"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "samples/panel.png")
