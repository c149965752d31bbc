"""An image-to-video pipeline in a folder or on the Hugging Face hub, looked at but not loaded.

No code that comes with a model is run, and pickles are read only when asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from motionmerge.errors import CheckpointError, ConfigError
from motionmerge.io.first_bytes import weights_format
from motionmerge.io.hashing import hash_file
from motionmerge.io.json_file import read_json
from motionmerge.io.paths import exists, path_of
from motionmerge.io.quantised import describe_quantisation
from motionmerge.io.safetensors_file import SafetensorsFile, StoredTensor
from motionmerge.io.weights import WeightsReader
from motionmerge.merging.inputs.sources import MODULES
from motionmerge.models.consisti2v.settings import ours_for_the_hubs
from motionmerge.models.video_pipeline import Config
from motionmerge.sampling.families.families import POCKET, family_of
from motionmerge.sampling.families.limits import Configs, Limits, VideoFamily
from motionmerge.sampling.request.modular_folder import (
    MODULAR_INDEX_FILE,
    index_as_of_a_pipeline,
    not_fetched,
    parts_of_folder,
)
from motionmerge.tensors import num_bytes

INDEX_FILE = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_TIMESTEPS = 100_000
_SHARD = re.compile(r"-\d+-of-(\d{1,9})\.")
_IS_NO_NETWORK = re.compile(r"Tokenizer|Processor|Extractor")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_VOCABULARIES = (".json", ".txt", ".model", ".spm", ".vocab", ".bpe", ".tiktoken", ".jinja")


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """A diffusers pipeline on disk, looked at but not loaded.

    Attributes:
        path: The folder.
        name: What the user called it.
        family: How its pipeline is called.
        configs: The configuration of each part.
        weights: Weight files of each part.
        others: Files of the parts that are neither weights nor their `config.json`: vocabularies,
            settings of schedulers and processors.
    """

    path: Path
    name: str
    family: VideoFamily
    configs: Configs
    weights: Mapping[str, tuple[Path, ...]]
    others: tuple[Path, ...] = ()

    @property
    def limits(self) -> Limits:
        """Sizes and lengths of its videos."""
        return self.family.limits(self.configs)

    def num_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Estimate the memory that each part takes; pickles count as they are stored."""
        return {part: _num_bytes(files, dtype) for part, files in self.weights.items()}

    def hash_parts(self) -> str:
        """Return `sha256:<hex>` of every file that decides what the parts besides `MODULES` do."""
        weights = (
            file for part, own in self.weights.items() if part not in MODULES for file in own
        )
        files = sorted([*weights, *self.others], key=lambda file: file.relative_to(self.path))
        lines = (f"{file.relative_to(self.path).as_posix()} {hash_file(file)}\n" for file in files)
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def find_pipeline(
    name: str | Path, *, variant: str | None = None, legacy: bool = False
) -> PipelineFolder:
    """Look at a pipeline's folder, or download one from the hub into its cache first.

    Without a connection, or with `HF_HUB_OFFLINE=1`, what the cache holds is used.

    Args:
        name: A diffusers folder, or `owner/name` or `hub:owner/name` on the hub.
        variant: Take the files of this variant where there are some, e.g. "fp16".
        legacy: Also accept `.bin` pickles, read as tensors only.

    Raises:
        CheckpointError: There is no such pipeline, it comes with code of its own, or its weights
            are pickles.
        ConfigError: It is no image-to-video pipeline that we know.
    """
    path = path_of(name)
    if not exists(path):
        path = _download(str(name).removeprefix("hub:"), variant=variant, legacy=legacy)
    index = _read_index(path)
    family = _family(index, path)
    if family.modular is not None:
        settings = {name: value for name, value in index.items() if not isinstance(value, list)}
        index = {**settings, **parts_of_folder(path, index, family)}
    configs: dict[str, Config] = {"": index}
    weights: dict[str, tuple[Path, ...]] = {}
    others: list[Path] = []
    for part, (library, class_name) in _parts(index, path).items():
        if library is None:
            continue
        if not (path / part).is_dir():
            raise CheckpointError(
                f"{path} lists a `{part}`, and has no folder of that name.",
                fix="Download it again, or convert the whole model again.",
            )
        if (path / part / "config.json").is_file():
            configs[part] = read_json(path / part / "config.json")
        own = _other_files(path / part)
        _refuse_foreign_code(part, [*own, path / part / "config.json"])
        others += own
        files = weight_files(path / part, variant=variant)
        if files and files[0].suffix != ".safetensors" and not legacy:
            raise CheckpointError(
                f"The weights of `{part}` in {path} are pickles ({files[0].name}).",
                fix="Use a safetensors version (`variant` may name one), or pass `legacy=True` to "
                "read their tensors.",
            )
        for file in files:
            weights_format(file)
        if part in configs and not _IS_NO_NETWORK.search(class_name or ""):
            _check_weights(path / part, files)
            if "quantization_config" not in configs[part]:
                _refuse_codes(path / part, files)
        if files:
            weights[part] = files
    if family.takes_text and index.get("tokenizer", [None])[0] is None:
        raise CheckpointError(
            f"{path} has no tokenizer, so prompts cannot be read.",
            fix="Convert it again with `motionmerge convert --tokenizer FOLDER`."
            if family.name in ("dynamicrafter", "videocrafter")
            else "Download the whole folder again; its `tokenizer` is needed.",
        )
    return PipelineFolder(
        path=path,
        name=str(name),
        family=family,
        configs=configs,
        weights=weights,
        others=tuple(others),
    )


def pipeline_class(family: VideoFamily) -> Any:
    """Return the class whose `from_pretrained` loads a family."""
    home = importlib.import_module(family.home)
    return getattr(home, family.pipelines[0])


def weight_files(folder: Path, *, variant: str | None = None) -> tuple[Path, ...]:
    """List the weight files of a part that would be loaded: safetensors first, one variant."""
    there = sorted(path for path in folder.glob("*") if path.suffix in _WEIGHTS)
    for suffix in _WEIGHTS:
        files = [path for path in there if path.suffix == suffix]
        wanted = [path for path in files if variant and variant_of(path) == variant]
        plain = [path for path in files if variant_of(path) is None]
        variants = {variant_of(path) for path in files}
        if not (wanted or plain) and len(variants) == 1:
            return tuple(files)  # there is nothing else to load
        if wanted or plain:
            return tuple(wanted or plain)
    return ()


def _check_weights(folder: Path, files: Sequence[Path]) -> None:
    """Check that the weight files of a network are there.

    Raises:
        CheckpointError: There are none, or fewer shards than their names promise.
    """
    fix = "Download it again, or name a variant that is there with `variant`."
    if not files:
        raise CheckpointError(f"{folder} holds no weights.", fix=fix)
    shards = [int(found[1]) for file in files if (found := _SHARD.search(file.name))]
    if len(files) == len(shards) < max(shards):
        raise CheckpointError(
            f"{folder} holds {len(shards)} of {max(shards)} shards: {files[0].name}"
            f"{', ..' if len(files) > 1 else ''}.",
            fix=fix,
        )


def _refuse_codes(folder: Path, files: Sequence[Path]) -> None:
    """Refuse codes with scales, of which diffusers and transformers would take the codes alone.

    Raises:
        CheckpointError: Says how they are quantised.
    """
    if any(weights_format(file) != "safetensors" for file in files):
        return
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(SafetensorsFile(file))) for file in files]
        reader = WeightsReader(folder, opened)
        found = describe_quantisation(reader, reader.metadata)
    if found is not None:
        raise CheckpointError(
            f"The weights in {folder} are quantised ({found}), and its config.json has no "
            "`quantization_config`: the codes would be taken for the weights.",
            fix="Use the unquantised model. Scaled fp8 and int8 become plain weights by "
            "`motionmerge merge`: a recipe with that folder as the input `base`, and the expert "
            "`all: base`.",
        )


def variant_of(file: Path) -> str | None:
    """Return the variant in the name of a weights file; None for plain weights.

    It stands before the number of a shard or, in older folders, behind it:
    `model.fp16-00001-of-00002.safetensors`, `model-00001-of-00002.fp16.safetensors`.
    """
    found = re.fullmatch(r"[^.]+\.([^.]+?)(-\d+-of-\d+)?", file.stem)
    return None if found is None else found[1]


def _refuse_foreign_code(part: str, files: Sequence[Path]) -> None:
    """Refuse a part whose settings name code to download and run, which nothing here does.

    Raises:
        CheckpointError: One has an `auto_map`, or is damaged.
    """
    for file in files:
        if file.name.endswith("config.json") and file.is_file():
            settings = read_json(file)
            if "auto_map" in settings:
                raise CheckpointError(
                    f"`{part}` needs code of its own: {file} has an `auto_map`. It is not run.",
                    fix="Use a version of the model whose parts are classes of diffusers or "
                    "transformers.",
                )
            steps = settings.get("num_train_timesteps", 0)
            if isinstance(steps, (int, float)) and steps > _MAX_TIMESTEPS:
                raise CheckpointError(
                    f"{file} asks for {steps:,} timesteps, more than {_MAX_TIMESTEPS:,}.",
                    fix="Download it again.",
                )


def _other_files(part: Path) -> list[Path]:
    """List the vocabularies and settings of a part besides its configuration."""
    return [
        file
        for file in part.rglob("*")
        if file.is_file()
        and file.suffix in _VOCABULARIES
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file != part / "config.json"
    ]


def num_stored(files: Sequence[Path]) -> int:
    """Count the numbers in safetensors files; 0 where there are others."""
    if any(file.suffix != ".safetensors" for file in files):
        return 0
    return sum(math.prod(stored.shape) for stored in _stored(files))


def _num_bytes(files: Sequence[Path], dtype: torch.dtype) -> int:
    total = sum(path.stat().st_size for path in files if path.suffix != ".safetensors")
    for spec in _stored(path for path in files if path.suffix == ".safetensors"):
        total += num_bytes(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
    return total


def _stored(files: Iterable[Path]) -> Iterator[StoredTensor]:
    for path in files:
        with closing(SafetensorsFile(path)) as file:
            yield from file.tensors.values()


def _download(name: str, *, variant: str | None, legacy: bool) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"There is no folder {name}.",
            fix="Give a diffusers folder, a hub id such as `owner/name`, or `pocket`.",
        )
    import huggingface_hub

    try:
        index = Path(huggingface_hub.hf_hub_download(name, INDEX_FILE)).parent
        family = _family(_read_index(index), index)
        if family.is_ours:  # diffusers looks for the code of classes that it does not know
            parts = [f"{part}/*" for part in _parts(_read_index(index), index)]
            fetched = huggingface_hub.snapshot_download(
                name, allow_patterns=[INDEX_FILE, *parts], ignore_patterns=["*.py"]
            )
            return Path(fetched)
        return Path(
            pipeline_class(family).download(
                name,
                variant=variant,
                use_safetensors=None if legacy else True,
                trust_remote_code=False,
            )
        )
    except (OSError, ValueError) as error:
        if _is_modular_on_the_hub(name, error):
            raise not_fetched(name) from error
        raise CheckpointError(
            f"{name} is no folder here and could not be had from the hub: {first_line(error)}",
            fix="Check the name and the connection, log in with `hf auth login` if it is gated, or "
            "give the folder of a downloaded copy.",
        ) from error


def _is_modular_on_the_hub(name: str, error: BaseException) -> bool:
    """Check whether the hub has a modular pipeline where it has no other."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    if not isinstance(error, EntryNotFoundError):
        return False
    try:
        huggingface_hub.hf_hub_download(name, MODULAR_INDEX_FILE)
    except (OSError, ValueError):
        return False
    return True


def _read_index(path: Path) -> Config:
    if not (path / INDEX_FILE).is_file() and (path / MODULAR_INDEX_FILE).is_file():
        return index_as_of_a_pipeline(read_json(path / MODULAR_INDEX_FILE))
    if not (path / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{path} is no diffusers pipeline: it has no {INDEX_FILE}.",
            fix="Give a folder that `save_pretrained` or `motionmerge convert` wrote.",
        )
    return ours_for_the_hubs(read_json(path / INDEX_FILE))


def _parts(index: Config, path: Path) -> dict[str, tuple[str | None, str | None]]:
    """List the parts of a pipeline with the library and class of each.

    Raises:
        CheckpointError: A part is of a library that is not ours to trust.
    """
    parts = {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2
    }
    for name, (library, _) in parts.items():
        if not name.isidentifier():
            raise CheckpointError(
                f"{path} has a part called `{name[:80]}`, which is no name of a folder in it.",
                fix="Do not use this model; get it from a source that you trust.",
            )
        known = library in (None, "diffusers", "transformers") or (
            isinstance(library, str)
            and (library.startswith("motionmerge.models.") or hasattr(diffusers.pipelines, library))
        )
        if not known or list((path / name).glob("*.py")):
            raise CheckpointError(
                f"`{name}` of {path} needs code of its own (`{library}`), which is not run.",
                fix="Use a version of the model whose parts are classes of diffusers or "
                "transformers.",
            )
    return parts


def _family(index: Config, path: Path) -> VideoFamily:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path} names no pipeline class of diffusers, but {name!r}.",
            fix="Use a model without code of its own.",
        )
    if name == "WanPipeline" and not index.get("expand_timesteps"):
        raise ConfigError(
            f"{path} makes videos from text alone.",
            fix="Use the image-to-video model of the same family, e.g. Wan2.1-I2V.",
        )
    family = family_of(name)
    if family is POCKET:
        raise ConfigError(f"{path} is the pocket model.", fix="Use `load_pocket()`.")
    missing = [name for name in family.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{family.name} needs the package {missing[0]}, which is not installed.",
            fix=f"Install it, e.g. `pip install {missing[0]}`.",
        )
    return family


def first_line(error: BaseException) -> str:
    """Shorten the message of another library's error."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
