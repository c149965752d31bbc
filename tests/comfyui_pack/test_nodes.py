"""The node pack against a small double of ComfyUI: which expert denoises, on what, and refusals."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from motionmerge.merging.merge import realise
from motionmerge.merging.recipes.recipe import Recipe
from motionmerge.schedule import ExpertSchedule

from . import double
from .load import NAME, PACK, load_pack

SIGMAS = torch.tensor([1.0, 0.96, 0.9, 0.75, 0.5, 0.25, 0.0])
LAYER, BARE = "diffusion_model.layer.weight", "diffusion_model.modulation"


FACTORS = {
    "diffusion_model.layer.lora_A.weight": torch.full((1, 4), 0.5),
    "diffusion_model.layer.lora_B.weight": torch.arange(4.0).reshape(4, 1),
}


def change(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "diffusion_model.layer.diff": torch.randn(4, 4, generator=generator),
        "diffusion_model.modulation.diff": torch.randn(4, generator=generator),
    }


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    files = {}
    wrong, partial = (
        {"blocks.0.diff": torch.zeros(1)},
        {**change(1), "blocks.9.diff": torch.zeros(1)},
    )
    for name, tensors in (
        ("one", change(1)), ("two", change(2)), ("wrong", wrong), ("partial", partial),
    ):  # fmt: skip
        torch.save(tensors, folder / name)
        files[name] = str(folder / name)
    files["style.safetensors"] = str(folder / "style.safetensors")
    save_file(FACTORS, files["style.safetensors"])
    installed = list(double.install(files))
    yield load_pack()
    for name in [*installed, *(name for name in sys.modules if name.partition(".")[0] == NAME)]:
        sys.modules.pop(name, None)


def model(seed=0):
    return double.ModelPatcher(double.Network(seed))


def knob(pack, on, *, lora="one", motion=0.25, boundary=0.875, cfgs=(0.0, 0.0)):
    return pack.nodes.MotionKnobLora.execute(on, lora, motion, 1.0, boundary, *cfgs)[0]


def whole(seed=0, **loras):
    """A network with LoRAs added by hand, bare parameters too."""
    network = double.Network(seed)
    for name, weight in loras.items():
        difference = change({"one": 1, "two": 2}[name])
        with torch.no_grad():
            network.diffusion_model.layer.weight += (
                weight * difference["diffusion_model.layer.diff"]
            )
            network.diffusion_model.modulation += (
                weight * difference["diffusion_model.modulation.diff"]
            )
    return network


def by_hand(*phases, cfg=2.0):
    """Euler's method with whole networks: (network, above, cfg or 0)."""
    x = torch.ones(2, 4)
    with torch.no_grad():
        for sigma, after in pairwise(SIGMAS):
            network, _, own = next(phase for phase in phases if sigma > phase[1])
            x = x + (after - sigma) * network(x) * (own or cfg)
    return x


def sampled(on, cfg=2.0, sigmas=SIGMAS):
    guider = double.CFGGuider(on, cfg)
    with torch.no_grad():
        found = guider.sample(torch.ones(2, 4), sigmas)
    assert guider.model_patcher is on and guider.cfg == cfg
    return found


def close(one, two):
    return torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("boundary", [0.0, 0.3, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("cfgs", [(0.0, 0.0), (3.0, 1.0)])
def test_a_knob_equals_two_whole_networks(pack, boundary, cfgs):
    turned = knob(pack, model(), boundary=boundary, cfgs=cfgs)
    halves = (whole(one=-0.25), boundary, cfgs[0]), (whole(one=1.0), -1, cfgs[1])
    for _ in range(2):
        assert close(sampled(turned), by_hand(*halves))


def test_patches_after_the_node_count_in_every_expert_and_bare_parameters_too(pack):
    turned = knob(pack, model())
    added = turned.clone()
    added.add_patches({LAYER: ("diff", (torch.eye(4),))}, 0.5)
    halves = [whole(one=-0.25), whole(one=1.0)]
    with torch.no_grad():
        for half in halves:
            half.diffusion_model.layer.weight += 0.5 * torch.eye(4)
    assert close(sampled(added), by_hand((halves[0], 0.875, 0), (halves[1], -1, 0)))
    assert close(sampled(turned), by_hand((whole(one=-0.25), 0.875, 0), (whole(one=1.0), -1, 0)))


def test_two_checkpoints_as_one_knob(pack):
    turned = pack.nodes.MotionKnobCheckpoints.execute(model(0), model(1), 0.5, 0.8, 0.0, 0.0)[0]
    away = double.Network(1)
    with torch.no_grad():
        for mine, tuned in zip(away.parameters(), double.Network(0).parameters(), strict=True):
            mine -= 0.5 * (tuned - mine)
    assert close(sampled(turned), by_hand((away, 0.8, 0), (double.Network(0), -1, 0)))


def test_a_pair_with_knobs_inside_and_a_knob_on_a_pair(pack):
    switch = pack.nodes.SwitchAtNoiseLevel.execute
    inside = switch(knob(pack, model(0), boundary=0.95), model(1), 0.8, 0.0, 1.5)[0]
    halves = (whole(0, one=-0.25), 0.95, 0), (whole(0, one=1.0), 0.8, 0), (whole(1), -1, 1.5)
    assert close(sampled(inside), by_hand(*halves))
    around = knob(pack, switch(model(0), model(1), 0.8, 0.0, 0.0)[0], boundary=0.4)
    halves = (whole(0, one=-0.25), 0.8, 0), (whole(1, one=-0.25), 0.4, 0), (whole(1, one=1), -1, 0)
    assert close(sampled(around), by_hand(*halves))


def test_several_experts_in_a_chain(pack):
    chain = ()
    for row in (("one", -0.25, 0.9, 3.0), ("one", 0.5, 0.4, 0.0), ("two", 1.0, 0.4, 0.0),
                ("(none)", 1.0, 0.0, 1.0)):  # fmt: skip
        chain = pack.nodes.LoraExpert.execute(*row, chain)[0]
    turned = pack.nodes.ApplyExperts.execute(model(), chain)[0]
    halves = (whole(one=-0.25), 0.9, 3.0), (whole(one=0.5, two=1.0), 0.4, 0), (whole(), -1, 1.0)
    assert close(sampled(turned), by_hand(*halves))
    with pytest.raises(ValueError, match=r"ends at noise level 0.4(.|\n)*Fix: Add an Expert"):
        pack.nodes.ApplyExperts.execute(model(), chain[:-1])


def test_the_schedule_is_shown_and_an_expert_without_a_step_is_named(pack, caplog):
    turned = knob(pack, model(), cfgs=(3.0, 1.0))
    lines = pack.nodes.ShowSchedule.execute(turned, SIGMAS)[0].splitlines()
    assert lines[0] == " 1  1.000  dynamics, cfg 3"
    assert lines[-1] == " 6  0.250  consistency, cfg 1"
    high = knob(pack, model(), boundary=0.1)
    shown = pack.nodes.ShowSchedule.execute(high, SIGMAS)[0]
    assert "Warning: `consistency` gets no step: the noise levels are 1, 0.96" in shown
    sampled(high)
    assert "`consistency` gets no step" in caplog.text
    assert pack.nodes.ShowSchedule.execute(high, SIGMAS[-1:])[0] == ""  # of no steps


def test_a_lora_that_fits_in_part_is_a_warning_and_one_that_does_not_fit_an_error(pack, caplog):
    knob(pack, model(), lora="partial")
    assert "changes 2 weights of this model; nothing in it fits 1 of the LoRA's" in caplog.text
    with pytest.raises(ValueError, match=r"No key of the LoRA `wrong` fits(.|\n)*Fix: "):
        knob(pack, model(), lora="wrong")


def test_refusals(pack):
    switch = pack.nodes.SwitchAtNoiseLevel.execute
    turned = knob(pack, model())
    with pytest.raises(ValueError, match=r"experts already: dynamics, consistency(.|\n)*Fix: "):
        knob(pack, turned)
    with pytest.raises(ValueError, match="`base` has experts"):
        pack.nodes.MotionKnobCheckpoints.execute(model(), turned, 0.25, 0.8, 0.0, 0.0)
    other = model()
    other.model_options["transformer_options"]["sage"] = True
    with pytest.raises(
        ValueError, match=r"settings that the other lacks: transformer_options sage"
    ):
        switch(model(), other, 0.9, 0.0, 0.0)
    wide = model()
    wide.model.diffusion_model.layer = torch.nn.Linear(4, 5, bias=False)
    with pytest.raises(ValueError, match=r"differ: `diffusion_model.layer.weight` is \(4, 4\)"):
        switch(model(), wide, 0.9, 0.0, 0.0)
    with_patch = model()
    with_patch.add_patches({LAYER: ("diff", (torch.eye(4),))})
    stripped = knob(pack, with_patch)
    stripped.patches = {}
    with pytest.raises(ValueError, match="replaced the patches"):
        sampled(stripped)
    strange = model()
    strange.model.model_sampling = double.Sampling()
    with pytest.raises(ValueError, match="noise levels of this model are unknown"):
        sampled(knob(pack, strange))
    with pytest.raises(ValueError, match="no experts"):
        pack.nodes.ShowSchedule.execute(model(), SIGMAS)


def test_a_guidance_that_the_guider_does_not_have_is_refused(pack):
    class Dual(double.CFGGuider):
        def predict_noise(self, *args):
            return super().predict_noise(*args)

    turned = knob(pack, model(), cfgs=(3.0, 1.0))
    with pytest.raises(ValueError, match="a Dual has another guidance"):
        Dual(turned).sample(torch.ones(2, 4), SIGMAS)
    guider = double.CFGGuider(turned)
    guider.conds = {"positive": []}
    with pytest.raises(ValueError, match="no negative prompt"):
        guider.sample(torch.ones(2, 4), SIGMAS)


# recipes, which motionmerge computes


def test_a_recipe_gives_its_experts_on_top_of_what_the_model_has(pack):
    patched = model()
    patched.add_patches({LAYER: ("diff", (torch.eye(4),))}, 0.5)
    values = "motion: 0.5\nstyle: style.safetensors"
    turned = pack.nodes.RecipeExperts.execute(patched, "lora-rescue", values)[0]
    halves = [whole(), whole()]
    for half, weight in zip(halves, (-0.5, 1.0), strict=True):
        with torch.no_grad():
            half.diffusion_model.layer.weight += 0.5 * torch.eye(4) + weight * (
                FACTORS["diffusion_model.layer.lora_B.weight"] @ torch.full((1, 4), 0.5)
            )
    for _ in range(2):
        assert close(sampled(turned), by_hand((halves[0], 0.64, 0), (halves[1], -1, 0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("style: /etc/passwd", "in none of ComfyUI's folders loras and diffusion_models"),
        ("stlye: style.safetensors", "no parameter and no input `stlye`"),
        ("motion: much\nstyle: style.safetensors", "no number"),
        ("motion", "is no value"),
        ("motion: 0.5\nmotion: 1\nstyle: style.safetensors", "`motion` has two values"),
    ],
)
def test_values_of_a_recipe_that_fit_nothing_are_refused(pack, values, message):
    with pytest.raises(ValueError, match=rf"{message}(.|\n)*Fix: "):
        pack.nodes.RecipeExperts.execute(model(), "lora-rescue", values)


def test_a_mistyped_name_of_a_shipped_recipe_gets_the_right_one(pack):
    with pytest.raises(ValueError, match="Fix: Write `lora-rescue` instead of `lora-resque`"):
        pack.nodes.RecipeExperts.execute(model(), "lora-resque", "")


# one definition, for the pack and the package


def test_noise_levels_and_schedules_are_those_of_the_package(pack):
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    from motionmerge.noise_levels import level_of_step

    for scheduler, sampling in (
        (EulerDiscreteScheduler(), double.EPS()),
        (FlowMatchEulerDiscreteScheduler(shift=5.0), double.CONST()),
    ):
        scheduler.set_timesteps(9)
        for index, sigma in enumerate(scheduler.sigmas[:-1].tolist()):
            level = level_of_step(scheduler, index)
            assert pack.switching.noise_level(sampling, sigma) == pytest.approx(level, abs=1e-6)
    for boundary in (0.0, 0.5, 0.9):
        turned = knob(pack, model(), boundary=boundary)
        schedule = ExpertSchedule.two("dynamics", "consistency", boundary=boundary)
        held = pack.experts.experts_of(turned)
        for level in (0.0, 0.5, 0.50001, 0.9, 1.0):
            moment = {"noise_level": level, "timestep": level * 1000, "step_fraction": 0.0}
            assert held.experts[held.due(**moment)].name == schedule.expert_at(**moment)


def test_the_knob_is_that_of_the_shipped_recipes(pack):
    base, lora = {"x.weight": torch.eye(3)}, {"x.lora_A.weight": torch.ones(1, 3),
                                              "x.lora_B.weight": torch.ones(3, 1)}  # fmt: skip
    recipe = Recipe.load("lora-rescue").with_parameters(motion=0.75)
    made = realise(recipe, inputs={"base": base, "style": lora})
    held = pack.experts.experts_of(knob(pack, model(), motion=0.75)).experts
    for expert in held:
        (patch,) = expert.patches
        wanted = base["x.weight"] * patch.keeps + patch.strength * torch.ones(3, 3)
        assert torch.equal(made[expert.name]["x.weight"], wanted)
    tuned = {"x.weight": torch.full((3, 3), 2.0)}
    made = realise(
        Recipe.load("knob").with_parameters(motion=0.75), inputs={"base": base, "tuned": tuned}
    )
    turned = pack.nodes.MotionKnobCheckpoints.execute(model(), model(1), 0.75, 0.8, 0.0, 0.0)[0]
    (patch,) = pack.experts.experts_of(turned).experts[0].patches
    wanted = patch.keeps * tuned["x.weight"] + patch.strength * base["x.weight"]
    assert torch.allclose(made["dynamics"]["x.weight"], wanted)


def test_example_workflows_have_a_picture_all_widgets_and_the_address_of_each_model(pack):
    nodes = {node.define_schema().node_id: node.define_schema() for node in pack.nodes.NODES}
    workflows = sorted((PACK / "example_workflows").glob("*.json"))
    used = set()
    for path in workflows:
        assert path.with_suffix(".jpg").exists()
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for file in node.get("widgets_values", []):
                if str(file).endswith(".safetensors") and file != "my_style_lora.safetensors":
                    (offered,) = node["properties"]["models"]  # for download, where it is absent
                    assert offered["name"] == file
                    assert offered["url"].endswith(f"/{offered['directory']}/{file}")
            if node["type"].startswith("MotionMerge"):
                used.add(node["type"])
                inputs = [one.args[0] for one in nodes[node["type"]].inputs]
                assert [one["name"] for one in node["inputs"]] == inputs
                num_links = sum(one["link"] is not None for one in node["inputs"])
                assert len(node.get("widgets_values", [])) == len(inputs) - num_links
    assert used >= {"MotionMergeKnobLora", "MotionMergeSwitch", "MotionMergeShowSchedule"}
