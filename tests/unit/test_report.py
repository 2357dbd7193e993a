"""The report is one file that loads nothing, shows what was measured, and survives any name that a user may give."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from answers import table

from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.folds import CrossValidation, FoldScore
from finetune.evaluation.mistakes import confident_mistakes
from finetune.evaluation.predictions import Predictions
from finetune.metrics.temperature import fit_softmax_temperature
from finetune.report import figures
from finetune.report.run_figures import draw_figures
from finetune.report.run_page import ReportInputs, ShownMistake, render_report, write_report
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.filterwarnings("error")

NASTY = ("</script><script>alert(1)</script>", "$x^2$ & 'quoted' \"names\"", "猫", "a" * 120, "{braces} %s", "тигр")


def answers(classes: tuple[str, ...], n: int = 120, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(classes), n)
    logits = generator.normal(size=(n, len(classes))).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    return table(logits, labels, classes)


def judged(classes: tuple[str, ...], n: int = 120, seed: int = 0) -> Evaluation:
    return evaluate(answers(classes, n, seed))


def trained_run(folder: Path) -> RunDir:
    """Four epochs of two steps, a better one in the middle, stage signals at each step."""
    run = RunDir(folder).create()
    for epoch, top1 in enumerate([0.5, 0.8, 0.7, 0.6], start=1):
        for step in (2 * epoch - 2, 2 * epoch - 1):
            signals = {
                f"train/{name}/{owner}": 0.1 for name in ("grad_norm", "update_ratio") for owner in ("stage0", "stage10", "head")
            }
            run.metric(step, signals, epoch=step / 2)
        losses = {
            "train/loss": 1 / epoch,
            "val/loss": 1 - top1,
            "train/top1": 0.2 * epoch,
            "val/top1": top1,
            "train/lr": 0.1 / epoch,
        }
        run.metric(2 * epoch, losses, epoch=epoch)
    return run


def inputs(classes: tuple[str, ...] = ("cat", "dog", "owl"), **more) -> ReportInputs:
    predictions = answers(classes)
    mistakes = [
        ShownMistake(
            np.full((40, 60, 3), 7, dtype=np.uint8),
            f"{m.true}/{m.index}.jpg",
            m.true,
            m.predicted,
            m.confidence,
            m.true_probability,
        )
        for m in confident_mistakes(predictions, 4)
    ]
    return ReportInputs(
        **{
            "title": "flowers",
            "evaluations": {"val": evaluate(predictions)},
            "mistakes": mistakes,
            "temperature": fit_softmax_temperature(predictions.logits, predictions.labels),
            **more,
        }
    )


class Page(HTMLParser):
    """The page's tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data


def embedded_svgs(page: Page) -> list[str]:
    prefix = "data:image/svg+xml;base64,"
    sources = [attributes.get("src") or "" for tag, attributes in page.tags if tag == "img"]
    return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources if source.startswith(prefix)]


def write_with_figures(run: RunDir, shown: ReportInputs) -> None:
    write_report(run, shown, draw_figures(read_lines(run.metrics), shown))


def test_a_report_holds_every_figure_and_loads_nothing(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    path = [{"l2": 10.0**k, "val_nll": 1.0 + k * k, "val_score": 0.5} for k in range(-3, 2)]
    write_with_figures(run, inputs(l2_path=path, l2=1.0, phases=[{"name": "top", "n_epochs": 2}, {"name": "all", "n_epochs": 2}]))
    names = {"learning_curves", "learning_rate", "stage_signals", "l2_path", "confusion", "per_class", "reliability"}
    assert {file.stem for file in run.figures.iterdir()} == names
    for file in run.figures.iterdir():
        drawing = ElementTree.parse(file).getroot()
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(str(drawing.get("width")).removesuffix("pt")) > 200
    page = Page(run.report.read_text())
    assert len(embedded_svgs(page)) == len(names)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes
    for svg in embedded_svgs(page):
        assert not re.search(r"""(href|src)=["'](?!#|data:)""", svg)
        assert "url(http" not in svg
        assert "<dc:date>" not in svg
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")


def test_names_that_users_may_give_are_shown_and_never_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    write_with_figures(run, inputs(NASTY, title=NASTY[0], spec={"metadata": {NASTY[0]: NASTY[1]}}, warnings=[NASTY[4]]))
    page = Page(run.report.read_text())
    assert not any(tag == "script" for tag, _ in page.tags)
    for name in NASTY:
        assert name in page.text
    assert all("<script" not in svg for svg in embedded_svgs(page))


def test_the_numbers_on_the_page_are_those_of_the_evaluation() -> None:
    given = inputs(
        cost={"wall_seconds": 65.0, "latency_seconds": 0.0167, "peak_memory_bytes": 2**21, "trainable_parameters": 12810.0},
        parity={"n_from_bytes": 8, "exact": True},
        weights={"license": "Apache-2.0"},
    )
    page = Page(render_report(given, {}))
    evaluation = given.evaluations["val"]
    low, high = evaluation.intervals["top1"]
    for shown in (
        f"{evaluation.values['top1']:.1%}", f"{low:.1%} – {high:.1%}", f"{evaluation.values['loss']:.3f}",
        f"{evaluation.values['ece']:.3f}", "120 images", "val (on which the weights were chosen)",
        "1 min 05 s", "16.7 ms", "2.0 MiB", "12,810", "yes", "Apache-2.0",
    ):  # fmt: skip
        assert shown in page.text
    assert "MiB" not in render_report(inputs(parity={"n_from_bytes": 8}), {})
    for row in evaluation.per_class:
        assert f"{row.recall:.3f}" in page.text


def test_digests_of_frozen_weights_are_compared_for_the_reader() -> None:
    same = render_report(inputs(frozen={"digest_before": "ab", "digest_after": "ab"}), {})
    other = render_report(inputs(frozen={"digest_before": "ab", "digest_after": "cd"}), {})
    assert "they are the same" in same
    assert "the digests differ" not in same
    assert "the digests differ" in other


def test_phases_are_listed_with_what_trains_in_them() -> None:
    head = {"name": "head", "n_epochs": 0, "n_steps": 0, "trainable": (), "head_lr": 0.0}
    tune = {"name": "all", "n_epochs": 3, "n_steps": 1200, "trainable": (0, 1), "head_lr": 3e-4}
    text = render_report(inputs(phases=[head, tune], stage_names={"stage0": "stem", "stage1": "blocks.0"}), {})
    assert '<td>head</td><td>–</td><td class="n">solved</td>' in text
    assert '<td>all</td><td>stem, blocks.0</td><td class="n">3</td><td class="n">1,200</td><td class="n">0.0003</td>' in text


def test_values_stand_beside_where_they_came_from() -> None:
    spec = {"hyperparameters": {"n_epochs": 8, "batch_size": 32}, "suffix": None}
    text = render_report(inputs(spec=spec, sources={"hyperparameters.n_epochs": "auto: 300 images"}), {})
    assert "<td>hyperparameters.n_epochs</td><td>8</td><td>auto: 300 images</td>" in text
    assert "<td>suffix</td><td>–</td><td></td>" in text


def test_classes_without_images_are_named_up_to_ten() -> None:
    classes = tuple(f"c{i}" for i in range(20))
    logits = np.eye(20, dtype=np.float32)[:3]
    evaluation = evaluate(table(logits, np.arange(3), classes))
    text = Page(
        render_report(inputs(evaluations={"test": evaluation}), draw_figures([], inputs(evaluations={"test": evaluation})))
    ).text
    assert "test has no image of c3, c4, c5, c6, c7, c8, c9, c10, c11, c12 and 7 more" in text
    assert "Not one image was labelled wrongly" in text


def test_a_run_without_epochs_has_no_curves() -> None:
    assert {"confusion", "per_class", "reliability"} == set(draw_figures([], inputs()))


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    records = read_lines(trained_run(tmp_path).metrics)
    once, again = (render_report(inputs(), draw_figures(records, inputs())) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("n_classes", [2, 26, 101])
def test_confusion_is_drawn_for_few_and_for_many_classes(n_classes: int) -> None:
    evaluation = judged(tuple(f"class {i}" for i in range(n_classes)), n=300)
    svg = figures.to_svg(figures.confusion_matrix(evaluation))
    assert svg.count("class 1<") == (2 if n_classes <= figures.MAX_LABELLED_CLASSES else 0)


def test_the_best_epoch_is_the_most_accurate_and_among_equals_the_one_with_the_lower_loss() -> None:
    lines = [
        {"epoch": e, "values": {"val/top1": t, "val/loss": n}}
        for e, t, n in [(1, 0.7, 0.9), (2, 0.8, 0.9), (3, 0.8, 0.5), (4, 0.6, 0.1)]
    ]
    assert figures.best_epoch(lines, "top1") == 3
    assert figures.best_epoch([], "top1") is None


def test_of_a_step_that_was_computed_twice_the_last_value_counts() -> None:
    lines = [{"epoch": None, "step": s, "values": {"train/lr": v}} for s, v in [(1, 0.1), (2, 0.2), (1, 0.3)]]
    assert figures.series(lines, "train/lr", by="step") == [(1, 0.3), (2, 0.2)]
    assert figures.series(lines, "train/lr") == []


def test_stage_signals_run_from_the_stem_to_the_head_in_numeric_order(tmp_path: Path) -> None:
    figure = figures.stage_signals(read_lines(trained_run(tmp_path).metrics), {"stage0": "stem"})
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["head", "stage10", "stem"]


def test_one_sample_of_stage_signals_is_no_curve() -> None:
    assert figures.stage_signals([{"step": 0, "epoch": 0, "values": {"train/grad_norm/head": 1.0}}]) is None


def test_a_cross_validation_is_shown_fold_by_fold_with_what_to_expect(tmp_path: Path) -> None:
    scores = tuple(
        FoldScore(number, 160, 40, judged(("cat", "dog"), n=40, seed=number).metrics("test"), f"kept {number}", 2.0)
        for number in (1, 2, 3)
    )
    found = CrossValidation(scores, judged(("cat", "dog")))
    run = RunDir(tmp_path).create()
    write_with_figures(run, inputs(evaluations={"cv": found.pooled}, folds=found, note="what these figures are of"))
    page = Page(run.report.read_text(encoding="utf-8"))
    assert "what these figures are of" in page.text
    assert f"Expect top-1 accuracy {found.spreads['top1'].mean:.1%}" in page.text
    assert all(f"fold {number}" in page.text and f"kept {number}" in page.text for number in (1, 2, 3))
    assert "fitted on the 120 held-out images" in page.text
    assert (run.figures / "fold_scores.svg").stat().st_size > 1000
    assert any("95 % interval of the mean" in svg for svg in embedded_svgs(page))
