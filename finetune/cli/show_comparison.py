"""Print comparisons in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.cli.terminal import shortened, table
from finetune.messages import duration
from finetune.metrics import Metric
from finetune.progress_bars import console
from finetune.tasks import TASKS
from finetune.tasks.leading import WHY_OVER_CLASSES

if TYPE_CHECKING:
    from finetune.demo import DemoResult


def show_comparison(found: Mapping[str, Any], report: str) -> None:
    """Print a comparison for `finetune compare`: arms, differences, verdict, and where the page is.

    Args:
        found: the content of ``comparison.json``, which is also a server's document.
        report: path or URL of the page.
    """
    _show_arms(found)
    _show_verdict(found)
    lines = [f"report    {report}"]
    if found["registered"]:
        lines += [f"model     {found['registered']}", f"serve     finetune serve --model {found['registered']}"]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _show_verdict(found: Mapping[str, Any]) -> None:
    console.print(f"\n[bold]{escape(found['verdict']['sentence'])}[/]\n")


def _show_arms(found: Mapping[str, Any]) -> None:
    """Print a table of the arms, a table of the pairs, and notes on them."""
    key, split = found["headline"], found["split"]
    metric = task_metric(key.removeprefix(f"{split}/"))
    _show_leading_of_arms(found)
    rows = []
    for arm in found["arms"]:
        figure, training = arm["metrics"][key], duration(arm["cost"]["train_seconds"])
        low, high, sd = figure["low"], figure["high"], figure["sd"]
        interval = "" if low is None or high is None else f"{metric.text(low)} – {metric.text(high)}"
        spread = "–" if sd is None else f"± {100 * sd:.1f}" if metric.percent else f"± {sd:.3f}"
        name = f"{'▸' if arm['name'] == found['verdict']['choose'] else ' '} {arm['name']}"
        rows.append([name, len(arm["runs"]), metric.text(figure["value"]), interval, spread, training])
    n = found["arms"][0]["metrics"][key]["n"]
    table(f"{metric.label} on {n:,} {split} images", ["arm", "runs", "mean", "95 % interval", "sd", "training"], rows)
    scale = 100 if metric.percent else 1
    pairs = [
        [
            f"{pair['a']} − {pair['b']}",
            f"{scale * pair['difference']:+.1f}",
            f"{scale * pair['low']:+.1f} to {scale * pair['high']:+.1f}",
            f"{pair['p_adjusted']:.2g}",
            "–" if pair["smallest_detectable"] is None else f"{scale * pair['smallest_detectable']:.1f}",
            f"{pair['a'] if pair['difference'] > 0 else pair['b']} better" if pair["outcome"] == "better" else pair["outcome"],
        ]
        for pair in found["pairs"]
        if pair["metric"] == key
    ]
    unit = "points" if metric.percent else metric.label
    table(f"Differences in {unit}", ["pair", "difference", "95 % interval", "p", "detectable", "verdict"], pairs)
    for arm in found["arms"]:
        if arm["note"]:
            console.print(f"[yellow]note[/] {escape(arm['name'])}: {escape(arm['note'])}")
    if found["left_out"]:
        console.print(f"[yellow]note[/] {found['left_out']:,} images are left out: one of the runs had trained or chosen on them")


def _show_leading_of_arms(found: Mapping[str, Any]) -> None:
    """Print the leading metric of each arm, if it is another one than the headline."""
    leading = found.get("leading", found["headline"])
    if leading == found["headline"]:
        return
    metric = task_metric(leading.partition("/")[2])
    rows = []
    for arm in found["arms"]:
        figure = arm["metrics"][leading]
        low, high = (None if bound is None else metric.text(bound) for bound in (figure["low"], figure["high"]))
        rows.append([arm["name"], metric.text(figure["value"]), "–" if low is None else f"{low} – {high}"])
    table(f"{metric.label} ({found['split']})", ["arm", "mean", "95 % interval"], rows)
    console.print(
        f"({WHY_OVER_CLASSES}; arms are tested by {task_metric(found['headline'].partition('/')[2]).label})", style="dim"
    )


def task_metric(key: str) -> Metric[Any]:
    """Return the metric with this key."""
    return next(metric for task in TASKS for metric in task.metrics if metric.key == key)


def show_demo(result: DemoResult) -> None:
    """Print the demo's comparison, the chosen model's prediction over HTTP, the verdict, and what to do next."""
    found = result.comparison.to_dict()
    _show_arms(found)
    asked = f"{found['registered']} was served, and classified {result.asked.name}, which shows {result.truth!r}:"
    console.print(asked, markup=False)
    for row in result.answer["predictions"]:
        console.print(f"  {row['probability']:7.2%}  {row['label']}", markup=False)
    _show_verdict(found)
    console.print(
        textwrap.dedent(f"""
        This took {duration(result.seconds)}. Where to look next:
          report    {shortened(result.comparison.report)}
          runs      make mlflow      (then open http://127.0.0.1:5000)
          serve     make serve       (then open http://127.0.0.1:3000)
          your own  finetune compare FOLDER_OF_CLASS_FOLDERS
        """),
        markup=False,
    )
