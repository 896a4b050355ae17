"""Attention shapes of the models that people ask about, for the table of tensor-parallel sizes (support.py).

Not presets: only what a tensor-parallel size must divide. Every row is the config.json of the repository on
Hugging Face that `source` names, compared with what Megatron-LM, Megatron-Bridge, NeMo, slime or transformers
publish of the model. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.models.shape import GDN_KEYS, GDN_VALUES, MLP, SHARED_EXPERT
from helix_megatron.partition.grid import AttentionShape


@dataclass(frozen=True)
class PopularModel:
    """One model. Fields carry Megatron's names where Megatron has one.

    Args:
        source: its repository on Hugging Face.
        kv_channels: d, dimension of a head.
        rotary_dim: dimensions of a head that RoPE rotates.
        divided_sizes: what else ranks hold equal parts of, by its words: dense and shared MLPs, heads and
            groups of linear attention. Experts are not among it: their own tensor-parallel size may be 1.
    """

    name: str
    source: str
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rotary_dim: int
    divided_sizes: tuple[tuple[str, int], ...]

    @property
    def attention(self) -> AttentionShape:
        """What a Helix grid is checked against."""
        heads = self.num_attention_heads, self.num_query_groups
        return AttentionShape(*heads, self.kv_channels, self.rotary_dim)


def _mlp(size: int) -> tuple[tuple[str, int], ...]:
    return ((MLP, size),)


def _shared(size: int) -> tuple[tuple[str, int], ...]:
    return ((SHARED_EXPERT, size),)


def _gdn(keys: int, values: int) -> tuple[tuple[str, int], ...]:
    return ((GDN_KEYS, keys), (GDN_VALUES, values))


_NEMOTRON = (
    (SHARED_EXPERT, 3712),
    ("the Mamba layers' {} heads", 64),
    ("the Mamba layers' {} groups", 8),
)
_SHAPES = (
    PopularModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 9, 3, 64, 64, _mlp(1536)),
    PopularModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 15, 5, 64, 64, _mlp(2560)),
    PopularModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 14, 2, 64, 64, _mlp(4864)),
    PopularModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 12, 2, 128, 128, _mlp(8960)),
    PopularModel("qwen2.5-7b", "Qwen/Qwen2.5-7B", 28, 4, 128, 128, _mlp(18944)),
    PopularModel("qwen3-8b", "Qwen/Qwen3-8B", 32, 8, 128, 128, _mlp(12288)),
    PopularModel("qwen3-14b", "Qwen/Qwen3-14B", 40, 8, 128, 128, _mlp(17408)),
    PopularModel("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 32, 4, 128, 128, ()),
    PopularModel("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 64, 4, 128, 128, ()),
    PopularModel(
        "qwen3-next-80b-a3b", "Qwen/Qwen3-Next-80B-A3B-Instruct", 16, 2, 256, 64,
        (*_shared(512), *_gdn(16, 32)),
    ),
    PopularModel("qwen3.5-4b", "Qwen/Qwen3.5-4B", 16, 4, 256, 64, (*_mlp(9216), *_gdn(16, 32))),
    PopularModel("qwen3.5-27b", "Qwen/Qwen3.5-27B", 24, 4, 256, 64, (*_mlp(17408), *_gdn(16, 48))),
    PopularModel(
        "qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", 16, 2, 256, 64, (*_shared(512), *_gdn(16, 32))
    ),
    PopularModel(
        "qwen3.5-397b-a17b", "Qwen/Qwen3.5-397B-A17B", 32, 2, 256, 64, (*_shared(1024), *_gdn(16, 64))
    ),
    PopularModel("gpt-oss-20b", "openai/gpt-oss-20b", 64, 8, 64, 64, ()),
    PopularModel("gpt-oss-120b", "openai/gpt-oss-120b", 64, 8, 64, 64, ()),
    PopularModel("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", 32, 8, 128, 128, ()),
    PopularModel("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1", 48, 8, 128, 128, ()),
    PopularModel("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 24, 8, 128, 128, _mlp(8192)),
    PopularModel("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 32, 8, 128, 128, _mlp(14336)),
    PopularModel("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 64, 8, 128, 128, _mlp(28672)),
    PopularModel("llama-4-scout", "meta-llama/Llama-4-Scout-17B-16E", 40, 8, 128, 128, _shared(8192)),
    PopularModel("gemma-3-1b", "google/gemma-3-1b-pt", 4, 1, 256, 256, _mlp(6912)),
    PopularModel("phi-4", "microsoft/phi-4", 40, 10, 128, 128, _mlp(17920)),
    PopularModel("starcoder2-7b", "bigcode/starcoder2-7b", 36, 4, 128, 128, _mlp(18432)),
    PopularModel("falcon-7b", "tiiuae/falcon-7b", 71, 1, 64, 64, _mlp(18176)),
    PopularModel("glm-4-9b", "THUDM/GLM-4-9B-0414", 32, 2, 128, 64, _mlp(13696)),
    PopularModel("glm-4.5", "zai-org/GLM-4.5", 96, 8, 128, 64, (*_mlp(12288), *_shared(1536))),
    PopularModel("minimax-m2", "MiniMaxAI/MiniMax-M2", 48, 8, 128, 64, ()),
    PopularModel(
        "nemotron-3-nano-30b-a3b", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 32, 2, 128, 0, _NEMOTRON
    ),
)  # fmt: skip
POPULAR: dict[str, PopularModel] = {shape.name: shape for shape in _SHAPES}
