"""The integer program of the pattern search, over what the Lagrangian bound has left open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from dit_sparse.search.planner.dual import MS, Bools, Table
from dit_sparse.search.planner.problem import Choice, Floats

# HiGHS works to absolute 1e-6: rows and goal are scaled so that this is 1e-9 and 1e-10 of the whole.
BUDGET_SCALE, GOAL_SCALE = 1e3, 1e4


@dataclass(frozen=True, eq=False)
class Program:
    """Hold the columns x (a head's candidate), w (a unit's subset of families) and y (a unit runs a family).

    sum_c x[u, h, c] = 1; sum_s w[u, s] = 1; y[u, f] = sum of w[u, s] with f in s; sum of x[u, h, c in f] <= y[u, f].
    """

    x: tuple[NDArray[np.intp], ...]  # u, h, c of every column
    shape: tuple[int, ...]  # U, H, C
    rows: coo_array
    most: Floats  # of every row
    equal: Bools  # rows that must be most, not at most
    ms: Floats  # of every column
    loss: Floats
    whole: Bools  # columns that are 0 or 1


def count_columns(open_: Bools, subsets: Bools) -> int:
    """Say how many decisions a program would hold: candidates [U, H, C] and subsets of families [2^F, U]."""
    return int(open_.sum() + subsets.sum())


def make_program(table: Table, open_: Bools, subsets: Bools) -> Program:
    """Write the program over open candidates [U, H, C] and subsets of families [2^F, U]."""
    U, H, C = open_.shape
    F = len(table.families)
    family = np.zeros(C, dtype=np.intp)
    for f, columns in enumerate(table.families):
        family[columns] = f
    u, h, c = np.nonzero(open_)
    s, v = np.nonzero(subsets)
    held, f_held = np.nonzero(s[:, None] >> np.arange(F) & 1)  # (place in s, family) of what a subset holds
    cells, link = np.unique((u * H + h) * F + family[c], return_inverse=True)
    y = len(u) + len(s)  # the first column of y
    one_head, one_subset, is_y, linked = 0, U * H, U * H + U, U * H + U + U * F
    entries = [
        (one_head + u * H + h, np.arange(len(u)), 1.0),
        (one_subset + v, len(u) + np.arange(len(s)), 1.0),
        (is_y + v[held] * F + f_held, len(u) + held, 1.0),
        (is_y + np.arange(U * F), y + np.arange(U * F), -1.0),
        (linked + link, np.arange(len(u)), 1.0),
        (linked + np.arange(len(cells)), y + cells // (H * F) * F + cells % F, -1.0),
    ]
    row, column = (np.concatenate([entry[i] for entry in entries]) for i in (0, 1))
    value = np.concatenate([np.full(len(rows), number) for rows, _, number in entries])
    zeros = np.zeros(U * F)
    return Program(
        x=(u, h, c),
        shape=open_.shape,
        rows=coo_array((value, (row, column)), shape=(linked + len(cells), y + U * F)),
        most=np.repeat([1.0, 0.0], [is_y, U * F + len(cells)]),
        equal=np.arange(linked + len(cells)) < linked,
        ms=np.concatenate([table.ms[u, h, c], table.fees_ms[s, v], zeros]),
        loss=np.concatenate([table.loss[u, h, c], np.zeros(len(s)), zeros]),
        whole=np.arange(y + U * F) < y,
    )


def run_program(
    program: Program, goal: int, budget: float, scale: float, most_gap: float, most_seconds: float
) -> tuple[Choice | None, float]:
    """Minimise one figure with the other within a budget > 0; return the choice, if any, and the proven bound.

    scale: about the size of the goal. The budget is met to 1e-9 of itself.
    """
    figures = (program.ms, program.loss) if goal == MS else (program.loss, program.ms)
    spend = coo_array((figures[1] * (BUDGET_SCALE / budget))[None])
    answer = milp(
        figures[0] * (GOAL_SCALE / scale),
        integrality=program.whole,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(program.rows.tocsc(), np.where(program.equal, program.most, -np.inf), program.most),
            LinearConstraint(spend.tocsc(), -np.inf, BUDGET_SCALE),
        ],
        options={"mip_rel_gap": most_gap, "time_limit": most_seconds},
    )
    bound = 0.0 if answer.mip_dual_bound is None else answer.mip_dual_bound * (scale / GOAL_SCALE)
    if answer.x is None:
        return None, bound
    share = np.zeros(program.shape)
    share[program.x] = answer.x[: len(program.x[0])]
    return share.argmax(axis=-1), bound
