"""A sampler with switched experts equals two whole models between which nothing is switched."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import pytest
import torch

from ..comfyui_pack.load import load_pack
from . import tiny

pack = load_pack()
nodes, experts = pack.nodes, pack.experts


@pytest.fixture(autouse=True)
def loras(monkeypatch):
    """`FAMILY` is a LoRA for a family in ComfyUI's folders."""
    read = "read_lora"
    monkeypatch.setattr(pack.task_vectors, read, lambda file: tiny.lora(file.partition(".")[0]))


def knob(model, family, *, motion=0.25, boundary=0.875, cfgs=(0.0, 0.0)):
    return nodes.MotionKnobLora.execute(model, family, motion, 1.0, boundary, *cfgs)[0]


def with_lora(model, family, strength):
    return comfy.sd.load_lora_for_models(model, None, tiny.lora(family), strength, 0)[0]


def side_by_side(*phases):
    """Whole models, all in memory, each for a part: (model, above, cfg or 0)."""
    for model, _, _ in phases:
        comfy.model_management.load_models_gpu([model])
        model.model.current_patcher = model

    def choose(executor, x, sigma, *rest):
        guider = executor.class_obj
        own, cfg = guider.inner_model, guider.cfg
        chosen = next(phase for phase in phases if float(sigma.max()) > phase[1])
        try:
            guider.inner_model, guider.cfg = chosen[0].model, chosen[2] or cfg
            return executor(x, sigma, *rest)
        finally:
            guider.inner_model, guider.cfg = own, cfg

    model = phases[0][0].clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", choose)
    return model


def whole_models(family, *, motion=0.25, boundary=0.875, cfgs=(0.0, 0.0)):
    return side_by_side(
        (with_lora(tiny.model(family), family, -motion), boundary, cfgs[0]),
        (with_lora(tiny.model(family), family, 1.0), -1, cfgs[1]),
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def unpatched(model):
    comfy.model_management.unload_all_models()
    return weights(model)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_switched_experts_equal_two_whole_models_bit_for_bit(family, sampler):
    model = tiny.model(family)
    before = weights(model)
    for boundary in (0.875, 0.64):
        for cfgs in ((0.0, 0.0), (3.0, 1.0)):
            settings = {"boundary": boundary, "cfgs": cfgs}
            ours = tiny.sample(knob(model, family, **settings), family, sampler=sampler)
            theirs = tiny.sample(whole_models(family, **settings), family, sampler=sampler)
            assert torch.equal(ours, theirs), settings
    assert ours.isfinite().all()
    assert same(before, unpatched(model))


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler_and_number_of_steps(scheduler, steps):
    if (scheduler, steps) == ("kl_optimal", 1):
        pytest.skip("its only sigma is NaN")
    settings = {"sampler": "dpmpp_2m", "scheduler": scheduler, "steps": steps}
    ours = tiny.sample(knob(tiny.model("wan"), "wan"), "wan", **settings)
    theirs = tiny.sample(whole_models("wan"), "wan", **settings)
    assert torch.equal(ours, theirs)


def test_a_start_below_the_boundary_and_two_samplers_with_one_model():
    model = knob(tiny.model("wan"), "wan")
    for more in ({"start_step": 5}, {"last_step": 3, "force_full_denoise": True}, {"denoise": 0.4}):
        ours = tiny.sample(model, "wan", **more)
        assert torch.equal(ours, tiny.sample(whole_models("wan"), "wan", **more)), more


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
        None,
    ],
    ids=lambda options: str(options or "fp8 codes and scales"),
)
def test_weights_of_fewer_bits(options):
    """Where ComfyUI rounds at random, it does so by the weight's name."""

    def fresh():
        return tiny.scaled_model() if options is None else tiny.model("wan", **options)

    theirs = side_by_side(
        (with_lora(fresh(), "wan", -0.25), 0.875, 0), (with_lora(fresh(), "wan", 1.0), -1, 0)
    )
    model = fresh()
    before = weights(model)
    assert torch.equal(tiny.sample(knob(model, "wan"), "wan"), tiny.sample(theirs, "wan"))
    after = unpatched(model)
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_two_scaled_checkpoints_keep_their_scales():
    tuned, base = tiny.scaled_model(), tiny.scaled_model()
    patch = pack.task_vectors.model_patch(tuned, base, keeps=-0.25, strength=1.25)
    assert not any("scale_weight" in name for name in patch.values)
    turned = nodes.MotionKnobCheckpoints.execute(tuned, base, 0.25, 0.875, 0.0, 0.0)[0]
    ours, plain = tiny.sample(turned, "wan"), tiny.sample(tiny.scaled_model(), "wan")
    # The same weights twice are a knob that does nothing, but for rounding to codes again.
    assert (ours - plain).abs().mean() < 0.02 * plain.abs().mean()


def test_partly_loaded_models(monkeypatch):
    """ComfyUI on too small a GPU: some layers get their patches when they are used."""
    patcher = type(tiny.model("wan"))
    load = patcher.partially_load

    def partly(self, device, extra_memory=0, **more):
        return load(self, device, 6_000_000, **more)

    monkeypatch.setattr(patcher, "partially_load", partly)
    model = tiny.model("wan")
    ours = tiny.sample(knob(model, "wan"), "wan")
    assert model.model.model_lowvram
    monkeypatch.undo()
    assert torch.equal(ours, tiny.sample(whole_models("wan"), "wan"))


def test_what_is_added_after_the_node_counts_in_both_experts():
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = knob(with_lora(tiny.model("wan"), "wan", 0.3), "wan")
    model = with_lora(model, "wan", 0.5)
    model = ModelSamplingSD3().patch(model, 5.0)[0]
    halves = []
    for strength in (-0.25, 1.0):
        half = with_lora(with_lora(tiny.model("wan"), "wan", 0.3), "wan", strength)
        halves.append(ModelSamplingSD3().patch(with_lora(half, "wan", 0.5), 5.0)[0])
    theirs = side_by_side((halves[0], 0.875, 0), (halves[1], -1, 0))
    assert torch.equal(tiny.sample(model, "wan"), tiny.sample(theirs, "wan"))


def test_a_pair_with_a_knob_and_a_lora_after_it():
    high, low = tiny.model("wan", 0), tiny.model("wan", 1)
    pair = nodes.SwitchAtNoiseLevel.execute(knob(high, "wan", boundary=0.95), low, 0.9, 0.0, 2.0)[0]
    pair = with_lora(pair, "wan", 0.5)
    names = [expert.name for expert in experts.experts_of(pair).experts]
    assert names == ["dynamics of high", "consistency of high", "low"]
    wholes = (
        with_lora(tiny.model("wan"), "wan", -0.25),
        with_lora(tiny.model("wan"), "wan", 1.0),
        tiny.model("wan", 1),
    )
    halves = (with_lora(one, "wan", 0.5) for one in wholes)
    phases = zip(halves, (0.95, 0.9, -1), (0, 0, 2.0), strict=True)
    ours = tiny.sample(pair, "wan", steps=20)
    assert torch.equal(ours, tiny.sample(side_by_side(*phases), "wan", steps=20))


def test_a_knob_on_a_pair_turns_both():
    pair = nodes.SwitchAtNoiseLevel.execute(
        tiny.model("wan", 0), tiny.model("wan", 1), 0.9, 0.0, 0.0
    )[0]
    turned = knob(pair, "wan", boundary=0.5)
    assert [expert.name for expert in experts.experts_of(turned).experts] == [
        "dynamics of high",
        "dynamics of low",
        "consistency of high",
        "consistency of low",
    ]
    with pytest.raises(ValueError, match="has experts already"):
        knob(turned, "wan")
    theirs = side_by_side(
        (with_lora(tiny.model("wan", 0), "wan", -0.25), 0.9, 0),
        (with_lora(tiny.model("wan", 1), "wan", -0.25), 0.5, 0),
        (with_lora(tiny.model("wan", 1), "wan", 1.0), -1, 0),
    )
    assert torch.equal(tiny.sample(turned, "wan"), tiny.sample(theirs, "wan"))


def test_an_exception_in_mid_run_leaves_everything_as_it_was():
    model = tiny.model("wan")
    before = weights(model)
    turned = knob(model, "wan", cfgs=(3.0, 1.0))
    calls = []

    def stop(executor, *args):
        calls.append(1)
        if len(calls) == 6:
            raise InterruptedError
        return executor(*args)

    broken = turned.clone()
    broken.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", stop)
    with pytest.raises(InterruptedError):
        tiny.sample(broken, "wan")
    theirs = tiny.sample(whole_models("wan", cfgs=(3.0, 1.0)), "wan")
    for _ in range(2):
        assert torch.equal(tiny.sample(turned, "wan"), theirs)
    assert same(before, unpatched(model))
    assert torch.equal(tiny.sample(model, "wan"), tiny.sample(tiny.model("wan"), "wan"))


def test_a_guider_is_as_it_was_and_clones_are_kept_between_runs():
    turned = knob(tiny.model("wan"), "wan", cfgs=(3.0, 1.0))
    guider = comfy.samplers.CFGGuider(turned)
    guider.set_conds(tiny.conditioning("wan", 1), tiny.conditioning("wan", 2))
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(turned.get_model_object("model_sampling"), "simple", 8)
    run = lambda: guider.sample(  # noqa: E731
        torch.ones(tiny.LATENTS["wan"]), torch.zeros(tiny.LATENTS["wan"]),
        comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0,
    )  # fmt: skip
    options = guider.model_options
    first = run()
    kept = experts.experts_of(turned).built[1]
    assert (guider.cfg, guider.model_patcher, guider.model_options) == (2.0, turned, options)
    assert torch.equal(run(), first)
    assert experts.experts_of(turned).built[1] is kept


@pytest.mark.parametrize("kind", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("first", ["cache", "knob"])
def test_a_step_cache_does_not_answer_for_an_expert_that_is_gone(kind, first):
    import comfy_extras.nodes_easycache as caches

    forwards = []

    def watch(executor, x, timestep, *rest, **more):
        forwards.append(float(timestep.max()) / 1000)
        return executor(x, timestep, *rest, **more)

    def cached(model):
        return getattr(caches, kind).execute(model, 1.0, 0.0, 1.0, False)[0]

    model = tiny.model("wan")
    turned = knob(cached(model), "wan") if first == "cache" else cached(knob(model, "wan"))
    turned.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch
    )  # fmt: skip
    tiny.sample(turned, "wan", steps=20, cfg=1.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 20)
    due = next(float(sigma) for sigma in sigmas if sigma <= 0.875)
    assert len(forwards) < 20, "the cache skips steps"
    assert max(level for level in forwards if level <= 0.875) == pytest.approx(due, abs=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_checkpoints_as_one_knob(family):
    """With the parameters that ComfyUI does not patch: `modulation`, `scale_shift_table`."""
    tuned, base = tiny.model(family, 0), tiny.model(family, 1)
    before = weights(tuned), weights(base)
    turned = nodes.MotionKnobCheckpoints.execute(tuned, base, 0.25, 0.875, 0.0, 0.0)[0]
    ours = tiny.sample(turned, family)
    one, two = tiny.state_dict(family, 0), tiny.state_dict(family, 1)
    merged = {name: two[name] - 0.25 * (one[name] - two[name]) for name in one}
    away = comfy.sd.load_diffusion_model_state_dict(merged)
    theirs = side_by_side((away, 0.875, 0), (tiny.model(family, 0), -1, 0))
    expected = tiny.sample(theirs, family)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert same(before[0], unpatched(tuned)) and same(before[1], unpatched(base))


def test_a_lora_on_the_tuned_model_is_part_of_it_and_one_after_the_node_is_not():
    tuned = with_lora(tiny.model("wan", 0), "wan", 0.5)
    turned = nodes.MotionKnobCheckpoints.execute(tuned, tiny.model("wan", 1), 1.0, 0.875, 0.0, 0.0)[
        0
    ]
    ours = tiny.sample(with_lora(turned, "wan", 0.25), "wan")
    one, two = tiny.state_dict("wan", 0), tiny.state_dict("wan", 1)
    merged = {name: 2 * two[name] - one[name] for name in one}
    away = with_lora(comfy.sd.load_diffusion_model_state_dict(merged), "wan", -0.5 + 0.25)
    details = with_lora(tiny.model("wan", 0), "wan", 0.75)
    theirs = side_by_side((away, 0.875, 0), (details, -1, 0))
    expected = tiny.sample(theirs, "wan")
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_three_experts_take_turns():
    chain = ()
    for weight, above, cfg in ((-0.25, 0.9, 3.0), (0.5, 0.6, 0.0), (1.0, 0.0, 1.0)):
        chain = nodes.LoraExpert.execute("wan", weight, above, cfg, chain)[0]
    turned = nodes.ApplyExperts.execute(tiny.model("wan"), chain)[0]
    sigmas = comfy.samplers.calculate_sigmas(turned.get_model_object("model_sampling"), "simple", 8)
    shown = nodes.ShowSchedule.execute(turned, sigmas)[0].splitlines()
    assert shown[0].endswith("1.000  -0.25 wan, cfg 3")
    assert [line.split("  ")[2].split()[0] for line in map(str.strip, shown)].count("0.5") > 1
    phases = ((-0.25, 0.9, 3.0), (0.5, 0.6, 0), (1.0, -1, 1.0))
    theirs = side_by_side(
        *((with_lora(tiny.model("wan"), "wan", one), above, cfg) for one, above, cfg in phases)
    )
    assert torch.equal(tiny.sample(turned, "wan"), tiny.sample(theirs, "wan"))


def test_a_schedule_in_which_an_expert_gets_no_step_is_shown(caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    turned = ModelSamplingSD3().patch(knob(tiny.model("wan"), "wan", boundary=0.64), 8.0)[0]
    sigmas = comfy.samplers.calculate_sigmas(turned.get_model_object("model_sampling"), "simple", 4)
    shown = nodes.ShowSchedule.execute(turned, sigmas)[0]
    assert (
        "Warning: `consistency` gets no step: the noise levels are 1, 0.96, 0.889, 0.727" in shown
    )
    tiny.sample(turned, "wan", steps=4)
    assert "`consistency` gets no step" in caplog.text


def test_refusals():
    model = tiny.model("wan")
    with pytest.raises(ValueError, match="has experts already"):
        knob(knob(model, "wan"), "wan")
    with pytest.raises(ValueError, match="No key of the LoRA `ltx` fits this model"):
        knob(model, "ltx")
    with pytest.raises(ValueError, match="two models differ"):
        nodes.SwitchAtNoiseLevel.execute(model, tiny.model("ltx"), 0.9, 0.0, 0.0)
    guider = comfy.samplers.CFGGuider(knob(model, "wan", cfgs=(3.0, 1.0)))
    guider.inner_set_conds({"positive": tiny.conditioning("wan", 1)})
    with pytest.raises(ValueError, match="no negative prompt"):
        guider.sample(
            torch.ones(tiny.LATENTS["wan"]), torch.zeros(tiny.LATENTS["wan"]),
            comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0]),
            disable_pbar=True,
        )  # fmt: skip
