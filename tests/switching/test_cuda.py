"""On a GPU: streams, pinned memory, offloading, fp8 storage and compiled blocks, all real."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.activations import GEGLU
from PIL import Image
from torch import nn

from motionmerge import load_pocket
from motionmerge.errors import ConfigError
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.models.dynamicrafter.fast_layers import FastGEGLU, FastGroupNorm
from motionmerge.models.pocket.world import load_photo
from motionmerge.sampling.pipelines.dynamicrafter import DynamiCrafterPipeline
from motionmerge.sampling.videos.make_video import make_video
from motionmerge.sampling.videos.phases import make_videos
from motionmerge.sampling.videos.settings import VideoSettings
from motionmerge.schedule import ExpertSchedule, ScheduleEntry
from motionmerge.switching import prefetch
from motionmerge.switching.expert_bank import ExpertBank, experts
from motionmerge.switching.prefetch import Prefetcher, StreamLane

from ..tiny.dynamicrafter import NUM_FRAMES, tiny_pipeline
from .test_expert_bank import (
    BOUNDARY,
    exact_experts,
    other_weights,
    same_weights,
    stored_paper_recipe,
    tiny_transformer,
    two_experts,
    weights_of,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda", 0)
TWO = ExpertSchedule((ScheduleEntry("dynamics", timestep=500), ScheduleEntry("consistency")))
Generate = Callable[..., torch.Tensor]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def on_gpu(pipeline: DynamiCrafterPipeline) -> DynamiCrafterPipeline:
    return pipeline.to(GPU)


@pytest.fixture
def recipe(pipeline: DynamiCrafterPipeline, tmp_path: Path) -> Recipe:
    """The paper's experts of a U-Net and a projector in files."""
    base = weights_of(pipeline, "unet", "image_projector")
    return stored_paper_recipe(tmp_path, base, other_weights("unet", "image_projector"))


def test_a_stream_brings_pinned_tensors_bit_for_bit_while_the_gpu_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 8 << 20)
    values = {str(n): torch.randn(1 << 20, device=GPU) for n in range(20)}
    lane, both = StreamLane(GPU), {"one": {}, "two": dict(values)}
    prefetcher = Prefetcher(both, order=both, lane=lane, max_bytes=60 << 20)
    busy = torch.randn(4096, 4096, device=GPU)
    for _ in range(3):
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        prefetcher.send_next("one")
        arrived = prefetcher.take("two")
        assert [name for name, value in arrived.items() if value.device == GPU] == [*values][:14]
        assert all(value.is_pinned() for name, value in arrived.items() if int(name) >= 14)
        found = {name: torch.empty_like(value) for name, value in values.items()}
        torch._foreach_copy_(list(found.values()), list(arrived.values()), non_blocking=True)
        assert same_weights(found, values)


def test_every_placement_makes_the_same_video_and_gives_the_model_back(
    on_gpu: DynamiCrafterPipeline,
    generate: Generate,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 50_000)  # so that several are sent ahead
    before = weights_of(on_gpu, "unet", "image_projector")
    videos = []
    for kind in ("auto", "resident", "prefetch", "recompute"):
        with experts(on_gpu, recipe=recipe, placement=kind) as bank:
            videos += [generate(on_gpu), generate(on_gpu)]
            unet = bank._parts[0]
            if kind == "prefetch":
                assert len(unet._prefetcher._sent) > 1
            elif kind != "recompute":
                assert all(one.device == GPU for one in unet.values["dynamics"].values())
        assert same_weights(weights_of(on_gpu, "unet", "image_projector"), before)
    assert all(torch.equal(video, videos[0]) for video in videos)


@pytest.mark.parametrize("kind", ["resident", "prefetch", "recompute"])
def test_after_a_switch_the_gpu_holds_the_experts_bits_in_bf16(
    on_gpu: DynamiCrafterPipeline, recipe: Recipe, kind: str
) -> None:
    on_gpu.unet.to(torch.bfloat16)
    held: dict[str, list[Weights]] = {"dynamics": [], "consistency": []}
    for placement in ("resident", kind):
        with experts(on_gpu, recipe=recipe, placement=placement) as bank:
            for name in ("dynamics", "consistency", "dynamics", "consistency"):
                with bank.with_expert(name):
                    held[name].append(weights_of(on_gpu, "unet"))
    for found in held.values():
        assert all(same_weights(one, found[0]) for one in found)
    assert not same_weights(held["dynamics"][0], held["consistency"][0])


def test_one_expert_everywhere_equals_the_plain_pipeline(
    on_gpu: DynamiCrafterPipeline, generate: Generate
) -> None:
    plain = generate(on_gpu)
    assert plain.device == GPU
    with experts(on_gpu, {"same": weights_of(on_gpu, "unet", "image_projector")}):
        assert torch.equal(generate(on_gpu), plain)
    assert torch.equal(generate(on_gpu), plain)


def test_a_video_is_that_of_the_cpu_but_for_rounding(
    pipeline: DynamiCrafterPipeline, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with experts(pipeline, two_experts(), boundary=BOUNDARY):
        expected = generate(pipeline)
    with experts(pipeline.to(GPU), two_experts(), boundary=BOUNDARY):
        torch.testing.assert_close(generate(pipeline).cpu(), expected, atol=2e-3, rtol=0)


def test_a_generator_of_the_gpu_works_too(
    on_gpu: DynamiCrafterPipeline, generate: Generate
) -> None:
    videos = [generate(on_gpu, generator=torch.Generator(GPU).manual_seed(3)) for _ in range(2)]
    assert torch.equal(*videos)


def test_many_videos_in_phases_have_the_bits_of_single_ones(
    on_gpu: DynamiCrafterPipeline, photo: Image.Image
) -> None:
    settings = [
        VideoSettings(prompt="a cat", seed=seed, num_frames=NUM_FRAMES, num_inference_steps=4)
        for seed in (1, 2)
    ]
    with experts(on_gpu, two_experts(), boundary=BOUNDARY) as bank:
        single = [make_video(on_gpu, photo, one) for one in settings]
        for outcome in make_videos(on_gpu, [(photo, one) for one in settings], bank):
            assert outcome.error is None
            assert torch.equal(outcome.video, single[outcome.index])


def test_model_offload_changes_nothing(pipeline: DynamiCrafterPipeline, generate: Generate) -> None:
    before = weights_of(pipeline, "unet", "image_projector")
    both = two_experts("unet", "image_projector")
    resident = copy.deepcopy(pipeline).to(GPU)
    with experts(resident, both, boundary=BOUNDARY):
        expected = generate(resident)
    pipeline.enable_model_cpu_offload(device=GPU)
    for placement in ("auto", "prefetch"):
        with experts(pipeline, both, boundary=BOUNDARY, placement=placement) as bank:
            assert "cuda:0" in bank.placement
            for _ in range(2):
                assert torch.equal(generate(pipeline), expected)
    pipeline.maybe_free_model_hooks()
    assert same_weights(weights_of(pipeline, "unet", "image_projector"), before)


def gpu_transformer() -> tuple[LTXVideoTransformer3DModel, dict[str, Any]]:
    transformer, inputs = tiny_transformer()
    moved = {
        name: value.to(GPU) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    return transformer, moved


@torch.no_grad()
def run_both(
    transformer: LTXVideoTransformer3DModel, inputs: dict[str, Any], both: dict[str, Weights]
) -> list[torch.Tensor]:
    with ExpertBank(transformer, both, schedule=TWO):
        return [
            transformer(timestep=torch.tensor([timestep], device=GPU), **inputs)[0]
            for timestep in (900, 100, 900)
        ]


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_changes_nothing_and_with_streams_is_refused(kind: str) -> None:
    transformer, inputs = gpu_transformer()
    both = exact_experts(transformer)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    plain = run_both(copy.deepcopy(transformer).to(GPU), inputs, both)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    streamed = copy.deepcopy(transformer)
    transformer.enable_group_offload(GPU, offload_type=kind, **blocks)
    for offloaded, expected in zip(run_both(transformer, inputs, both), plain, strict=True):
        assert torch.equal(offloaded, expected)
    assert same_weights({n: t.cpu() for n, t in transformer.state_dict().items()}, before)
    streamed.enable_group_offload(GPU, offload_type=kind, use_stream=True, **blocks)
    with pytest.raises(ConfigError, match="use_stream=False"):
        run_both(streamed, inputs, both)


def test_layerwise_casting_to_fp8_rounds_experts_to_its_storage() -> None:
    transformer, inputs = gpu_transformer()
    transformer.to(GPU)
    both = exact_experts(transformer)
    plain = run_both(transformer, inputs, both)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    cast = run_both(transformer, inputs, both)
    for one, expected in zip(cast, plain, strict=True):
        torch.testing.assert_close(one, expected, atol=0.1, rtol=0.1)
    assert torch.equal(cast[0], cast[2])
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float())


def test_the_pocket_model_makes_the_cpus_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = load_pocket()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
        with experts(pipe, Recipe.knob(base="pocket:base", tuned="pocket:tuned", motion=0.5)):
            prompt = "the camera pans left"
            return pipe(load_photo("coffee"), prompt, generator=generator, **options).frames

    expected = run()
    pipe.to(GPU)
    video = run()
    assert video.device == GPU
    # Rounding can move a pixel over an edge of the photo, so a few may differ by more.
    assert (video.cpu() - expected).abs().mean() < 1e-3
    assert torch.equal(run(), video)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload(device=GPU)
    assert (run().cpu() - expected).abs().mean() < 1e-3


def test_compiled_blocks_are_not_compiled_again_at_a_switch() -> None:
    transformer, inputs = gpu_transformer()
    transformer.to(GPU)
    both = exact_experts(transformer)
    eager = run_both(transformer, inputs, both)
    transformer.compile_repeated_blocks(fullgraph=True)
    run_both(transformer, inputs, both)
    with torch.compiler.set_stance("fail_on_recompile"):
        for compiled, expected in zip(run_both(transformer, inputs, both), eager, strict=True):
            torch.testing.assert_close(compiled, expected, atol=1e-3, rtol=1e-3)


def test_a_compiled_dynamicrafter_is_not_compiled_again_at_a_switch(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline().to(GPU)
    # Blocks share their code, which is compiled for each of their sizes, with and without keys.
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    pipeline.unet.compile_repeated_blocks(backend="eager")
    with experts(pipeline, two_experts(), boundary=BOUNDARY):
        first = generate(pipeline)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(generate(pipeline), first)


@pytest.mark.parametrize("kind", ["resident", "prefetch", "recompute"])
def test_one_captured_graph_makes_the_videos_of_all_experts(
    on_gpu: DynamiCrafterPipeline, generate: Generate, recipe: Recipe, kind: str
) -> None:
    plain = generate(on_gpu)
    with experts(on_gpu, recipe=recipe, placement=kind):
        called = [generate(on_gpu), generate(on_gpu, "the camera pans left")]
        on_gpu.capture_steps()
        replayed = [generate(on_gpu), generate(on_gpu, "the camera pans left")]
        assert torch.equal(generate(on_gpu), replayed[0])
    assert on_gpu._captured is not None and len(on_gpu._captured._graphs) == 1
    torch.testing.assert_close(replayed, called, atol=2e-3, rtol=0)
    torch.testing.assert_close(generate(on_gpu), plain, atol=2e-3, rtol=0)
    assert len(on_gpu._captured._graphs) == 1
    assert not torch.allclose(plain, called[0], atol=1e-2)


def test_a_graph_is_captured_for_each_shape_and_again_when_weights_have_moved(
    on_gpu: DynamiCrafterPipeline, generate: Generate
) -> None:
    called = [generate(on_gpu, guidance_scale=scale) for scale in (7.5, 1.0)]
    on_gpu.capture_steps()
    replayed = [generate(on_gpu, guidance_scale=scale) for scale in (7.5, 1.0)]
    torch.testing.assert_close(replayed, called, atol=2e-3, rtol=0)
    assert on_gpu._captured is not None and len(on_gpu._captured._graphs) == 2
    on_gpu.unet.load_state_dict(tiny_pipeline(3).unet.state_dict(), assign=True)
    on_gpu.unet.to(GPU)
    moved = generate(on_gpu)
    assert len(on_gpu._captured._graphs) == 1
    on_gpu._captures = False
    torch.testing.assert_close(moved, generate(on_gpu), atol=2e-3, rtol=0)
    assert not torch.allclose(moved, called[0], atol=1e-2)


def test_what_python_decides_in_a_call_is_not_captured(
    on_gpu: DynamiCrafterPipeline, generate: Generate
) -> None:
    expected = generate(on_gpu)
    on_gpu.capture_steps()
    with experts(on_gpu, {"same": weights_of(on_gpu, "unet")}):
        generate(on_gpu)
    assert on_gpu._captured is not None
    on_gpu.enable_model_cpu_offload(device=GPU)
    assert torch.equal(generate(on_gpu), expected)
    assert on_gpu._captured is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_layers_are_as_exact_as_torch_s_where_a_gpu_takes_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, unit = nn.GroupNorm(32, 320), GEGLU(320, 1280)
    nn.init.normal_(norm.weight)
    video = torch.randn(2, 320, 16, 20, 32, device=GPU).to(dtype) + 1
    rows = torch.randn(64, 77, 320, device=GPU).to(dtype)
    for own, fast, x in (
        (norm, FastGroupNorm.like(norm), video.transpose(1, 2).contiguous().transpose(1, 2)),
        (unit, FastGEGLU.like(unit), rows),
    ):
        fast.to(GPU, torch.float64)
        own.to(GPU, torch.float64)
        with torch.no_grad():
            exact = own(x.double())
            own.to(dtype)
            fast.to(dtype)
            theirs, ours = ((layer(x) - exact).abs().max() for layer in (own, fast))
        assert ours <= theirs + 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_encoders_are_freed_from_a_pipeline_whose_parts_take_turns(
    on_gpu: DynamiCrafterPipeline, generate: Generate, photo: Image.Image
) -> None:
    expected = generate(on_gpu)
    on_gpu.to("cpu")
    on_gpu.enable_model_cpu_offload(device=GPU)
    conditions = on_gpu.encode(photo, "a cat", num_frames=NUM_FRAMES)
    encoder = weakref.ref(on_gpu.image_encoder)
    on_gpu.free_encoders()
    assert encoder() is None
    own = {"image": None, "num_frames": None, "conditions": conditions}
    torch.testing.assert_close(generate(on_gpu, None, **own), expected, atol=2e-3, rtol=0)
