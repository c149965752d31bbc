"""A LoRA's strength stands in its tensors, its header or peft's file; peft's merge judges."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.weights import save_weights
from motionmerge.merging.algebra.nodes import Checkpoint
from motionmerge.merging.lora.scaling import as_peft
from motionmerge.merging.lora.settings import settings_of_file
from motionmerge.merging.lora.task_vector import lora
from motionmerge.patterns import compile_pattern
from motionmerge.switching.lora_layers import read_lora

Tensors = dict[str, torch.Tensor]
KNOWS_MICA = Version(peft.__version__) >= Version("0.21")


class Net(nn.Module):
    """Layers with the same last name at several depths."""

    def __init__(self) -> None:
        super().__init__()

        def linear() -> nn.Linear:
            return nn.Linear(12, 12, bias=False)

        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": linear(), "to_k": linear()})})
            for _ in range(2)
        )
        self.model = nn.ModuleDict({"to_q": linear()})
        self.to_q = linear()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.to_q(sample)


def trained(folder: Path, **config: Any) -> tuple[Tensors, Tensors]:
    """Save an adapter with random numbers; give the weights before, and with what peft loads."""
    torch.manual_seed(0)
    net = Net()
    base = {name: value.clone() for name, value in net.state_dict().items()}
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], **config}
    adapted = peft.get_peft_model(net, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    again = Net()
    again.load_state_dict(base)
    merged = peft.PeftModel.from_pretrained(again, folder).merge_and_unload()
    return base, merged.state_dict()


def signed(base: Tensors, file: Path) -> Tensors:
    """Add what the layers of a signed LoRA multiply out to."""
    found = dict(base)
    layers = read_lora(file, {"denoiser": Net()}, name="style").layers["denoiser"]
    for name, layer in layers.items():
        product = layer.alpha / layer.rank * layer.up @ layer.down
        found[f"{name}.weight"] = base[f"{name}.weight"] + product
    return found


def agrees_with_peft(folder: Path, **config: Any) -> None:
    base, expected = trained(folder, **config)
    file = folder / "adapter_model.safetensors"
    dense = (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    for merged in (dense, signed(base, file)):
        for name in base:
            torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=1e-5)


PATTERNS = {
    "anchored": {"^blocks.0.attn1.to_q": 5, "^to_q": 7},
    "the last name": {"to_q": 5},
    "the first match counts": {"blocks.0.attn1.to_q": 5, "to_q": 7},
    "a name that begins like a wrapper": {"^model.to_q": 5},
    "a whole path with peft's wrapper": {"base_model.model.to_q": 5},
    "a class of signs": {r"blocks\.\d+\.attn1\.to_[qk]": 5},
    "alternatives": {"to_q|attn1.to_k": 5},
    "no layer": {"blocks.7.attn1.to_q": 5},
}


@pytest.mark.filterwarnings("ignore:The following")  # peft's, of patterns that fit no layer
@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=list(PATTERNS))
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_alpha_and_rank_of_some_layers_are_matched_as_peft_does(
    tmp_path: Path, patterns: dict[str, int], rank_stabilised: bool
) -> None:
    ranks = {key: value - 2 for key, value in patterns.items()}
    agrees_with_peft(
        tmp_path, alpha_pattern=patterns, rank_pattern=ranks, use_rslora=rank_stabilised
    )


def test_the_first_pattern_that_fits_counts_whatever_comes_later(tmp_path: Path) -> None:
    agrees_with_peft(tmp_path, alpha_pattern={"a.*|to_q": 7, "blocks.0.attn1.to_q": 5})
    agrees_with_peft(tmp_path, alpha_pattern={"blocks.0.attn1.to_q": 5, "to_q": 7})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_fan_in_fan_out_changes_nothing_of_linear_layers(tmp_path: Path) -> None:
    agrees_with_peft(tmp_path, fan_in_fan_out=True)


STARTS = (True, False, "gaussian", "eva", "orthogonal", *(["mica"] if KNOWS_MICA else []))


@pytest.mark.filterwarnings("ignore:.*EVA|.*lora_model")
@pytest.mark.parametrize("start", STARTS)
def test_starts_that_leave_the_weights_alone_are_what_peft_loads(
    tmp_path: Path, start: bool | str
) -> None:
    agrees_with_peft(tmp_path, init_lora_weights=start)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"]
)
@pytest.mark.parametrize("where", ["file", "header"])
def test_starts_that_change_the_weights_are_refused_by_name(
    tmp_path: Path, start: str, where: str
) -> None:
    given = {"r": 2, "lora_alpha": 2, "init_lora_weights": start}
    with pytest.raises(CheckpointError, match=f"`{start}`.*\n.*Fix: .*save_pretrained"):
        factor(tmp_path, given, where=where)


@pytest.mark.filterwarnings("ignore:PiSSA changes")
def test_a_start_that_peft_converted_is_a_plain_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    base = {name: value.clone() for name, value in net.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(net, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    adapted.save_pretrained(
        tmp_path / "made", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    expected = adapted.merge_and_unload().state_dict()
    file = tmp_path / "made" / "adapter_model.safetensors"
    merged = (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-5, rtol=1e-4)


def pair(path: str = "transformer.to_q", rank: int = 2, size: float = 1.0) -> Tensors:
    return {
        f"{path}.lora_A.weight": torch.ones(rank, 12),
        f"{path}.lora_B.weight": torch.full((12, rank), size / rank),
    }


def strength(file: Path | Tensors, names: tuple[str, ...] = ("to_q",)) -> list[float]:
    """Give the factor of each layer, the same in the dense and in the signed way."""
    base = {f"{name}.weight": torch.zeros(12, 12) for name in names}
    merged = (Checkpoint.from_tensors(base, name="base") + lora(file, 1.0)).tensors()
    layers = read_lora(file, {"denoiser": Net()}, name="style").layers["denoiser"]
    found = [float(merged[f"{name}.weight"][0, 0]) for name in names]
    for name, value in zip(names, found, strict=True):
        product = layers[name].alpha / layers[name].rank * layers[name].up @ layers[name].down
        assert float(product[0, 0]) == pytest.approx(value)
    return found


def factor(folder: Path, given: Any, *, where: str, tensors: Tensors | None = None) -> float:
    """Give the factor of a LoRA with settings in its header or beside it."""
    path = folder / "adapter_model.safetensors"
    text = given if isinstance(given, str) else json.dumps(given)
    metadata = {"lora_adapter_metadata": text} if where == "header" else {}
    save_weights(path, tensors or pair("to_q"), metadata)
    if where == "file":
        (folder / "adapter_config.json").write_text(text)
    return strength(path)[0]


def with_header(folder: Path, metadata: dict[str, str], tensors: Tensors | None = None) -> Path:
    save_weights(folder / "style.safetensors", tensors or pair(), metadata)
    return folder / "style.safetensors"


def test_each_component_has_its_own_settings(tmp_path: Path) -> None:
    given = {
        "transformer.r": 2, "transformer.lora_alpha": 6,
        "text_encoder.r": 4, "text_encoder.lora_alpha": 64, "text_encoder.use_dora": True,
    }  # fmt: skip
    for order in (given, dict(reversed(given.items()))):
        header = {"lora_adapter_metadata": json.dumps(order)}
        assert strength(with_header(tmp_path, header)) == [3.0]
        assert strength(with_header(tmp_path, header, pair("to_q"))) == [3.0]


def test_settings_of_two_denoisers_do_not_mix(tmp_path: Path) -> None:
    given = {"transformer.lora_alpha": 6, "transformer_2.lora_alpha": 10}
    tensors = pair("transformer.to_q") | pair("transformer_2.to_q")
    file = with_header(tmp_path, {"lora_adapter_metadata": json.dumps(given)}, tensors)
    names = ["transformer.to_q.weight", "transformer_2.to_q.weight"]
    base = Checkpoint.from_tensors({name: torch.zeros(12, 12) for name in names}, name="base")
    merged = (base + lora(file, 1.0)).tensors()
    assert [float(merged[name][0, 0]) for name in names] == [3.0, 5.0]
    nets = {"transformer": Net(), "transformer_2": Net()}
    layers = read_lora(file, nets, name="style").layers
    assert [layers[name]["to_q"].alpha for name in nets] == [6.0, 10.0]
    with pytest.raises(CheckpointError, match="names no part of the pipeline"):
        strength(with_header(tmp_path, {"lora_adapter_metadata": json.dumps(given)}, pair("to_q")))


@pytest.mark.parametrize(
    "key",
    ["lora_alpha", "network_alpha", "alpha", "ss_network_alpha", "transformer.lora_alpha"],
)
def test_alpha_in_a_plain_header_counts_over_the_rank_of_the_matrices(
    tmp_path: Path, key: str
) -> None:
    assert strength(with_header(tmp_path, {key: "8"})) == [4.0]
    assert strength(with_header(tmp_path, {key: "8.0", "use_rslora": "True"})) == [
        pytest.approx(8 / 2**0.5)
    ]
    assert strength(with_header(tmp_path, {key: "None"})) == [1.0]
    with pytest.raises(CheckpointError, match="not a number"):
        strength(with_header(tmp_path, {key: "eight"}))


def test_plain_alphas_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    assert strength(with_header(tmp_path, {"lora_alpha": "8", "network_alpha": "8.0"})) == [4.0]
    with pytest.raises(CheckpointError, match=r"`lora_alpha` 8, `network_alpha` 4"):
        strength(with_header(tmp_path, {"lora_alpha": "8", "network_alpha": "4"}))


@pytest.mark.parametrize("key", ["transformer.r", "lora_rank", "ss_network_dim"])
def test_a_rank_in_a_plain_header_that_is_not_the_factors_is_refused(
    tmp_path: Path, key: str
) -> None:
    """Alpha over which of the two, nothing says."""
    for rank in ("2", "Dynamic", "None"):
        assert strength(with_header(tmp_path, {"lora_alpha": "8", key: rank})) == [4.0]
    own = pair() | {"transformer.to_q.alpha": torch.tensor(2.0)}
    assert strength(with_header(tmp_path, {"lora_alpha": "8", key: "64"}, own)) == [1.0]
    assert strength(with_header(tmp_path, {key: "64"})) == [1.0]
    with pytest.raises(CheckpointError, match=r"has rank 2, but .*lora_alpha.* says 64"):
        strength(with_header(tmp_path, {"lora_alpha": "8", key: "64"}))


def test_what_is_nearer_to_the_layer_counts_more(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 20, "r": 2}))
    path = tmp_path / "adapter_model.safetensors"
    plain = {"lora_alpha": "8"}
    both = plain | {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6})}
    for metadata, alpha, expected in (
        (both, True, 1.0), (both, False, 3.0), (plain, False, 4.0), ({}, False, 10.0),
    ):  # fmt: skip
        tensors = pair() | ({"transformer.to_q.alpha": torch.tensor([2.0])} if alpha else {})
        save_weights(path, tensors, metadata)
        assert strength(path) == [expected]


def test_a_renamed_lora_that_lies_alone_keeps_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 20, "r": 2}))
    save_weights(tmp_path / "style.safetensors", pair(), {})
    assert strength(tmp_path / "style.safetensors") == [10.0]
    save_weights(tmp_path / "other.safetensors", pair(), {})  # nothing says whose it is now
    assert strength(tmp_path / "style.safetensors") == [1.0]


def test_settings_without_alpha_have_that_of_peft(tmp_path: Path) -> None:
    assert peft.LoraConfig().lora_alpha == peft.LoHaConfig().alpha == 8
    assert factor(tmp_path, {"peft_type": "LORA", "r": 2}, where="file") == 4.0


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig])
def test_every_setting_of_the_installed_peft_is_known_where_it_is_off(
    tmp_path: Path, config: Any
) -> None:
    found = config(target_modules=["to_q"])
    found.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    raw, known = settings_of_file(tmp_path)
    assert raw.keys() >= {field.name for field in dataclasses.fields(config)} - {"runtime_config"}
    assert known[""].alpha == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("layer_replication", [[0, 1]]), ("target_parameters", ["a.weight"]),
        ("use_qalora", True), ("alora_invocation_tokens", [1]), ("arrow_config", {"top_k": 1}),
        ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 1}), ("a_new_one", 0.5),
        ("trainable_token_indices", [1]), ("peft_type", "ADALORA"), ("peft_type", "OFT"),
        ("peft_type", "VERA"), ("monteclora_config", {"num_samples": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["file", "header"])
def test_settings_that_may_do_more_are_refused_by_name(
    tmp_path: Path, name: str, value: Any, where: str
) -> None:
    with pytest.raises(CheckpointError, match=f"`{name}` is"):
        factor(tmp_path, {"r": 2, "lora_alpha": 2, name: value}, where=where)


DAMAGED = {
    "a list": "[1, 2]",
    "null": "null",
    "a text": '"lora"',
    "no JSON": "{lora_alpha: 8}",
    "deep": "[" * 100_000,
    "deep inside": '{"eva_config":' * 50_000,
    "an alpha that is a list": '{"lora_alpha": [8]}',
    "an alpha that is null": '{"lora_alpha": null}',
    "an alpha that is true": '{"lora_alpha": true}',
    "an alpha that is no number": '{"lora_alpha": "many"}',
    "an alpha without bounds": '{"lora_alpha": Infinity}',
    "an alpha beyond floats": '{"lora_alpha": 1' + "0" * 400 + "}",
    "no rank at all": '{"lora_alpha": 8, "r": 0}',
    "a rank that is a text": '{"lora_alpha": 8, "r": "x"}',
    "patterns in a list": '{"lora_alpha": 8, "alpha_pattern": ["to_q"]}',
    "a pattern for no number": '{"lora_alpha": 8, "alpha_pattern": {"to_q": "x"}}',
    "a bad pattern": '{"lora_alpha": 8, "alpha_pattern": {"to_q[": 3}}',
    "a pattern that looks back": r'{"lora_alpha": 8, "alpha_pattern": {"(t)\\1o_q": 3}}',
    "a very long pattern": '{"lora_alpha": 8, "alpha_pattern": {"' + "a" * 5000 + '": 3}}',
    "a strange switch": '{"lora_alpha": 8, "use_rslora": "perhaps"}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=list(DAMAGED))
@pytest.mark.parametrize("where", ["file", "header"])
def test_damaged_settings_are_a_named_error(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        factor(tmp_path, text, where=where)
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_a_kind_that_is_not_that_of_the_matrices_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"`peft_type` is {kind} (.|\n)*is part of a LORA"):
        factor(tmp_path, {"r": 2, "lora_alpha": 2, "peft_type": kind}, where="file")


@pytest.mark.parametrize("where", ["file", "header"])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_none_is_refused_where_no_strength_depends_on_it(
    tmp_path: Path, name: str, where: str
) -> None:
    own = {**pair("to_q"), "to_q.alpha": torch.tensor(2.0)}
    with pytest.raises(CheckpointError, match=r"The pattern 'to_k\['"):
        factor(tmp_path, {"r": 2, "lora_alpha": 2, name: {"to_k[": 3}}, where=where, tensors=own)


def test_settings_that_are_no_text_are_a_named_error(tmp_path: Path) -> None:
    save_weights(tmp_path / "adapter_model.safetensors", pair())
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="Cannot read"):
        strength(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "pattern", ["(.*)*(.*)*(.*)*z", "((((a?){1000}){1000}){1000}){1000}b", "(a|a|.)*" * 100 + "!"]
)
def test_a_hostile_pattern_ends(tmp_path: Path, pattern: str) -> None:
    started = time.perf_counter()
    given = {"r": 2, "lora_alpha": 2, "alpha_pattern": {pattern: 4}}
    try:
        assert factor(tmp_path, given, where="file") == 1.0
    except CheckpointError as error:
        assert "pattern" in str(error)
    assert time.perf_counter() - started < 20


ATOMS = ("a", "to_q", "to_[qk]", ".*", r"\.", ".", r"\d+", "blocks", "(attn1|ffn)", "^", "$", "q?",
         "[^q]", "{0,2}", "{2}", "(x|to_)q", "o+", "*", "+?", r"\w+", r"\b", "0", "|")  # fmt: skip
PATHS = ("blocks.0.attn1.to_q", "to_q", "blocks.10.ffn.net.0.proj", "model.layers.1.q", "x")


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5), st.sampled_from(PATHS))
def test_patterns_fit_where_they_do_for_peft(atoms: list[str], path: str) -> None:
    pattern = "".join(atoms)
    try:
        found = compile_pattern(as_peft(pattern))(path)
    except ConfigError as error:
        if "possessive" not in str(error):
            with pytest.raises(re.error):
                re.compile(rf"(.*\.)?({pattern})$")
    else:
        assert found is (re.match(rf"(.*\.)?({pattern})$", path) is not None)


def test_a_rank_that_is_not_the_factors_is_refused_as_peft_refuses_its_shapes(tmp_path):
    trained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 64}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Net(), tmp_path)
    base = Checkpoint.from_tensors(Net().state_dict(), name="base")
    with pytest.raises(CheckpointError, match=r"has rank 2, but .*says 64") as caught:
        (base + lora(tmp_path / "adapter_model.safetensors", 1.0)).tensors()
    assert caught.value.fix
