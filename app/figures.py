"""What one plan cost and bought, as HTML: seconds, density, distance from dense, what stayed dense, where it ran.

All text of a report is escaped by the template; a report may hold a visitor's prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.search.report_parts import number, seconds, times

HERE = Path(__file__).parent
SEED = "another seed"
# label, format, what the number says, whether more (+1) or less (-1) is closer to dense; 0: no distance from dense
METRICS = {
    "psnr_db": ("PSNR, dB", ".1f", "more is closer to dense", 1),
    "ssim": ("SSIM", ".3f", "1: the same structure", 1),
    "lpips": ("LPIPS", ".4f", "0: looks the same", -1),
    "flicker": ("flicker", ".4f", "0: changes from frame to frame as dense does", -1),
    "warp_error": ("warp error", "+.4f", "above 0: less steady than dense, below: steadier", 0),
}
DENSITIES = {
    "density": "pairs attended in sparse calls",
    "computed_density": "pairs in the blocks that the kernel reads",
    "run_density": "pairs of the whole run, dense calls with it",
}
# what the schedule notes for calls that somebody asked to stay dense, in words for a visitor
REASONS = {
    "plan: dense": "the plan runs them dense",
    "dense_layers": "layers that the option dense_layers keeps dense",
    "dense_steps": "steps that the option dense_steps keeps dense",
}
PACKAGES = ("torch", "triton", "diffusers")


@dataclass(frozen=True)
class Bar:
    """Hold one bar: whose it is, its length as a share of the scale in [0, 1], its figure as text."""

    label: str
    share: float | None  # None: no figure, no bar
    text: str
    kind: str  # class of the style sheet


def figures_view(html: str = "", elem_id: str = "figures") -> gr.HTML:
    """Make the component that shows what `figures_html` returns."""
    css = (HERE / "figures.css").read_text(encoding="utf-8")
    return gr.HTML(html, css_template=css, apply_default_css=False, elem_id=elem_id)


def figures_html(report: Mapping[str, Any], name: str) -> str:
    """Write all figures of one plan of a valid report as HTML.

    Raises:
        ValueError: the report has no such plan.
    """
    import jinja2

    run = run_named(report, name)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = {
        "report": report,
        "run": run,
        "headline": headline(report, run),
        "job": job_line(report),
        "groups": seconds_bars(report, run),
        "memory": _memory(report, run),
        "densities": density_bars(run),
        "heads": quality_headings(report),
        "qualities": quality_rows(report, run),
        "yardstick": seed_yardstick(report) is not None,
        "calls": calls_bar(run),
        "reasons": dense_reasons(run),
        "environment": environment_line(report),
    }
    return environment.from_string((HERE / "figures.html").read_text(encoding="utf-8")).render(shown)


def run_named(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the run of a plan.

    Raises:
        ValueError: the report has no such plan.
    """
    runs = {run["name"]: run for run in report["sparse"]}
    if name not in runs:
        raise ValueError(f"no plan {name!r} in this comparison; it has {', '.join(runs)}")
    return runs[name]


def headline(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the first figures to read: figure, what it is, what it is made of."""
    dense, kept = report["dense"], run["computed_density"]
    found = [(times(run["speedup"]), "whole run", f"{seconds(dense['seconds'])} s → {seconds(run['seconds'])} s")]
    if run["attention_speedup"] is not None:
        spent = f"{seconds(dense['attention_seconds'])} s → {seconds(run['attention_seconds'])} s"
        found.append((times(run["attention_speedup"]), "attention", spent))
    if kept is not None:
        found.append((_percent(kept["kept"]), "kept in sparse calls", f"skips {_percent(kept['skipped'])}"))
    psnr = "identical" if run["metrics"]["identical"] else f"{number(run['metrics']['psnr_db'], '.1f')} dB"
    found.append((psnr, "PSNR against dense", _seed_verdict(report, run)))
    return found


def seconds_bars(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Return for the whole run, attention and the rest a bar each for dense and sparse, all on one scale from zero."""
    both = {"dense": report["dense"], "sparse": run}
    spent = {
        "whole run": {kind: one["seconds"] for kind, one in both.items()},
        "attention": {kind: one["attention_seconds"] for kind, one in both.items()},
        "the rest": {kind: _rest(one) for kind, one in both.items()},
    }
    longest = max(value for group in spent.values() for value in group.values() if value is not None)
    return [
        (label, [_seconds_bar(kind, value, longest) for kind, value in group.items()])
        for label, group in spent.items()
    ]  # fmt: skip


def density_bars(run: Mapping[str, Any]) -> list[tuple[str, Bar]]:
    """Return what each density counts and its bar: the share kept, with what is skipped told."""
    found = []
    for name, what in DENSITIES.items():
        value = run[name]
        if value is None:
            bar = Bar(name, None, "nothing ran sparse", "sparse")
        else:
            text = f"keeps {_percent(value['kept'])}, skips {_percent(value['skipped'])}"
            bar = Bar(name, value["kept"], text, "sparse")
        found.append((what, bar))
    return found


def calls_bar(run: Mapping[str, Any]) -> Bar:
    """Return the share of attention calls that ran sparse."""
    sparse, dense = run["sparse_calls"], run["dense_calls"]
    share = sparse / (sparse + dense) if sparse + dense else None
    return Bar("calls", share, f"{sparse} of {sparse + dense} attention calls ran sparse, {dense} dense", "sparse")


def dense_reasons(run: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return why calls stayed dense and how many, the most frequent first."""
    found = sorted(run["dense_reasons"].items(), key=lambda item: -item[1])
    return [(f"{REASONS[reason]} ({reason})" if reason in REASONS else reason, count) for reason, count in found]


def seed_yardstick(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return how far a dense clip of another seed is from this dense clip, or None where that was not measured."""
    found: Mapping[str, Any] | None = report.get("yardsticks", {}).get(SEED)
    return found


def quality_headings(report: Mapping[str, Any]) -> tuple[str, ...]:
    return ("measure", "this plan", *((SEED,) if seed_yardstick(report) else ()), "how to read it")


def quality_rows(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each metric under `quality_headings`; only with a yardstick does a row judge."""
    metrics, yardstick = run["metrics"], seed_yardstick(report)
    rows = []
    for name, (label, form, what, closer) in METRICS.items():
        if name not in metrics or (name == "lpips" and metrics[name] is None):  # where its weights are not installed
            continue
        row = [label, _metric(metrics, name, form)]
        if yardstick is not None:
            row.append(_metric(yardstick, name, form))
            verdict = compared(_value(metrics, name), _value(yardstick, name), closer)
            what = f"{verdict}; {what}" if verdict else what
        rows.append((*row, what))
    return rows


def compared(value: float | None, seed: float | None, closer: int) -> str:
    """Judge a metric by what another seed changes; empty where a side is missing or the metric is no distance."""
    if value is None or seed is None or closer == 0:
        return ""
    if closer * value > closer * seed:
        return f"differs less than {SEED} would"
    return f"differs at least as much as {SEED} would"


def job_line(report: Mapping[str, Any]) -> str:
    """Say what was generated."""
    request, grid = report["request"], report["grid"]
    parts = [f"{request['frames']} frames of {request['width']} × {request['height']}", f"{request['steps']} steps"]
    parts += [f"seed {request['seed']}", f"model {request['model']}"]
    return ", ".join(parts if grid is None else [*parts, f"{grid['tokens']:,} tokens"])


def environment_line(report: Mapping[str, Any]) -> str:
    """Say on one line where it ran."""
    found = report["environment"]
    packages = found.get("packages") or {}
    parts = [found.get("gpu") or found.get("cpu"), f"{report['request']['device']}, {report['request']['dtype']}"]
    parts += [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
    parts += [f"Python {found.get('python')}", f"dit-sparse {found.get('dit-sparse')}", report["created"][:10]]
    return " · ".join(part for part in parts if part)


def _seed_verdict(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    seed = seed_yardstick(report)
    if run["metrics"]["identical"]:
        return "every pixel is the same"
    if seed is None:
        return "not compared with another seed"
    return compared(_value(run["metrics"], "psnr_db"), _value(seed, "psnr_db"), 1)


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return a metric, with the infinite PSNR of identical clips that JSON cannot hold."""
    found: float | None = math.inf if name == "psnr_db" and metrics["identical"] else metrics.get(name)
    return found


def _metric(metrics: Mapping[str, Any], name: str, form: str) -> str:
    if name == "psnr_db" and metrics["identical"]:
        return "identical"
    value = metrics.get(name)
    return "not measured" if value is None else number(value, form)


def _rest(run: Mapping[str, Any]) -> float | None:
    """Return the seconds outside attention; None where attention was not timed, or by its own pass took longer."""
    attention = run["attention_seconds"]
    if attention is None or attention > run["seconds"]:
        return None
    rest: float = run["seconds"] - attention
    return rest


def _seconds_bar(kind: str, value: float | None, longest: float) -> Bar:
    if value is None:
        return Bar(kind, None, "not known", kind)
    return Bar(kind, value / longest, f"{seconds(value)} s", kind)


def _memory(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    sizes: Sequence[int | None] = (report["dense"]["peak_memory_bytes"], run["peak_memory_bytes"])
    dense, sparse = sizes
    if dense is None or sparse is None:
        return ""
    return f"Peak GPU memory: dense {dense / 2**30:.2f} GiB, sparse {sparse / 2**30:.2f} GiB."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
