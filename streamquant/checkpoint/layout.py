"""Which files of a folder are its checkpoint, told by their names: weights, index, config, and what is left out and why.

    STEM.safetensors, or STEM-00001-of-0000N.safetensors with or without STEM.safetensors.index.json
    config.json, or params.json beside consolidated*.safetensors

The stem is `model` for transformers, `consolidated` in Mistral's own layout, `diffusion_pytorch_model` for a part of a pipeline of
diffusers. The output of a conversion has the layout of its source.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from streamquant.errors import CheckpointError

CONFIG_NAME = "config.json"
MISTRAL_CONFIG_NAME = "params.json"
CONFIG_NAMES = (CONFIG_NAME, MISTRAL_CONFIG_NAME)
# What describes a quantization at the top of each config. vLLM reads the same keys.
QUANTIZATION_KEYS = {CONFIG_NAME: "quantization_config", MISTRAL_CONFIG_NAME: "quantization"}

MODEL, MISTRAL = "model", "consolidated"
STEMS = (MODEL, "diffusion_pytorch_model", MISTRAL)  # where several are in one folder, the first is the checkpoint
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PIPELINE_INDEX_NAME = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Weights in other containers. They would be a second, unquantized copy of the model in the output.
OTHER_WEIGHTS = (*PICKLES, ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite")
# Read by engines where config.json says nothing. They would describe weights that the output does not have.
OTHER_QUANTIZATIONS = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
DESCRIBES_ANOTHER_QUANTIZATION = "describes another quantization"

_NUMBERED = re.compile(r"(.+)-([0-9]{5,6})-of-(?!0+\.)([0-9]{5,6})\.safetensors")
_INDEX = re.compile(r".*\.index(\.[^./]+)?\.json")
_ADAPTER = re.compile(r"adapter_(config\.json|model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of a checkpoint's files."""

    stem: str = MODEL
    config_name: str = CONFIG_NAME

    @property
    def index_name(self) -> str:
        """The file that says which tensor is in which shard."""
        return self.stem + INDEX_SUFFIX

    @property
    def quantization_key(self) -> str:
        """The key of the config that describes the quantization."""
        return QUANTIZATION_KEYS[self.config_name]

    def shard_name(self, number: int, total: int) -> str:
        """The name of shard `number` of 1..total."""
        return self.stem + (SUFFIX if total == 1 else f"-{number:05d}-of-{total:05d}{SUFFIX}")


def layout_of_file(file: str, beside: Collection[str]) -> Layout:
    """The layout of one file of weights, with the names of the configs beside it.

    Raises CheckpointError if the file is an adapter.
    """
    if _is_adapter(file):
        raise CheckpointError(_only_adapter(file))
    return _layout(_stem(file), beside)


def parts_of_file(file: str, beside: Collection[str]) -> tuple[str, ...]:
    """What belongs to a checkpoint of one file of weights: that, and its config, if it is among the names beside it."""
    configs = [name for name in CONFIG_NAMES if name in beside]
    return (file, *({layout_of_file(file, configs).config_name} & set(configs)))


def layout_of_folder(files: Collection[str], *, where: str) -> tuple[Layout, tuple[str, ...]]:
    """The layout of a folder with these files, and its shards, which are empty where an index lists them.

    Raises CheckpointError if the folder does not hold exactly one checkpoint, or not all of it.
    """
    top = [file for file in files if "/" not in file and not _is_adapter(file)]
    indexed = {file.removesuffix(INDEX_SUFFIX) for file in top if file.endswith(INDEX_SUFFIX)}
    weights = [file for file in top if file.endswith(SUFFIX)]
    stems = indexed | {_stem(file) for file in weights}
    if not stems or (PIPELINE_INDEX_NAME in files and _weight_folders(files)):
        raise CheckpointError(_why_no_checkpoint(files, where=where))
    stem = next((stem for stem in STEMS if stem in stems), None)
    if stem is None:
        choices = indexed or stems
        if len(choices) > 1:
            raise CheckpointError(
                f"{where} holds {len(weights)} {SUFFIX} files and no {MODEL}{INDEX_SUFFIX} that says which belong together; "
                "give one of them as SOURCE"
            )
        (stem,) = choices
    if stem in indexed:
        return Layout(stem, _config_name(stem, files)), ()
    return _layout(stem, files), _shards(stem, weights, where=where)


def reason_to_leave_out(file: str, layout: Layout) -> str | None:
    """Why a file that is no shard has no place in the output, or None."""
    name = file.rpartition("/")[2]
    if _is_adapter(name):
        return "LoRA adapter"
    if name.endswith(SUFFIX):
        return "not a shard of this checkpoint"
    if name.endswith(OTHER_WEIGHTS):
        return "weights in another format"
    if _INDEX.fullmatch(name) and file != layout.index_name:
        return "index of other weights"
    return DESCRIBES_ANOTHER_QUANTIZATION if name in OTHER_QUANTIZATIONS else None


def _layout(stem: str, files: Collection[str]) -> Layout:
    """Names that no program looks for become those that every program does."""
    return Layout(stem if stem in STEMS else MODEL, _config_name(stem, files))


def _config_name(stem: str, files: Collection[str]) -> str:
    """Weights in Mistral's layout are read with Mistral's config, also by vLLM, whatever else lies there."""
    return MISTRAL_CONFIG_NAME if stem == MISTRAL and MISTRAL_CONFIG_NAME in files else CONFIG_NAME


def _stem(file: str) -> str:
    numbered = _NUMBERED.fullmatch(file)
    return numbered[1] if numbered else file.removesuffix(SUFFIX)


def _shards(stem: str, weights: Iterable[str], *, where: str) -> tuple[str, ...]:
    """The one file of this stem, or all its numbered ones."""
    files = {file for file in weights if _stem(file) == stem}
    if stem + SUFFIX in files:
        return (stem + SUFFIX,)
    total = next(match[3] for match in map(_NUMBERED.fullmatch, sorted(files)) if match)
    numbers = range(1, int(total) + 1)

    def name(number: int) -> str:
        return f"{stem}-{number:0{len(total)}d}-of-{total}{SUFFIX}"

    missing = next((file for file in map(name, numbers) if file not in files), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is not in {where}, which holds {len(files)} of the {int(total)}; is the download complete?")
    extra = min(files.difference(map(name, numbers)), default=None)
    if extra is not None:
        between = f"{name(1)} to {name(int(total))}"
        raise CheckpointError(f"{where} holds {extra} besides {between}; add {stem}{INDEX_SUFFIX} or take it away")
    return tuple(sorted(files))


def _is_adapter(file: str) -> bool:
    return _ADAPTER.fullmatch(file) is not None


def _only_adapter(where: str) -> str:
    return f"{where} holds nothing but a LoRA adapter; merge it into its base model first and give the merged model as SOURCE"


def _weight_folders(files: Iterable[str]) -> list[str]:
    folders = {file.rpartition("/")[0] for file in files if file.endswith(SUFFIX)} - {""}
    return sorted(folders)


def _why_no_checkpoint(files: Collection[str], *, where: str) -> str:
    folders = _weight_folders(files)
    if any(map(_is_adapter, files)):
        return _only_adapter(where)
    if folders:
        return f"{where} has its weights in subfolders; give one as SOURCE: {', '.join(f'{where}/{folder}' for folder in folders)}"
    pickle = next((file for file in files if file.endswith(PICKLES)), None)
    if pickle is not None:
        return (
            f"{where} holds no {SUFFIX} file, but pickles such as {pickle}, which can run code when opened and are not read; "
            "save the model as safetensors first, as save_pretrained of transformers does"
        )
    if any(file.endswith(".gguf") for file in files):
        return f"{where} holds only GGUF files, llama.cpp's own format; give the safetensors checkpoint they were made from as SOURCE"
    return f"{where} holds no {SUFFIX} file"
