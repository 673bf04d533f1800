"""Made-up reports of a search, cases that stretch them, and a strict reader of pages."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

from PIL import Image

from dit_sparse.patterns import Cached, TopBlocks
from dit_sparse.plan import Plan

Report = dict[str, Any]
PATTERN_TEXTS = ("dense", "topblocks:keep=0.2,compensate=true", "neighborhood:window=0.4", "skip",
                 str(Cached(TopBlocks(0.1), 3)))  # fmt: skip
EVIL = '<script>alert("1")</script> & <img src=http://evil.example/x.png> \' | `tick` $a_1$'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Read a page strictly: every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag != "style").split())


def png(draw: random.Random) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), tuple(draw.randrange(256) for _ in range(3))).save(file, "PNG")
    return file.getvalue()


def spread(draw: random.Random, low: float, high: float) -> Report:
    values = sorted(draw.uniform(low, high) for _ in range(4))
    return {"worst": values[0], "low": values[1], "mean": values[2], "high": values[3]}


def made_measured(draw: random.Random, prompts: int) -> Report:
    numbers = {name: draw.uniform(0, 1) for name in ("ssim", "flicker", "warp_error", "lpips")}
    weights = draw.random() < 0.5  # of LPIPS
    numbers |= {} if weights else {"lpips": None}
    clips = [{"prompt": i, "seed": 7, "psnr_db": draw.uniform(15, 40), **numbers} for i in range(prompts)]
    return {
        "psnr_db": spread(draw, 15, 40), "worst_prompt": draw.randrange(prompts), "worst_seed": 7,
        "ssim": spread(draw, 0, 1), "flicker": spread(draw, 0, 1), "warp_error": spread(draw, -1, 1),
        "lpips": spread(draw, 0, 1) if weights else None,
        "identical": False, "seconds": draw.uniform(20, 90), "attention_seconds": draw.uniform(5, 40),
        "passes": draw.random() < 0.5, "clips": clips,
    }  # fmt: skip


def made_point(draw: random.Random, number: int, prompts: int, rendered: bool) -> Report:
    kind = draw.choice(["searched", "uniform"])
    return {
        "name": f"{kind}-{number}", "kind": kind, "spec": "topblocks:keep=0.2" if kind == "uniform" else None,
        "predicted_ms": draw.uniform(50, 900), "predicted_speedup": draw.uniform(0.8, 4), "density": draw.random(),
        "predicted_loss": draw.choice([0.0, draw.uniform(1e-5, 3)]), "run_density": draw.random(),
        "measured": made_measured(draw, prompts) if rendered else None,
    }  # fmt: skip


def made_map(draw: random.Random, transformers: list[str], groups: int, layers: int, heads: int) -> list[Report]:
    def head() -> Report:
        pattern = draw.choice(PATTERN_TEXTS)
        density = 1.0 if pattern == "dense" else draw.uniform(0, 0.9)
        return {"pattern": pattern, "density": density, "recall": draw.random(), "error": draw.random()}

    return [
        {"transformer": name, "group": group, "layer": layer, "heads": [head() for _ in range(heads)]}
        for name in transformers for group in range(groups) for layer in range(layers)
    ]  # fmt: skip


def made(seed: int, points: int = 9, rendered: float = 1.0, layers: int = 3, heads: int = 4) -> Report:
    """Make up a report. rendered: the share of its points that were."""
    draw = random.Random(seed)
    transformers = ["transformer", "transformer_2"][: draw.randint(1, 2)]
    prompts = [f"prompt {i} {draw.random()}" for i in range(draw.randint(2, 5))]
    edges = [0.0, 0.1, 0.25, 0.5, 1.0]
    shown = [made_point(draw, i, len(prompts), draw.random() < rendered) for i in range(points)]
    return {
        "schema": "dit-sparse/search", "schema_version": 1, "created": "2026-01-02T03:04:05+00:00",
        "request": {
            "model": "some/model", "calibration_prompts": ["a"], "held_out_prompts": prompts, "seeds": [7],
            "job": {"steps": 30, "frames": 81, "height": 480, "width": 832, "guidance": 5.0},
            "gate": {"psnr_db": 25.0, "worst_psnr_db": 20.0, "lpips": None}, "minutes": 30.0, "backend": "auto",
            "specs": None, "densities": [0.1, 0.25], "step_edges": edges, "max_speedup": None,
        },
        "model": {"pipeline": "WanPipeline", "transformers": transformers, "parameters": 1_300_000_000},
        "grid": {"frames": 21, "height": 30, "width": 52, "prefix": 0, "suffix": 0, "tokens": 32760},
        "verdict": "met", "why": f"because {draw.random()}", "plan": Plan.of(TopBlocks(0.2)).to_dict(),
        "chosen": draw.randrange(points) if points else None,
        "dense": {"attention_ms": 900.0, "seconds": 80.0, "attention_seconds": 40.0},
        "yardsticks": {"another seed": {"psnr_db": 14.25, "ssim": 0.5, "lpips": 0.625},
                       "another dense kernel": {"psnr_db": 45.5, "ssim": None}},
        "points": shown, "map": made_map(draw, transformers, 4, layers, heads),
        "sensitivity": {"measured": True, "by_group": [draw.random() for _ in range(4)],
                        "by_layer": {name: [draw.random() for _ in range(layers)] for name in transformers}},
        "prices": {"where": "2 × NVIDIA H200", "shipped": False},
        "worst": [{"prompt": prompts[0], "seed": 7, "psnr_db": 18.5,
                   "pictures": [["dense", "a.png"], ["sparse", "b.png"]]}],
        "timing": {"capture_s": 10.0, "prices_s": 3.0, "sensitivity_s": None, "solve_s": 1.0, "verify_s": 99.0,
                   "total_s": 120.5},
        "environment": {"python": "3.12", "gpu": None, "packages": {"torch": "2.13"}},
        "command": "dit-sparse search --model some/model --minutes 30", "notes": ["a note"],
    }  # fmt: skip


def pictures() -> dict[str, bytes]:
    draw = random.Random()
    return {"a.png": png(draw), "b.png": png(draw)}


def emptied(report: Report) -> None:
    report |= {"points": [], "chosen": None, "map": [], "worst": [], "yardsticks": {}, "grid": None, "notes": []}
    report |= {"verdict": "unverified", "environment": {}}
    report["sensitivity"] = {"measured": False, "by_group": None, "by_layer": None}
    report["dense"] = {"attention_ms": 0.0, "seconds": None, "attention_seconds": None}
    report["request"] |= {"minutes": None, "held_out_prompts": [], "calibration_prompts": [], "specs": ["topblocks"]}
    report["request"]["job"] = dict.fromkeys(report["request"]["job"])
    report["request"]["gate"] = {}
    report["timing"] = dict.fromkeys(report["timing"])


def unrendered(report: Report) -> None:
    for point in report["points"]:
        point["measured"] = None
    report |= {"verdict": "unverified", "worst": [], "yardsticks": {}}
    report["dense"] |= {"seconds": None, "attention_seconds": None}


def half_rendered(report: Report) -> None:
    for point in report["points"][::2]:
        point["measured"] = None


def one_point(report: Report) -> None:
    report |= {"points": report["points"][:1], "chosen": 0, "yardsticks": {}}


def same_place(report: Report) -> None:
    report["points"] = [copy.deepcopy(report["points"][0]) for _ in range(3)]
    report["chosen"] = 1


def identical(report: Report) -> None:
    """Choose a plan without a sparse head, beside points that are not identical."""
    point = report["points"][report["chosen"]]
    point |= {"predicted_speedup": 1.0, "density": 1.0, "run_density": 1.0, "predicted_loss": 0.0}
    point["measured"] |= {"identical": True, "psnr_db": None, "ssim": None}
    for clip in point["measured"]["clips"]:
        clip["psnr_db"] = None
    for unit in report["map"]:
        for head in unit["heads"]:
            head |= {"pattern": "dense", "density": 1.0, "recall": None, "error": None}
    report["worst"][0]["psnr_db"] = None
    report["plan"] = Plan.dense().to_dict()


def all_identical(report: Report) -> None:
    report["yardsticks"] = {"another dense kernel": {"psnr_db": None, "ssim": None}}
    report["request"]["gate"]["psnr_db"] = None
    empty = dict.fromkeys(("mean", "low", "high", "worst"))
    for point in report["points"]:
        point["measured"] |= {"identical": True, "psnr_db": empty}


def capped(report: Report) -> None:
    """Count identical clips as 100 dB, and ask for other things than PSNR."""
    report["yardsticks"]["another seed"]["flicker"] = 0.01
    report["request"]["gate"] = {"worst_ssim": 0.9, "flicker": 0.02, "of_tomorrow": 1.0}
    for point in report["points"][::2]:
        point["measured"] |= {"identical": True, "psnr_db": dict.fromkeys(("mean", "low", "high", "worst"), 100.0)}


def no_attention(report: Report) -> None:
    report["dense"]["attention_seconds"] = None
    for point in report["points"]:
        point["measured"]["attention_seconds"] = None


def some_attention(report: Report) -> None:
    report["points"][0]["measured"]["attention_seconds"] = None


def no_interval(report: Report) -> None:
    for point in report["points"]:
        point["measured"]["psnr_db"] |= {"low": None, "high": None}


def uneven_map(report: Report) -> None:
    """Leave out what is never called, as the experts of Wan 2.2 are in each other's steps."""
    report["map"] = [unit for unit in report["map"] if unit["group"] and unit["layer"] != 1]
    report["map"][0]["heads"] = report["map"][0]["heads"][:1]


def many_points(report: Report) -> None:
    draw = random.Random()
    prompts = len(report["request"]["held_out_prompts"])
    report["points"] = [made_point(draw, i, prompts, draw.random() < 0.5) for i in range(400)]


def large_map(report: Report) -> None:
    report["map"] = made_map(random.Random(), report["model"]["transformers"], 4, 60, 24)


def small_map(report: Report) -> None:
    report["map"] = made_map(random.Random(), ["transformer"], 4, 2, 2)


def nothing_chosen(report: Report) -> None:
    report |= {"chosen": None, "verdict": "not met"}


CASES: list[Callable[[Report], None]] = [
    emptied, unrendered, half_rendered, one_point, same_place, identical, all_identical, capped, no_attention,
    some_attention, no_interval, uneven_map, many_points, large_map, small_map, nothing_chosen,
]  # fmt: skip
