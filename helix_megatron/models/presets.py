"""Shapes of known models: what a planner, a comparison or a benchmark must know about one.

    presets.find("llama-3.1-70b")                    a published shape
    presets.from_hf_config("config.json")            a Hugging Face model's, from its file alone
    presets.find("qwen2-7b").scaled(1 / 16)          the same heads and layers, narrow enough for two cores
    shape.model_args()                               as Megatron's flags, in the form of yaml_config

Pure arithmetic: no torch, no Megatron, no transformers. Dense decoders with ordinary self-attention only;
what else a config.json may hold (experts, latent attention, ...) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from helix_megatron.megatron.yaml_config import nearest
from helix_megatron.partition.grid import AttentionShape


@dataclass(frozen=True)
class ModelShape:
    """A dense GPT. Fields carry Megatron's names where Megatron has one."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    """H, query heads."""
    num_query_groups: int
    """G, KV heads; H without grouped queries."""
    kv_channels: int
    """d, dimension of a head."""
    ffn_hidden_size: int
    vocab_size: int
    """Real tokens; see `padded_vocab_size`."""
    swiglu: bool = True
    """A gated MLP (three matrices); otherwise GELU (two)."""
    tied_embeddings: bool = False
    """Input and output embeddings are one matrix."""
    position_embedding_type: str = "rope"
    """"rope", "learned_absolute" or "none"."""
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    use_rope_scaling: bool = False
    """Llama 3.1's stretching of RoPE, with its own constants."""
    normalization: str = "RMSNorm"
    """"RMSNorm" (a weight) or "LayerNorm" (a weight and a bias)."""
    norm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    """A norm over each query and key head."""
    add_bias_linear: bool = False
    """Biases in every linear layer."""
    add_qkv_bias: bool = False
    """Biases of q, k and v alone."""
    max_position_embeddings: int = 8192
    make_vocab_size_divisible_by: int = 128
    """0: `vocab_size` is the padded size, whatever the tensor-parallel size."""
    notes: tuple[str, ...] = ()
    """What the model has and `model_args` does not say."""

    @property
    def attention(self) -> AttentionShape:
        """What a Helix grid is checked against."""
        rotary = int(self.kv_channels * self.rotary_percent) if self.position_embedding_type == "rope" else 0
        return AttentionShape(self.num_attention_heads, self.num_query_groups, self.kv_channels, rotary)

    @property
    def num_parameters(self) -> int:
        """Parameters of the unpadded model, as model cards count them."""
        norm = 2 if self.normalization == "LayerNorm" else 1
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        query = self.num_attention_heads * self.kv_channels
        up = self.ffn_hidden_size * (2 if self.swiglu else 1)
        layer = self.hidden_size * (qkv + query + up + self.ffn_hidden_size) + 2 * norm * self.hidden_size
        if self.add_bias_linear:
            layer += qkv + up + 2 * self.hidden_size
        elif self.add_qkv_bias:
            layer += qkv
        if self.qk_layernorm:
            layer += 2 * norm * self.kv_channels
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        if self.position_embedding_type == "learned_absolute":
            embeddings += self.max_position_embeddings * self.hidden_size
        return self.num_layers * layer + embeddings + norm * self.hidden_size

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embeddings at tensor-parallel size `tp`, as Megatron pads them."""
        multiple = self.make_vocab_size_divisible_by * tp or 1
        return -(-self.vocab_size // multiple) * multiple

    def scaled(self, factor: float, num_layers: int | None = None) -> ModelShape:
        """The same heads, KV heads and layers (or `num_layers`), with every width times `factor`.

        Heads keep at least 8 dimensions, in multiples of 8; other widths are multiples of 64, the
        vocabulary of 128: the same grids stay legal as far as the dimension of a head allows.
        """
        channels = _scaled(self.kv_channels, factor, 8)
        whole = self.hidden_size == self.num_attention_heads * self.kv_channels
        return replace(
            self,
            name=f"{self.name} x {factor:g}",
            num_layers=num_layers or self.num_layers,
            kv_channels=channels,
            hidden_size=self.num_attention_heads * channels
            if whole
            else _scaled(self.hidden_size, factor, 64),
            ffn_hidden_size=_scaled(self.ffn_hidden_size, factor, 64),
            vocab_size=_scaled(self.vocab_size, factor, 128),
        )

    def model_args(self, padded_vocab_size: int | None = None) -> dict[str, Any]:
        """Megatron's flags of the model, `--name` to value, as yaml_config's MODEL_ARGS have them.

        The tokenizer decides the vocabulary, unless `padded_vocab_size` fixes its padded size. Dropout,
        which is 0.1 in Megatron by default, is off.
        """
        flags: dict[str, Any] = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--kv-channels": self.kv_channels,
            "--max-position-embeddings": self.max_position_embeddings,
            "--position-embedding-type": self.position_embedding_type,
            "--normalization": self.normalization,
            "--norm-epsilon": self.norm_epsilon,
            "--make-vocab-size-divisible-by": self.make_vocab_size_divisible_by,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
        }
        if self.num_query_groups != self.num_attention_heads:
            flags |= {"--group-query-attention": True, "--num-query-groups": self.num_query_groups}
        if self.position_embedding_type == "rope":
            flags |= {"--rotary-base": self.rotary_base, "--rotary-percent": self.rotary_percent}
        switches = {
            "--use-rope-scaling": self.use_rope_scaling,
            "--swiglu": self.swiglu,
            "--qk-layernorm": self.qk_layernorm,
            "--add-qkv-bias": self.add_qkv_bias,
            "--disable-bias-linear": not self.add_bias_linear,
            "--untie-embeddings-and-output-weights": not self.tied_embeddings,
        }
        flags |= {name: True for name, on in switches.items() if on}
        if padded_vocab_size is not None:
            flags["--padded-vocab-size"] = padded_vocab_size
        return flags


def _scaled(width: int, factor: float, multiple: int) -> int:
    return max(1, round(width * factor / multiple)) * multiple


_LLAMA3 = partial(ModelShape, vocab_size=128256, rotary_base=500000)
_LLAMA31 = partial(_LLAMA3, use_rope_scaling=True, max_position_embeddings=131072)
_8B = (32, 4096, 32, 8, 128, 14336)
_70B = (80, 8192, 64, 8, 128, 28672)
_PRESETS = (
    # The paper names no vocabulary and no positions: here as in configs/paper_16xh100.yaml.
    ModelShape(
        "paper-gpt", 16, 4096, 32, 32, 128, 16384, 272, swiglu=False, tied_embeddings=True,
        normalization="LayerNorm", add_bias_linear=True, max_position_embeddings=10000,
        make_vocab_size_divisible_by=1,
    ),
    _LLAMA3("llama-3-8b", *_8B),
    _LLAMA3("llama-3-70b", *_70B),
    _LLAMA31("llama-3.1-8b", *_8B),
    _LLAMA31("llama-3.1-70b", *_70B),
    ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, max_position_embeddings=4096),
    ModelShape(
        "qwen2-7b", 28, 3584, 28, 4, 128, 18944, 152064, add_qkv_bias=True, rotary_base=1000000,
        norm_epsilon=1e-6, max_position_embeddings=131072,
    ),
    ModelShape(
        "qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, add_qkv_bias=True, tied_embeddings=True,
        rotary_base=1000000, norm_epsilon=1e-6, max_position_embeddings=32768,
    ),
    ModelShape(
        "qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, qk_layernorm=True, rotary_base=1000000,
        norm_epsilon=1e-6, max_position_embeddings=40960,
    ),
    ModelShape(
        "mistral-7b", 32, 4096, 32, 8, 128, 14336, 32768, rotary_base=1000000, max_position_embeddings=32768
    ),  # v0.3
    ModelShape(
        "phi-3-medium", 40, 5120, 40, 10, 128, 17920, 32064, max_position_embeddings=4096,
        notes=("attention looks back 2047 positions only (--window-size)",),
    ),
    ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied_embeddings=True, rotary_base=100000),
    # The largest model of "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM".
    ModelShape(
        "gpt-1t", 128, 25600, 160, 160, 160, 102400, 51200, swiglu=False, tied_embeddings=True,
        position_embedding_type="learned_absolute", normalization="LayerNorm", add_bias_linear=True,
        max_position_embeddings=2048,
    ),
)  # fmt: skip
PRESETS: dict[str, ModelShape] = {shape.name: shape for shape in _PRESETS}


def find(name: str) -> ModelShape:
    """A preset by its name, in any case. ValueError with the nearest name, and all of them."""
    shape = PRESETS.get(name.lower())
    if shape is None:
        close = nearest(name.lower(), PRESETS) or "."
        raise ValueError(f"no model preset is called {name!r}{close} Presets: {', '.join(PRESETS)}.")
    return shape


# Keys of a config.json that mean a model this does not describe, and what they stand for.
_REFUSED = {
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
    "kv_lora_rank": "heads of multi-latent attention",
    "linear_num_value_heads": "heads of linear attention",
    "is_encoder_decoder": "encoder-decoder models",
}
# Families whose config.json does not say everything: model_type -> what it leaves unsaid.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
}
_ROPE_THETA = 10000.0
_COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_REALS = {"rms_norm_eps": 1.0, "rope_theta": 1e12, "partial_rotary_factor": 1.0}  # above 0, and up to this


def from_hf_config(source: str | Path | Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape in a Hugging Face config.json.

    Args:
        source: the file, the folder that holds it, or its contents.
        name: how to call the model; by default its folder's name.
    Raises:
        ValueError: no such file, a key is missing, or a model that is no plain dense decoder.
    """
    if isinstance(source, Mapping):
        config, where = dict(source), name or "config.json"
    else:
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        config, where = _read_json(path), str(path)
        name = name or path.resolve().parent.name
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(
            f"{where}: model_type {kind!r} is not known here; families: {', '.join(_FAMILIES)}. "
            "Describe the shape by Megatron's flags instead."
        )
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}: {meaning} have no shape here.")

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ValueError(f"{where} has no {key}, which a {kind} model needs.")
        return config[key]

    _check_numbers(config, where)
    heads = need("num_attention_heads")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    scaling_type = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    notes = [] if scaling_type in ("default", "llama3") else [f"RoPE scaling of type {scaling_type!r}"]
    window = config.get("sliding_window") if config.get("use_sliding_window", kind != "qwen2") else None
    if window and window < need("max_position_embeddings"):
        notes.append(f"attention looks back {window} positions only (--window-size)")
    biases = kind == "llama" and bool(config.get("attention_bias"))
    if kind == "llama" and biases != bool(config.get("mlp_bias")):
        raise ValueError(
            f"{where}: attention_bias is {config.get('attention_bias')}, mlp_bias {config.get('mlp_bias')};"
            " Megatron has biases everywhere (--add-bias-linear) or in q, k and v alone."
        )
    return ModelShape(
        name=name or kind,
        num_layers=need("num_hidden_layers"),
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or need("hidden_size") // heads,
        ffn_hidden_size=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rotary_percent=float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
        rotary_base=int(rope.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA),
        use_rope_scaling=scaling_type == "llama3",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        add_bias_linear=biases,
        max_position_embeddings=need("max_position_embeddings"),
        notes=tuple(notes),
        **_FAMILIES[kind],
    )


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """ValueError naming the first key whose number no model has."""
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}: {key} is {value!r}; it is a whole number of at least 1.")
    rope = config.get("rope_parameters") or {}
    for key, most in _REALS.items():
        value = config.get(key, rope.get(key))
        if value is not None and not (isinstance(value, int | float) and 0 < value <= most):
            raise ValueError(f"{where}: {key} is {value!r}; it is a number above 0, up to {most:g}.")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ValueError(
            f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}."
        )
    hidden = config.get("hidden_size")
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} does not divide hidden_size {hidden}, and there is no "
            "head_dim, the dimension of a head; give one."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {type(document).__name__}, not a configuration.")
    return document
