"""Encoders beside a language model that has most of the memory."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import torch

from clear_datasets import NLI, BSDetector, Clear, Embedding
from clear_datasets.encoders import close_encoders
from tests.conftest import Scripted
from tests.test_similarity import classifier

__all__ = ["classifier"]  # a fixture

TEXTS = ["the Alps", "In the Alps.", "Rhine", "Main", "the North Sea", "no"]
PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


class GPU:
    """A GPU that takes so many texts at a time, played by the CPU."""

    def __init__(self) -> None:
        self.rows, self.weights = 1000, True
        self.held: list[torch.nn.Module] = []
        self.sizes: list[int] = []


@pytest.fixture
def gpu(monkeypatch):
    from transformers import BatchEncoding, BertModel, PreTrainedModel

    one, to, forward = GPU(), torch.nn.Module.to, BertModel.forward

    def move(module, device):
        if device != "cuda":
            one.held.clear()
            return to(module, device)
        if not one.weights:
            raise torch.OutOfMemoryError("CUDA out of memory")
        one.held.append(getattr(module, "bert", module))
        return module

    def run(module, input_ids, **named):
        if any(module is held for held in one.held):
            one.sizes.append(len(input_ids))
            if len(input_ids) > one.rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(module, input_ids, **named)

    there = property(lambda module: torch.device("cuda" if one.held else "cpu"))
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(BertModel, "forward", run)
    monkeypatch.setattr(PreTrainedModel, "device", there)
    monkeypatch.setattr(BatchEncoding, "to", lambda batch, device: batch)
    close_encoders()
    yield one
    close_encoders()


@pytest.mark.parametrize("kind", [NLI, Embedding])
def test_a_batch_that_does_not_fit_is_halved(classifier, gpu, kind):
    wanted = kind(str(classifier[0]), device="cpu")(PAIRS, None)
    gpu.rows = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kind(str(classifier[0]), device="cuda", batch_size=16)(PAIRS, None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert max(gpu.sizes) > 3  # it was tried
    assert gpu.sizes[-1] <= 3


@pytest.mark.parametrize("kind", [NLI, Embedding])
@pytest.mark.parametrize("weights", [True, False])
def test_an_encoder_for_which_no_memory_is_left_goes_on_on_the_cpu(classifier, gpu, kind, weights):
    wanted = kind(str(classifier[0]), device="cpu")(PAIRS, None)
    gpu.rows, gpu.weights = 0, weights
    with pytest.warns(UserWarning, match="too little memory left for .*, which compares on the CPU"):
        found = kind(str(classifier[0]), device="cuda")(PAIRS, None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_fails_for_another_reason_is_not_tried_again(classifier, monkeypatch):
    from transformers import BertModel

    def broken(*args, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(BertModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        NLI(str(classifier[0]))(PAIRS, None)


def test_closing_frees_the_encoders(classifier):
    from transformers import BertForSequenceClassification

    def held() -> int:
        gc.collect()
        return sum(type(o) is BertForSequenceClassification for o in gc.get_objects())

    close_encoders()
    before = held()
    clear = Clear(engine=Scripted(), confidence=BSDetector(k=2, beta=1, similarity=NLI(str(classifier[0]))))
    clear.score({"prompt": ["Where?"], "response": ["the Alps"]})
    assert held() == before + 1
    clear.close()
    assert held() == before
