"""Functions that a user registered come along to the workers of a cluster, or are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from motionmerge.errors import ConfigError
from motionmerge.merging.in_memory import realise
from motionmerge.merging.recipes.functions import FUNCTIONS, register_function
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.sampling.batch.batch import BatchOptions
from motionmerge.sampling.batch.ray_worker import Worker, sent_functions
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ShippedModel

cloudpickle = pytest.importorskip("ray.cloudpickle", reason="Ray is not installed")

RECIPE = """\
inputs: {base: 'pocket:base', tuned: 'pocket:tuned'}
experts: {half: 'base + halved(tuned - base, share=0.5)'}
"""


@pytest.fixture(autouse=True)
def functions() -> Iterator[None]:
    """Forget everything that a test registers."""
    before = dict(FUNCTIONS)
    yield
    FUNCTIONS.clear()
    FUNCTIONS.update(before)


def test_a_worker_knows_the_functions_that_a_recipe_calls() -> None:
    register_function("unused", tensors=lambda vector, *, name: vector)
    register_function(
        "halved", settings={"share": float}, tensors=lambda vector, *, name, share: share * vector
    )
    experts = ExpertChoice(Recipe.parse(RECIPE))
    sent = sent_functions(experts)
    assert list(sent) == ["halved"]
    arguments = cloudpickle.dumps((ShippedModel(), experts, BatchOptions(), 1, sent))
    del FUNCTIONS["halved"]
    worker = Worker(*cloudpickle.loads(arguments))
    assert Recipe.parse(RECIPE).print() == experts.recipe.print()  # type: ignore[union-attr]
    worker.load()
    loaded = worker._pipeline.unet.state_dict()
    for name, tensor in realise(experts.recipe)["half"].items():  # type: ignore[arg-type]
        if name.startswith("unet."):
            assert torch.equal(loaded[name.removeprefix("unet.")], tensor.float()), name


def test_a_function_that_cannot_be_sent_is_refused_by_name() -> None:
    lock = threading.Lock()

    def halved(vector: torch.Tensor, *, name: str, share: float) -> torch.Tensor:
        with lock:
            return share * vector

    register_function("halved", settings={"share": float}, tensors=halved)
    with pytest.raises(ConfigError, match="`halved` cannot be sent to the workers") as caught:
        sent_functions(ExpertChoice(Recipe.parse(RECIPE)))
    assert caught.value.fix
