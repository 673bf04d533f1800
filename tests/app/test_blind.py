"""The blind test: nothing on the wire tells, votes count once, the interval is Wilson's."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from scipy.stats import binomtest

from dit_sparse.app import blind
from dit_sparse.app.blind import SIDES, BlindTest, Tally, hidden_copies
from tests.app.made import STORED

CLIPS = (STORED / "dense.mp4", STORED / "sparse-balanced.mp4")


@pytest.mark.parametrize("votes", [1, 2, 20, 1000])  # the ends of the formula, a few visitors, many
def test_interval(votes: int) -> None:
    for right in {0, 1, votes // 2, votes, random.randint(0, votes)}:
        low, high = Tally(votes, right).interval()
        wanted = binomtest(right, votes).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_sentences() -> None:
    assert Tally().sentence() == "No votes yet."
    assert Tally().interval() == (0.0, 1.0)
    assert Tally(20, 14).sentence().startswith("14 of 20 right (70%; 95 %: 48% to 85%): no more than guessing")
    assert Tally(20, 16).sentence().endswith("more than guessing.")
    assert "less than guessing" in Tally(20, 2).sentence()
    for _ in range(300):
        votes = random.randint(1, 400)
        right = random.randint(0, votes)
        wanted = binomtest(right, votes).proportion_ci(0.95, method="wilson")
        assert Tally(votes, right).sentence().endswith(": more than guessing.") == (wanted.low > 0.5)
        assert Tally(votes, right).wrong == votes - right


def test_copies_do_not_tell(tmp_path: Path) -> None:
    one, other = hidden_copies(CLIPS, tmp_path / "clips")
    again = hidden_copies(CLIPS, tmp_path / "clips")
    assert len({path.name for path in (one, other, *again)}) == 4
    assert one.stat().st_size == other.stat().st_size
    assert one.stat().st_mtime == other.stat().st_mtime
    assert len(one.name) == len(other.name)
    assert one.read_bytes() != again[0].read_bytes()
    for name in ("dense", "sparse", "balanced"):
        assert name not in str(one.name) + str(other.name)
    for clip, copy in zip(CLIPS, (one, other), strict=True):
        frames = iio.imread(copy, plugin="FFMPEG")
        assert len(frames) == 33
        assert np.array_equal(frames, iio.imread(clip, plugin="FFMPEG")), "the same clip"
    with pytest.raises(FileNotFoundError):
        hidden_copies((CLIPS[0], tmp_path / "missing.mp4"), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_questions_and_votes(tmp_path: Path) -> None:
    test = BlindTest(tmp_path)
    dense_first = CLIPS[0].read_bytes()
    right, asked, sides = 0, 40, set()
    for _ in range(asked):
        question = test.ask(*CLIPS, about="balanced")
        truth = next(side for side in SIDES if getattr(question, side).read_bytes().startswith(dense_first))
        vote = random.choice(SIDES)
        answer = test.vote(question.key, vote)
        assert answer.dense_side == truth
        assert answer.right == (vote == truth)
        right += answer.right
        sides.add(truth)
        with pytest.raises(ValueError, match="answered already"):
            test.vote(question.key, vote)
    assert sides == set(SIDES)
    assert test.tally("balanced") == Tally(asked, right)
    assert test.tally("another") == Tally()
    for key, side in (("nonsense", "left"), ("", "right")):
        with pytest.raises(ValueError, match="not known any more"):
            test.vote(key, side)
    with pytest.raises(ValueError, match="side must be one of left, right"):
        test.vote(question.key, "../dense.mp4")
    test.close()
    assert not list(tmp_path.iterdir())
    assert test.tally("balanced") == Tally(asked, right)


def test_sides_are_drawn_from_the_seed(tmp_path: Path) -> None:
    def drawn(seed: int | None) -> list[str]:
        test = BlindTest(tmp_path, seed)
        return [test.vote(test.ask(*CLIPS, about="x").key, "left").dense_side for _ in range(48)]

    assert drawn(7) == drawn(7)
    assert drawn(None) != drawn(None)


def test_old_clips_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "MOST_QUESTIONS", 3)
    test = BlindTest(tmp_path)
    questions = [test.ask(*CLIPS, about="x") for _ in range(5)]
    kept = {path for question in questions[2:] for path in (question.left, question.right)}
    assert set(tmp_path.iterdir()) == kept
    with pytest.raises(ValueError, match="not known any more"):
        test.vote(questions[0].key, "left")
    test.vote(questions[4].key, "left")


def test_many_visitors_at_once(tmp_path: Path) -> None:
    test = BlindTest(tmp_path)

    def visit(number: int) -> bool:
        question = test.ask(*CLIPS, about="x")
        answers = []
        for side in SIDES:  # a second click
            try:
                answers.append(test.vote(question.key, side))
            except ValueError:
                continue
        assert len(answers) == 1
        return answers[0].right

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, range(64)))
    assert test.tally("x") == Tally(64, sum(found))


def test_a_question_that_is_left_goes_with_its_clips(tmp_path: Path) -> None:
    test = BlindTest(tmp_path)
    kept, left = test.ask(*CLIPS, "a plan"), test.ask(*CLIPS, "another plan")
    test.forget(left.key)
    test.forget("never asked")
    assert not left.left.exists()
    assert not left.right.exists()
    assert kept.left.exists()
    with pytest.raises(ValueError, match="not known any more"):
        test.vote(left.key, "left")
    answer = test.vote(kept.key, "left")
    assert answer.tally == test.tally("a plan") == Tally(1, int(answer.right))
