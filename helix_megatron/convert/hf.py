"""Hugging Face models on disk: safetensors folders and GGUF files, read and written tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.convert import files, gguf_metadata, gguf_tokenizer
from helix_megatron.convert.config_json import refuse_unknown
from helix_megatron.convert.families import refuse_family

_GGUF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"attn_{a}.{p}": f"self_attn.{a}_proj.{p}" for a in "qkv" for p in ("weight", "bias")},
    **{f"attn_output.{p}": f"self_attn.o_proj.{p}" for p in ("weight", "bias")},
    **{f"ffn_{a}.{p}": f"mlp.{a}_proj.{p}" for a in ("gate", "up", "down") for p in ("weight", "bias")},
}
_GGUF_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LONG = 1000  # entries of metadata that are a vocabulary, not something of every layer


def require_packages(*names: str) -> None:
    """ValueError naming the packages to install when one of `names` is missing."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder. ValueError when there is none that can be converted."""
    file = folder / files.CONFIG
    if not files.is_listed(file):
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    keys = files.read_json(file)
    refuse_family(str(keys.get("model_type", "")))  # before transformers, which may not know it either
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many kinds, its validation's among them
        raise ValueError(f"{file} cannot be read by transformers: {error}") from error
    refuse_unknown(file, keys)
    return config


class SafetensorsFolder:
    """A folder with config.json and model.safetensors, or its shards with their index.

    Attributes:
        config: the transformers configuration.
        names: the tensors it holds.

    Raises:
        ValueError: files are missing, or the family cannot be converted.
    """

    def __init__(self, folder: Path):
        require_packages("transformers", "safetensors")
        self.folder = folder
        if (folder / files.ADAPTER).is_file():
            raise ValueError(
                f"{folder} holds an adapter ({files.ADAPTER}), which is no model or changes it; merge it "
                "into its model first (peft: merge_and_unload(), then save_pretrained())."
            )
        self.config: Any = read_config(folder)
        self._file_of = self._files()
        self.names = set(self._file_of)

    def _files(self) -> dict[str, Path]:
        """The file of every tensor, as the files themselves say."""
        index, single = self.folder / files.INDEX, self.folder / files.WEIGHTS
        listed: dict[str, str] = {}
        if files.is_listed(index):
            listed = files.read_json(index).get("weight_map") or {}
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise ValueError(
                    f"the weight_map of {index} does not say which file holds each tensor; download it again."
                )
            others = sorted(set(listed.values()) - {single.name})
            if others and files.is_listed(single):
                raise ValueError(
                    f"{self.folder} holds both {single.name} and an index of other files ({others[0]}, ...), "
                    "which may be other weights: transformers reads the first, others the second. Remove the "
                    "one that is not the model."
                )
        elif not files.is_listed(single):
            raise ValueError(
                f"{self.folder} has neither {single.name} nor {index.name}; other weight formats are not "
                "read: load the model with transformers and save_pretrained() it."
            )
        found: dict[str, Path] = {}
        for name in sorted(set(listed.values())) or [single.name]:
            with files.open_safetensors(self.folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118
                    if tensor in found:
                        raise ValueError(
                            f"{self.folder} has {tensor} in {found[tensor].name} and in {name}; download the "
                            "model again into an empty folder."
                        )
                    found[tensor] = self.folder / name
        lost = sorted(set(listed) - set(found))
        if lost:
            raise ValueError(
                f"{self.folder / listed[lost[0]]} lacks {lost[0]}, which {index.name} says it has; download "
                "the model again."
            )
        return found

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype. The file is closed again: a mapped one would stay in memory."""
        with files.open_safetensors(self._file_of[name]) as file:
            return file.get_tensor(name)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it."""
        with files.open_safetensors(self._file_of[name]) as file:
            stored = file.get_slice(name)
            return tuple(stored.get_shape()), stored[:0].dtype

    def save_tokenizer(self, folder: Path) -> bool:
        """Copy the tokenizer's files, if there are any, and what the model says of generation."""
        return files.copy(self.folder, folder)


class GgufFile:
    """A GGUF file; tensors are de-quantized to float32 one at a time.

    GGUF stores the q and k rows of the `llama` architecture (Llama, Mistral, SmolLM2) with the two halves of
    a rotary pair next to each other; here they are in Hugging Face's order again.

    Attributes and errors: as of SafetensorsFolder.
    """

    def __init__(self, file: Path):
        require_packages("transformers", "gguf")
        self.file = file
        reader = self._reader()
        self._fields = {
            name: field.contents() if len(field.data) < _LONG else f"{len(field.data)} values"
            for name, field in reader.fields.items()
        }
        self._arch = gguf_metadata.architecture(file, self._fields)
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            self._tensors[self._name(tensor.name)] = tensor
        self.names = set(self._tensors)
        embedding = "model.embed_tokens.weight"
        if embedding not in self.names:
            raise ValueError(f"{file} lacks token_embd.weight; download it again.")
        rows = self.describe(embedding)[0][0]
        tied = "lm_head.weight" not in self.names
        self._vocabulary = self._read_vocabulary(reader.fields)
        tokens = (text for text, _ in self._vocabulary)
        self.config: Any = gguf_metadata.configuration(file, self._fields, rows, tied, tokens)

    def _reader(self) -> Any:
        """Of the file. ValueError when it is broken."""
        import gguf

        files.check(self.file)
        with self.file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"{self.file} is no GGUF file: it does not begin with GGUF.")
        try:
            return gguf.GGUFReader(self.file)
        except Exception as error:  # what a reader runs into where the file ends: of any kind
            raise ValueError(
                f"{self.file} is no complete GGUF file ({error}); download it again."
            ) from error

    def _read_vocabulary(self, fields: dict[str, Any]) -> list[tuple[str, int]]:
        """(text, type) of every token; all are normal where the file does not say."""
        import gguf

        texts = list(_texts(fields.get("tokenizer.ggml.tokens")))
        said = fields.get("tokenizer.ggml.token_type")
        types = [int(gguf.TokenType.NORMAL)] * len(texts) if said is None else said.contents()
        if len(types) != len(texts):
            raise ValueError(
                f"{self.file} has {len(texts)} tokens and {len(types)} types of tokens "
                "(tokenizer.ggml.token_type); download it again."
            )
        return list(zip(texts, types, strict=True))

    def _name(self, name: str) -> str:
        if name == "rope_freqs.weight":
            raise ValueError(
                f"{self.file} stores RoPE scaling as a tensor (rope_freqs.weight), which does not say which "
                "scaling it is; convert the model from its safetensors."
            )
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        known = _GGUF_LAYER.get(layer[2]) if layer else _GGUF_WHOLE.get(name)
        if known is None:
            raise ValueError(f"{self.file} has a tensor {name}, which no {self._arch} model here has.")
        return f"model.layers.{layer[1]}.{known}" if layer else known

    def read(self, name: str) -> Tensor:
        """A tensor in float32. ValueError when its quantization is unknown."""
        import gguf

        stored = self._tensors[name]
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.file}: {stored.name} is quantized as {stored.tensor_type.name}, which the gguf "
                "package does not expand; take another quantization of the model."
            ) from error
        tensor = torch.from_numpy(values.copy())
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        module = name.split(".")[-2]
        if self._arch == "llama" and module in heads:
            pairs = tensor.unflatten(0, (heads[module], -1, 2))  # [heads, d/2, 2, ...]
            return pairs.transpose(1, 2).flatten(0, 2).contiguous()
        return tensor

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor; GGUF lists the fastest dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape)), torch.float32

    def save_tokenizer(self, folder: Path) -> bool:
        """Write the tokenizer in the file, if there is one, as Hugging Face files."""
        if gguf_tokenizer.exists(self._fields):
            gguf_tokenizer.save(self.file, self._fields, self._vocabulary, folder)
            return True
        return False


def _texts(field: Any) -> Iterator[str]:
    """The texts in an array of a GGUF file's metadata; none where there is no such array."""
    for index in () if field is None else field.data:
        yield field.parts[index].tobytes().decode("utf-8", "replace")


def open_source(path: Path) -> SafetensorsFolder | GgufFile:
    """The model at `path`. ValueError when there is none, or it cannot be converted."""
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path)
    raise ValueError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file.")


def write_safetensors(
    folder: Path, sizes: dict[str, int], tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Write tensors as they come, into model.safetensors or shards with their index.

    Args:
        sizes: bytes of every tensor, in the order in which `tensors` brings them.
        tensors: name and tensor.
        shard_bytes: a shard holds at most this (or one tensor); that much is held in memory.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        count = len(shards)
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        held = {}
        for wanted in shard:
            name, tensor = next(tensors)
            assert name == wanted, (name, wanted)
            held[name] = tensor.contiguous()
            weight_map[name] = file
        save_file(held, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # it is written for its owner alone
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
