"""Samples that end before they answer, as those of models that think first, and samples that are cut off."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest

from clear_datasets import BSDetector
from tests.conftest import Scripted
from tests.test_confidence import RHINE, example

pytestmark = pytest.mark.filterwarnings("ignore:more than a fifth of the samples")


@dataclass(frozen=True)
class Telling(Scripted):
    """Says the same samples to each prompt, and which of them are cut off at their limit."""

    said: tuple[tuple[str, bool], ...] = ()

    def answer(self, asks):
        size, found = len(asks.generate), super().answer(asks)
        texts, cut = map(list, zip(*self.said, strict=True))
        return replace(found, generated=[texts] * size, cut=[cut] * size)


class TellingUnread(Telling):
    """As a server: log-probabilities are not given."""

    reads = False


class TellingUnsure(Telling):
    """Says no label."""

    def choose(self, prompts, labels):
        return np.full((len(prompts), len(labels)), np.nan, dtype=np.float32)


def test_samples_that_end_before_they_answer_are_not_compared():
    said = (("<think>Where?", True), ("", True), ("<think>Snow.</think>The Alps", False), ("at sea", False))
    found = BSDetector(k=4)([RHINE], Telling(said=said))
    assert found.compared[0] == 2
    assert found.similarity[0] == pytest.approx((1 + 0) / 2)
    assert found.errors == [""]
    of_target = BSDetector(k=4)([example(RHINE.prompt[0]["content"], "<think>So</think>the Alps")], Telling(said=said))
    assert of_target.similarity[0] == pytest.approx(1 / 2)


@pytest.mark.parametrize("said", [("", True), ("<think>Where does", False), ("Let me see.</think>", False)])
@pytest.mark.parametrize("settings", [{}, {"beta": 1.0}, {"samples": "plain"}])
def test_a_row_of_which_no_sample_answers_says_why(said, settings):
    found = BSDetector(k=2, **settings)([RHINE], Telling(said=(said, said)))
    assert math.isnan(found.confidence[0])
    assert "model that thinks first" in found.errors[0]
    assert "BSDetector(samples='plain', beta=1, max_tokens=4096)" in found.errors[0]
    unread = BSDetector(k=2, alpha=0.0, **settings)([RHINE], TellingUnread(said=(said, said)))
    assert math.isnan(unread.confidence[0])
    assert "model that thinks first" in unread.errors[0]


def test_a_model_that_says_nothing_has_said_another_answer():
    for said in ("", "  "):
        found = BSDetector(k=1, beta=1)([RHINE], Telling(said=((said, False),)))
        assert found.similarity[0] == 0
        assert found.errors == [""]
    untold = BSDetector(k=1, beta=1)([RHINE], Scripted(answers=(("rise?", ""),)))  # whether it is cut off
    assert untold.similarity[0] == 0


def test_a_thinking_model_is_not_blamed_on_the_reflection():
    assert "thinks first" in BSDetector(k=1)([RHINE], TellingUnsure(said=(("", True),))).errors[0]
    assert "none of its labels" in BSDetector(k=1)([RHINE], TellingUnsure(said=(("Alps", False),))).errors[0]


def test_reasoned_samples_that_are_cut_off_before_the_mark_are_not_compared():
    said = (("Snow melts in the Alps, so", True), ("Snow melts. Answer: the Alps", True), ("at sea", False))
    settings = BSDetector(k=3, samples="reasoned")
    found = settings([RHINE], Telling(said=said))
    assert found.compared[0] == 2
    assert found.similarity[0] == pytest.approx(1 / 2)
    assert found.agreement[0] == pytest.approx(1 / 3)  # of all samples, as adaptive sampling bounds it
    assert "More max_tokens" in settings([RHINE], Telling(said=said[:1] * 3)).errors[0]


def test_math_takes_the_last_number_of_what_is_cut_off_at_a_limit_of_ones_own():
    pytest.importorskip("math_verify")
    assert BSDetector.math(max_tokens=64).max_tokens == 64
    assert BSDetector.math() == BSDetector.math(5, 512)
    found = BSDetector.math(k=1)([example("How many?", "#### 8")], Telling(said=(("3 + 5 = 8, and", True),)))
    assert found.similarity[0] == 1


def test_many_samples_that_are_cut_off_are_told_once():
    long, cut = example("Why?", "y " * 200), Telling(said=(("x", True), *[("x", False)] * 3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for rows in ([long], [long, long]):
            BSDetector(k=4)(rows, cut)
    assert len(told) == 1
    assert "max_tokens=256" in str(told[0].message)
    assert "BSDetector(max_tokens=1024)" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BSDetector(k=5)([long], Telling(said=(("x", True), *[("x", False)] * 4)))  # no more than a fifth
        BSDetector(k=4)([RHINE], cut)  # cut off sooner, as they are another answer
