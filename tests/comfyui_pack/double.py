"""A small double of what the node pack uses of ComfyUI, which is in no package registry.

`tests/comfyui` runs the same pack with the real one, by hand, and checks that it has these names.
"""

from __future__ import annotations

import copy
import sys
import types
import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn


class Sampling:
    """The base of a model's sampling."""

    def timestep(self, sigma):
        return sigma * 1000


class CONST(Sampling):
    """Flow matching."""


class EPS(Sampling):
    """Noise on a signal of weight 1."""


class COSMOS_RFLOW(Sampling):
    """Cosmos."""


class Network(nn.Module):
    """A denoiser of one linear layer and a parameter beside it, as Wan's blocks have one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.diffusion_model = nn.Module()
        self.diffusion_model.layer = nn.Linear(4, 4, bias=False)
        self.diffusion_model.modulation = nn.Parameter(torch.zeros(4))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.model_sampling = CONST()

    def forward(self, x):
        return self.diffusion_model.layer(x) + self.diffusion_model.modulation

    def state_dict(self):
        """Return the weights, and a name without a weight as layers with scales have them."""
        return super().state_dict() | {"diffusion_model.layer.weight_scale": torch.ones(())}


class ModelPatcher:
    """A MODEL: a network that its clones share, and patches that are applied when it is loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parent = model, None
        self.patches, self.object_patches, self.hook_patches = {}, {}, {}
        self.backup, self.hook_backup = {}, {}
        self.patches_uuid = uuid.uuid4()
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks, self.injections, self.attachments = {}, {}, {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.parent, other.patches_uuid = self, self.patches_uuid
        other.patches = {key: list(value) for key, value in self.patches.items()}
        other.object_patches = dict(self.object_patches)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = copy_nested_dicts(self.wrappers)
        other.attachments = {
            key: value.on_model_patcher_clone() for key, value in self.attachments.items()
        }
        return other

    def is_clone(self, other):
        return self.model is other.model

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        for key, value in patches.items():
            entry = (strength_patch, value, strength_model, None, None)
            self.patches.setdefault(key, []).append(entry)
        self.patches_uuid = uuid.uuid4()

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def get_model_object(self, name):
        if name in self.object_patches:
            return self.object_patches[name]
        return get_attr(self.model, name)

    def set_attachments(self, key, value):
        self.attachments[key] = value

    def get_attachment(self, key):
        return self.attachments.get(key)

    def remove_attachments(self, key):
        self.attachments.pop(key, None)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def pre_run(self):
        self.running = True

    def cleanup(self):
        self.running = False

    def loaded(self):
        """Return the network with all patches, on its own."""
        network = copy.deepcopy(self.model)
        state = {key: value.clone() for key, value in network.state_dict().items()}
        for key, entries in self.patches.items():
            if key != "diffusion_model.modulation":  # the fault of ComfyUI's loader
                state[key] = calculate_weight(entries, state[key], key)
        state |= {key: v for key, v in self.object_patches.items() if key in state}
        network.load_state_dict(state, strict=False)
        return network


class CFGGuider:
    """What samples: Euler's method on a network that is loaded at the start."""

    def __init__(self, model_patcher, cfg=1.0):
        self.model_patcher, self.cfg = model_patcher, cfg
        self.model_options = model_patcher.model_options
        self.conds = {"positive": [], "negative": []}

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        return self.inner_model(x) * self.cfg

    def sample(self, noise, sigmas):
        self.model_options = copy_nested_dicts(self.model_options)
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.update(copy_nested_dicts(self.model_patcher.wrappers))
        return Executor(self.outer_sample, self, _all(wrappers, "outer_sample"))(
            noise, None, None, sigmas
        )

    def outer_sample(self, noise, latent_image, sampler, sigmas):
        self.inner_model, self.conds, self.loaded_models = prepare_sampling(
            self.model_patcher, noise.shape, self.conds, self.model_options
        )
        self.model_patcher.pre_run()
        x = noise
        for sigma, after in pairwise(sigmas):
            wrappers = self.model_options["transformer_options"]["wrappers"]
            predict = Executor(self.predict_noise, self, _all(wrappers, "predict_noise"))
            x = x + (after - sigma) * predict(x, sigma[None], self.model_options, 0)
        return x


class Executor:
    """Calls wrappers from the outermost on, and then what they are around."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)


def _all(wrappers, kind):
    return [one for each in wrappers.get(kind, {}).values() for one in each]


def get_attr(found, name):
    for part in name.split("."):
        found = getattr(found, part)
    return found


def get_key_weight(model, key):
    return get_attr(model, key), None, None


def prepare_sampling(patcher, shape, conds, model_options=None):
    return patcher.loaded(), conds, []


def copy_nested_dicts(value):
    if isinstance(value, dict):
        return {key: copy_nested_dicts(one) for key, one in value.items()}
    return list(value) if isinstance(value, list) else value


def calculate_weight(patches, weight, key):
    for strength, value, keeps, *_ in patches:
        if isinstance(value, WeightAdapterBase):
            weight = value.calculate_weight(weight * keeps, key, strength)
            continue
        if isinstance(value, list):
            held, convert = value[0]
            value = (
                "diff",
                (calculate_weight(value[1:], convert(held.clone(), inplace=True), key),),
            )
        weight = weight * keeps + strength * value[1][0]
    return weight


def load_lora(lora, names, log_missing=True):
    found = {}
    for front, key in names.items():
        if f"{front}.diff" in lora:
            found[key] = ("diff", (lora[f"{front}.diff"],))
    return found


def model_lora_keys_unet(model, key_map):
    for key in model.state_dict():
        key_map[key.removesuffix(".weight")] = key
    return key_map


class WeightAdapterBase:
    """What a patch may be that computes a weight by itself."""


class Anything:
    """Stands for `io.Schema` and what goes into it: it keeps what it got."""

    def __init__(self, *args, **kwargs):
        self.args, self.__dict__ = args, {"args": args, **kwargs}


class NodeOutput(Anything):
    """What a node returns."""

    def __getitem__(self, index):
        return self.args[index]


def install(files: dict[str, Any]) -> Iterator[str]:
    """Put the double into `sys.modules`, and yield the names that are new there.

    Args:
        files: LoRAs by name.
    """

    def kind(**members):
        return type("Kind", (), {"Input": Anything, "Output": Anything, **members})

    modules = {
        "comfy": {},
        "comfy.lora": {
            "calculate_weight": calculate_weight,
            "load_lora": load_lora,
            "model_lora_keys_unet": model_lora_keys_unet,
        },
        "comfy.lora_convert": {"convert_lora": lambda lora: lora},
        "comfy.model_patcher": {"get_key_weight": get_key_weight},
        "comfy.model_sampling": {"CONST": CONST, "EPS": EPS, "COSMOS_RFLOW": COSMOS_RFLOW},
        "comfy.patcher_extension": {
            "copy_nested_dicts": copy_nested_dicts,
            "WrappersMP": types.SimpleNamespace(PREDICT_NOISE="predict_noise"),
        },
        "comfy.sampler_helpers": {"prepare_sampling": prepare_sampling},
        "comfy.samplers": {"CFGGuider": CFGGuider},
        "comfy.weight_adapter": {"WeightAdapterBase": WeightAdapterBase},
        "comfy.utils": {
            "get_attr": get_attr,
            "load_torch_file": lambda path, safe_load: torch.load(path),
        },
        "folder_paths": {
            "get_filename_list": lambda folder: list(files),
            "get_full_path_or_raise": lambda folder, name: files[name],
        },
        "comfy_api": {},
        "comfy_api.latest": {
            "ComfyExtension": type("ComfyExtension", (), {}),
            "io": types.SimpleNamespace(
                ComfyNode=type("ComfyNode", (), {}),
                NodeOutput=NodeOutput,
                Schema=Anything,
                Custom=lambda name: kind(),
                **{name: kind() for name in ("Model", "Float", "Combo", "String", "Sigmas")},
            ),
            "ui": types.SimpleNamespace(PreviewText=Anything),
        },
    }
    for name, members in modules.items():
        if name not in sys.modules:
            module = types.ModuleType(name)
            vars(module).update(members)
            sys.modules[name] = module
            front, _, last = name.rpartition(".")
            if front:
                setattr(sys.modules[front], last, module)
            yield name
