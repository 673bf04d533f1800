"""`find_plan`: the search from Python, with everything that it writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_sparse.pipelines.generate import Job, with_defaults
from dit_sparse.plan import Plan
from dit_sparse.search.plan_folder import write_plan_folder
from dit_sparse.search.planner.capture import Told
from dit_sparse.search.planner.find import WORK, Outcome, search_plan
from dit_sparse.search.planner.gate import USUAL, Gate
from dit_sparse.search.planner.groups import EDGES, StepGroups
from dit_sparse.search.planner.price_table import MEASURED
from dit_sparse.search.planner.report import to_html, to_json, to_markdown
from dit_sparse.search.planner.request import CALIBRATION, HELD_OUT, Search, shipped_prompts
from dit_sparse.search.planner.result import report_of
from dit_sparse.search.staging import check_writable, staged, write_text

PROMPTS, HELD_OUT_PROMPTS = "prompts", "held-out"  # files of out/work and words of the command line
FILES = ("report.html", "report.md", "report.json")


@dataclass(frozen=True, eq=False)
class Found:
    """Hold what a search found: the plan, its verdict ("met", "not met" or "unverified") and why, report and files."""

    plan: Plan
    verdict: str
    why: str
    report: Mapping[str, Any]
    files: tuple[Path, ...]


def find_plan(
    pipe: Any,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    gate: str = USUAL,
    minutes: float | None = None,
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    specs: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    step_edges: Sequence[float] = EDGES,
    sensitivity: bool | None = None,
    most_trials: int = 8,
    batch: int = 1,
    prices: str = MEASURED,
    against: bool = False,
    backend: str = "auto",
    model: str | None = None,
    progress: Told | None = None,
) -> Found:
    """Search the pattern of every step group, layer and head of a pipeline, and write the plan into the folder `out`.

    Candidates are scored on `prompts` beside a dense run, priced on this machine, and chosen by a solver for the least
    attention time; then clips of `held_out` are rendered with every one of `seeds`, and the error budget is changed
    until `gate` holds (e.g. "psnr_db>=25,worst_psnr_db>=20", against the dense clips). `specs` and `densities` replace
    the candidates of the patterns' own suggestion. `sensitivity` renders probes of how much each part of the model
    matters; None decides by the time left. `batch` clips are rendered in one call. `prices`: "measured"
    here, or predicted for another GPU: "shipped", or a file of `dit-sparse bench prices`. What is finished is kept in
    out/work: the same call resumes it. `against` renders uniform patterns beside the plan, for the report.
    `model` names the model in the report, and in the shipped prompts ("bundled").

    The pipeline is left as it was. At the limit of `minutes` the best plan so far is written, marked unverified.

    Raises:
        ValueError: a wrong option, a model without known layers, or out/work of another search.
        OSError: the disk is full or gone; what was finished before stays.
    """
    folder = Path(out)
    name = name_of(pipe, model)
    search = make_search(
        pipe, name, prompts=prompts, held_out=held_out, seeds=seeds, gate=gate, minutes=minutes, steps=steps,
        frames=frames, height=height, width=width, guidance=guidance, specs=specs, densities=densities,
        step_edges=step_edges, sensitivity=sensitivity, most_trials=most_trials, batch=batch, prices=prices,
        against=against, backend=backend,
    )  # fmt: skip
    check_writable(folder)
    outcome = search_plan(pipe, search, folder, progress or (lambda what, done, total: None))
    _keep_prompts(search, folder / WORK)
    report, pictures = report_of(pipe, outcome, name, command_of(search, name, folder))
    return write(folder, outcome, report, pictures)


def name_of(pipe: Any, model: str | None) -> str:
    """Name the model: as its user does, else as it was loaded, else by its class."""
    return model or getattr(pipe, "name_or_path", None) or type(pipe).__name__


def make_search(
    pipe: Any,
    name: str,
    *,
    prompts: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    gate: str = USUAL,
    minutes: float | None = None,
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    specs: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    step_edges: Sequence[float] = EDGES,
    sensitivity: bool | None = None,
    most_trials: int = 8,
    batch: int = 1,
    prices: str = MEASURED,
    against: bool = False,
    backend: str = "auto",
) -> Search:
    """Fill in what a search leaves open, from the pipeline and the shipped prompts.

    Raises: ValueError for a wrong option, or a size that the pipeline has no argument for.
    """
    known, known_held_out = shipped_prompts(name)
    job = with_defaults(pipe, name, Job("-", 0, steps, frames, height, width, guidance))
    options: dict[str, Any] = {} if densities is None else {"densities": tuple(densities)}
    return Search(
        job=job,
        prompts=tuple(known[:CALIBRATION] if prompts is None else prompts),
        held_out=tuple(known_held_out[:HELD_OUT] if held_out is None else held_out),
        seeds=tuple(seeds),
        gate=Gate.parse(gate),
        minutes=minutes,
        specs=None if specs is None else tuple(specs),
        groups=StepGroups(tuple(step_edges)),
        backend=backend,
        sensitivity=sensitivity,
        most_trials=most_trials,
        batch=batch,
        prices=prices,
        against=against,
        **options,
    )


def write(folder: Path, outcome: Outcome, report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Found:
    """Write the plan's folder and the report in three forms."""
    texts = (to_html(report, pictures), to_markdown(report), to_json(report))
    plan = replace(outcome.plan, provenance={**outcome.plan.provenance, **_provenance(report)})
    files = write_plan_folder(folder, plan, _measured(report))
    with staged(folder) as staging:
        for name, text in zip(FILES, texts, strict=True):
            (staging / name).write_text(text, encoding="utf-8")
    return Found(plan, outcome.verdict, outcome.why, report, (*files, *(folder / name for name in FILES)))


def command_of(search: Search, model: str, out: Path) -> str:
    """Return the command line that repeats this search; its own prompts are in files of out/work."""
    job, usual = search.job, Search(search.job, ("-",), ("-",))
    known, known_held_out = shipped_prompts(model)
    words = ["dit-sparse", "search", "--model", model, "--out", out.name, "--gate", str(search.gate)]
    for name in ("steps", "frames", "height", "width", "guidance"):
        if (value := getattr(job, name)) is not None:
            words += [f"--{name}", str(value)]
    for name, texts, shipped in (
        (PROMPTS, search.prompts, known[:CALIBRATION]),
        (HELD_OUT_PROMPTS, search.held_out, known_held_out[:HELD_OUT]),
    ):
        words += [f"--{name}", f"{out.name}/{WORK}/{name}.txt"] if texts != shipped else []
    words += [word for seed in search.seeds for word in ("--seed", str(seed))]
    words += [word for spec in search.specs or () for word in ("--candidate", spec)]
    if search.densities != usual.densities:
        words += [word for density in search.densities for word in ("--density", str(density))]
    words += ["--step-edges", ",".join(map(str, search.groups.edges))] if search.groups != usual.groups else []
    words += {None: [], True: ["--sensitivity"], False: ["--no-sensitivity"]}[search.sensitivity]
    words += ["--trials", str(search.most_trials)] if search.most_trials != usual.most_trials else []
    words += ["--batch", str(search.batch)] if search.batch > 1 else []
    words += ["--prices", search.prices] if search.prices != usual.prices else []
    words += ["--against"] if search.against else []
    words += ["--backend", search.backend] if search.backend != "auto" else []
    words += ["--minutes", str(search.minutes)] if search.minutes is not None else []
    return shlex.join(words)


def _keep_prompts(search: Search, folder: Path) -> None:
    for name, texts in ((PROMPTS, search.prompts), (HELD_OUT_PROMPTS, search.held_out)):
        write_text(folder / f"{name}.txt", "\n".join(" ".join(text.split()) for text in texts) + "\n")


def _provenance(report: Mapping[str, Any]) -> dict[str, Any]:
    environment = report["environment"]
    versions = {name: environment["packages"][name] for name in ("torch", "triton", "diffusers")}
    return {
        "created": report["created"], "verdict": report["verdict"], "gate": report["request"]["gate"],
        "gpu": environment["gpu"], "prices": report["prices"]["where"], "dit_sparse": environment["dit-sparse"],
        **versions, "command": report["command"],
    }  # fmt: skip


def _measured(report: Mapping[str, Any]) -> dict[str, Any]:
    request, chosen = report["request"], report["chosen"]
    found: dict[str, Any] = {
        "gpu": report["environment"]["gpu"] or report["environment"]["cpu"],
        "prompts": len(request["held_out_prompts"]),
        "seeds": request["seeds"],
        "gate": f"{report['verdict']}: {report['why']}",
    }
    if "/" in request["model"] and not Path(request["model"]).exists():
        found["base_model"] = request["model"]
    if chosen is not None and (measured := report["points"][chosen]["measured"]) is not None:
        dense = report["dense"]
        found["rows"] = [
            {
                "run": "dense", "seconds": _rounded(dense["seconds"]),
                "attention s": _rounded(dense["attention_seconds"]),
            },
            {
                "run": "this plan", "seconds": _rounded(measured["seconds"]),
                "attention s": _rounded(measured["attention_seconds"]),
                "PSNR dB": _rounded(measured["psnr_db"]["mean"]),
                "worst PSNR dB": _rounded(measured["psnr_db"]["worst"]),
                "run density": _rounded(report["points"][chosen]["run_density"]),
            },
        ]  # fmt: skip
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
