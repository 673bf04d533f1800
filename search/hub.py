"""Plans to and from the Hugging Face hub: nothing is sent or kept that is not a plan."""

from __future__ import annotations

import shutil
from pathlib import Path

from dit_sparse.hub import CARD, SHARED, fetch, send
from dit_sparse.plan import FILE_NAME, Plan
from dit_sparse.search.report import load_report
from dit_sparse.search.staging import check_writable, staged

REPORTS = ("report.json", "report.md")


def push_plan(folder: Path, repo_id: str, private: bool = False) -> tuple[str, tuple[str, ...]]:
    """Send a plan folder's plan.json and, where they exist, README.md and its report; return address and files sent.

    Raises:
        FileNotFoundError: the folder, or its plan.json, does not exist.
        ValueError: a broken plan or report, a bad repository id, or a public repository where `private` is asked for.
        OSError: the hub refuses or cannot be reached, as with HF_HUB_OFFLINE=1.
    """
    if not (folder / FILE_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {FILE_NAME}; make a plan folder with: dit-sparse plans convert")
    Plan.load(folder)
    files = [name for name in (FILE_NAME, CARD, *REPORTS) if (folder / name).is_file()]
    if "report.json" in files:
        load_report(folder)
    return send(folder, files, repo_id, private), tuple(files)


def pull_plan(repo_id: str, out: Path) -> tuple[Path, ...]:
    """Fetch a plan and its README.md, check the plan, and only then put them into `out`; return the files there.

    Raises:
        FileNotFoundError: no such repository, or one without a plan.
        ValueError: a broken plan, a bad repository id, or a folder that cannot be written. `out` is as it was.
        OSError: the hub cannot be reached.
    """
    check_writable(out)
    folder = fetch(repo_id)
    Plan.load(folder)
    files = [name for name in SHARED if (folder / name).is_file()]
    with staged(out) as staging:
        for name in files:
            shutil.copyfile(folder / name, staging / name)
    return tuple(out / name for name in files)
