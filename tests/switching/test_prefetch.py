"""Experts that wait in main memory: what was sent ahead is used, and the rest is right too."""

from __future__ import annotations

import pytest
import torch

from motionmerge.schedule import ExpertSchedule
from motionmerge.switching import placement, prefetch
from motionmerge.switching.expert_bank import ExpertBank
from motionmerge.switching.prefetch import PlainLane, Prefetcher, pack, pinned_if_possible

from .test_expert_bank import Recorder, same_weights

CPU = torch.device("cpu")
LANE = PlainLane(CPU)
Weights = dict[str, torch.Tensor]


def tensors(seed: int = 0) -> Weights:
    """Tensors of several dtypes and layouts; 4 times 1,000 bytes and some small ones."""
    generator = torch.Generator().manual_seed(seed)
    big = {name: torch.randn(10, 25, generator=generator) for name in "abcd"}
    return {
        **big,
        "scalar": torch.tensor(float(seed)),
        "nothing": torch.empty(0, 3),
        "odd": torch.randn(3, generator=generator).to(torch.bfloat16),
        "across": torch.randn(4, 6, generator=generator).T,
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("piece_bytes", "names"),
    [
        (1, ["a", "b", "c", "d", "scalar", "nothing", "odd", "across", "double"]),
        (2_030, ["a b", "c d", "scalar nothing odd across double"]),
        (1 << 20, ["a b c d scalar nothing odd across double"]),
    ],
)
def test_pieces_hold_neighbours_bit_for_bit(piece_bytes: int, names: list[str]) -> None:
    given = tensors()
    pieces = list(pack(given, LANE, piece_bytes=piece_bytes))
    assert [" ".join(piece.places) for piece in pieces] == names
    packed = {name: tensor for piece in pieces for name, tensor in piece.tensors().items()}
    assert same_weights(packed, tensors())
    assert not given  # taken out one by one
    for piece in pieces:
        begin = piece.buffer.data_ptr()
        starts = [one.data_ptr() - begin for one in piece.tensors().values() if one.numel()]
        assert all(start % 256 == 0 for start in starts)


@pytest.mark.parametrize("max_bytes", [0, 1_500, 2_500, 10_000])
def test_what_may_not_be_sent_ahead_arrives_with_the_rest(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 1_000)
    prefetcher = Prefetcher(
        {"one": tensors(1), "two": tensors(2)},
        order=["one", "two", "one"],
        lane=LANE,
        max_bytes=max_bytes,
    )
    waiting = {name: tensor.data_ptr() for name, tensor in prefetcher.take("two").items()}
    for expert in ("one", "two"):  # the second time nothing was sent for it
        prefetcher.send_next("one")
        arrived = prefetcher.take("two")
        assert same_weights(arrived, tensors(2))
        sent = [name for name, tensor in arrived.items() if tensor.data_ptr() != waiting[name]]
        everything = [name for name in waiting if name != "nothing"]
        assert sent == {0: [], 1_500: ["a"], 2_500: ["a", "b"], 10_000: everything}[max_bytes]
        prefetcher.send_next("one")
        assert same_weights(prefetcher.take("one"), tensors(1)), expert


def test_a_device_without_memory_gets_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallLane(PlainLane):
        def send(self, buffer: torch.Tensor) -> torch.Tensor:
            sent.append(super().send(buffer))
            if len(sent) == 3:
                raise torch.OutOfMemoryError
            return sent[-1]

    monkeypatch.setattr(prefetch, "PIECE_BYTES", 1_000)
    sent: list[torch.Tensor] = []
    both = {"one": tensors(1), "two": tensors(2)}
    prefetcher = Prefetcher(both, order=both, lane=SmallLane(CPU), max_bytes=10_000)
    prefetcher.send_next("one")
    arrived = prefetcher.take("two")
    assert same_weights(arrived, tensors(2))
    assert [arrived[name].data_ptr() for name in "ab"] == [one.data_ptr() for one in sent[:2]]


def test_the_expert_that_comes_next_is_sent_ahead_and_another_one_is_right_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "AHEAD_SHARE", 1.0)
    model = Recorder()
    three = {name: {"weight": torch.full((2,), float(n))} for n, name in enumerate("abc", start=1)}
    schedule = ExpertSchedule.from_list(
        [{"expert": "a", "timestep": 800}, {"expert": "b", "timestep": 500}, {"expert": "c"}]
    )
    with ExpertBank(model, three, schedule=schedule, placement="prefetch") as bank:
        (part,) = bank._parts
        sent = []
        for timestep in (900, 600, 100, 900, 100, 600):
            model(torch.zeros(1), timestep)
            (piece,) = part._prefetcher._sent
            sent.append(piece.view(torch.float32)[0].item())
    assert [weight for _, weight in model.calls] == [1, 2, 3, 1, 3, 2]
    assert sent == [2, 3, 1, 2, 1, 3]
    assert all(
        torch.equal(own["weight"], torch.full((2,), n)) for n, own in enumerate(three.values(), 1)
    )


def test_main_memory_is_pinned_where_the_system_grants_it() -> None:
    buffer = pinned_if_possible(1_000)
    assert buffer.dtype == torch.uint8 and buffer.shape == (1_000,)
    assert buffer.is_pinned() == torch.cuda.is_available()
