"""Hugging Face models on disk: safetensors folders and GGUF files, read and written tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def need(*names: str) -> None:
    """ValueError naming the packages to install when one of `names` is missing."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


class SafetensorsFolder:
    """A folder with config.json and model.safetensors, or its shards with their index.

    Attributes:
        config: the transformers configuration.
        names: the tensors it holds.

    Raises:
        ValueError: files are missing, or the family cannot be converted.
    """

    def __init__(self, folder: Path):
        need("transformers", "safetensors")
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
        kind = json.loads((folder / "config.json").read_text()).get("model_type", "")
        refuse_family(kind)  # before transformers, which may not know it either
        from transformers import AutoConfig

        self.config: Any = AutoConfig.from_pretrained(folder)
        self._file_of = self._files()
        self.names = set(self._file_of)

    def _files(self) -> dict[str, Path]:
        from safetensors import safe_open

        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in listed.items()}
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise ValueError(
                f"{self.folder} has neither model.safetensors nor model.safetensors.index.json; other weight "
                "formats are not read: load the model with transformers and save_pretrained() it."
            )
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype. The file is closed again: a mapped one would stay in memory."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            stored = file.get_slice(name)
            return tuple(stored.get_shape()), stored[:0].dtype

    def save_tokenizer(self, folder: Path) -> bool:
        """Copy the tokenizer's files, if there are any."""
        found = {path for pattern in _TOKENIZER_FILES for path in self.folder.glob(pattern)}
        for path in found:
            shutil.copy(path, folder)
        return any(path.name.startswith(("tokenizer", "vocab")) for path in found)


class GgufFile:
    """A GGUF file; tensors are de-quantized to float32 one at a time.

    GGUF stores the q and k rows of the `llama` architecture (Llama, Mistral, SmolLM2) with the two halves of
    a rotary pair next to each other; here they are in Hugging Face's order again.

    Attributes and errors: as of SafetensorsFolder.
    """

    def __init__(self, file: Path):
        need("transformers", "gguf")
        import gguf

        self.file = file
        reader = gguf.GGUFReader(file)
        self._arch = reader.fields["general.architecture"].contents()
        refuse_family({"gemma3": "gemma3_text"}.get(self._arch, self._arch))
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            self._tensors[self._name(tensor.name)] = tensor
        from transformers import AutoConfig

        self.config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        # Stored as float32: 1e-05 arrives as 9.999999747378752e-06, the same number to a float32 model.
        self.config.rms_norm_eps = float(str(np.float32(self.config.rms_norm_eps)))
        self.names = set(self._tensors)

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
        """A tensor in float32."""
        import gguf

        stored = self._tensors[name]
        tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
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
        """Write the tokenizer in the file as Hugging Face files."""
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name).save_pretrained(folder)
        return True


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
