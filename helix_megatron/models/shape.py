"""The shape of a model: what a planner, a comparison or a benchmark must know about one.

    shape.num_parameters, shape.num_active_parameters     as model cards count them
    shape.scaled(1 / 16)                                  the same heads and layers, for two cores
    shape.model_args()                                    as Megatron's flags, in the form of yaml_config

Pure arithmetic: no torch, no Megatron, no transformers. Decoders with self-attention, dense or with experts
in every layer, and with gated delta net layers between those of attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from helix_megatron.partition.grid import AttentionShape

MLP, SHARED_EXPERT = "the MLP's {}", "the shared expert's {}"
GDN_KEYS, GDN_VALUES = "the GDN layers' {} key heads", "the GDN layers' {} value heads"
_MLP_WIDTHS = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
_GDN_DIMS = ("linear_key_head_dim", "linear_value_head_dim")
_NUMBERS = (  # flags of the same name, where they are not 0
    "window_attn_skip_freq", *_MLP_WIDTHS[1:], "moe_router_topk", "linear_attention_freq",
    "linear_num_key_heads", "linear_num_value_heads", *_GDN_DIMS, "linear_conv_kernel_dim",
)  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """A GPT. Fields carry Megatron's names where Megatron has one; 0 stands for what the model has not."""

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
    """Of a dense MLP; with experts no layer has one."""
    vocab_size: int
    """Real tokens; see `padded_vocab_size`."""
    swiglu: bool = True
    """An MLP gated by SiLU (three matrices); otherwise GELU (two)."""
    quick_geglu: bool = False
    """Gated by a clamped sigmoid instead, as gpt-oss does."""
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
    attention_output_gate: bool = False
    """The QKV projection makes a gate of every output dimension too."""
    softmax_type: str = "vanilla"
    """"learnable": every query head has an attention sink."""
    window_size: int = 0
    """Positions that a windowed layer looks back on, its own not counted."""
    window_attn_skip_freq: int = 0
    """Every so many layers one attends to all positions; 0: with a window, none does."""
    layernorm_zero_centered_gamma: bool = False
    num_moe_experts: int = 0
    """Experts of every layer."""
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_shared_expert_gate: bool = False
    linear_attention_freq: int = 0
    """Every so many layers one has attention; the others are gated delta nets (GDN)."""
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
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
    def gated(self) -> bool:
        """Whether MLPs and experts have three matrices."""
        return self.swiglu or self.quick_geglu

    @property
    def num_attention_layers(self) -> int:
        """Layers with self-attention, and so with a KV cache."""
        return self.num_layers // (self.linear_attention_freq or 1)

    @property
    def layer_period(self) -> int:
        """Layers after which the kinds of layers repeat."""
        return lcm(self.linear_attention_freq or 1, self.window_attn_skip_freq or 1)

    @property
    def full_attention_share(self) -> float:
        """Part of the attention layers that look at all positions."""
        if not self.window_size:
            return 1.0
        return 1 / self.window_attn_skip_freq if self.window_attn_skip_freq else 0.0

    @property
    def qkv_width(self) -> int:
        """Columns of the QKV projection over all ranks: (H + 2G) d, and H d of a gate."""
        queries = self.num_attention_heads * (2 if self.attention_output_gate else 1)
        return (queries + 2 * self.num_query_groups) * self.kv_channels

    @property
    def gdn_widths(self) -> tuple[int, int]:
        """(keys, values) of a GDN layer: dimensions of all heads."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return keys, self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def divided_sizes(self) -> tuple[tuple[str, int], ...]:
        """What tensor-parallel ranks hold equal parts of besides attention: (words with a {}, number).

        Experts are not among it: their own tensor-parallel size may be 1.
        """
        sizes = [] if self.num_moe_experts else [(MLP, self.ffn_hidden_size)]
        if self.moe_shared_expert_intermediate_size:
            sizes.append((SHARED_EXPERT, self.moe_shared_expert_intermediate_size))
        if self.linear_attention_freq:
            sizes += [(GDN_KEYS, self.linear_num_key_heads), (GDN_VALUES, self.linear_num_value_heads)]
        return tuple(sizes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the unpadded model, as model cards count them."""
        norm = 2 if self.normalization == "LayerNorm" else 1
        gdn = self.num_layers - self.num_attention_layers
        layers = self.num_attention_layers * self._attention_parameters(norm)
        layers += gdn * self._gdn_parameters(norm) if gdn else 0
        layers += self.num_layers * (self._mlp_parameters() + 2 * norm * self.hidden_size)
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        if self.position_embedding_type == "learned_absolute":
            embeddings += self.max_position_embeddings * self.hidden_size
        return layers + embeddings + norm * self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Of these, what one token passes; embeddings count whole."""
        idle = self.num_moe_experts - self.moe_router_topk
        return self.num_parameters - self.num_layers * idle * self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return self._matrices_of_mlp(self.moe_ffn_hidden_size)

    def _matrices_of_mlp(self, width: int) -> int:
        up = width * (2 if self.gated else 1)
        return self.hidden_size * (up + width) + (up + self.hidden_size if self.add_bias_linear else 0)

    def _mlp_parameters(self) -> int:
        if not self.num_moe_experts:
            return self._matrices_of_mlp(self.ffn_hidden_size)
        router = self.num_moe_experts * (self.hidden_size + (1 if self.add_bias_linear else 0))
        gate = self.hidden_size if self.moe_shared_expert_gate else 0
        size = self.moe_shared_expert_intermediate_size
        shared = self._matrices_of_mlp(size) if size else 0
        return router + self.num_moe_experts * self.expert_parameters + shared + gate

    def _attention_parameters(self, norm: int) -> int:
        """Of one layer; `norm` vectors in a norm."""
        query = self.num_attention_heads * self.kv_channels
        count = self.hidden_size * (self.qkv_width + query)
        if self.add_bias_linear:
            count += self.qkv_width + self.hidden_size
        elif self.add_qkv_bias:
            count += self.qkv_width
        if self.qk_layernorm:
            count += 2 * norm * self.kv_channels
        return count + (self.num_attention_heads if self.softmax_type == "learnable" else 0)

    def _gdn_parameters(self, norm: int) -> int:
        """Of one layer: input and output projections, convolution, decays, norm of the heads."""
        keys, values = self.gdn_widths
        projections = self.hidden_size * (2 * keys + 3 * values + 2 * self.linear_num_value_heads)
        convolution = (2 * keys + values) * self.linear_conv_kernel_dim
        return projections + convolution + 2 * self.linear_num_value_heads + norm * self.linear_value_head_dim

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embeddings at tensor-parallel size `tp`, as Megatron pads them."""
        multiple = self.make_vocab_size_divisible_by * tp or 1
        return -(-self.vocab_size // multiple) * multiple

    def scaled(self, factor: float, num_layers: int | None = None) -> ModelShape:
        """The same heads, KV heads and layers (or `num_layers`), with every width times `factor`.

        Heads keep at least 8 dimensions, and 8 rotated ones, in multiples of 8; other widths are multiples
        of 64, the vocabulary of 128: the same grids stay legal as far as the dimension of a head allows.
        """
        kept = {**dict.fromkeys(_MLP_WIDTHS, 64), **dict.fromkeys(_GDN_DIMS, 8)}  # to the multiple of it
        widths: dict[str, Any] = {
            name: _scaled(getattr(self, name), factor, multiple)
            for name, multiple in kept.items() if getattr(self, name)
        }  # fmt: skip
        channels = _scaled(self.kv_channels, factor, int(8 / self.rotary_percent))
        whole = self.hidden_size == self.num_attention_heads * self.kv_channels
        return replace(
            self,
            name=f"{self.name} x {factor:g}",
            num_layers=num_layers or self.num_layers,
            kv_channels=channels,
            hidden_size=self.num_attention_heads * channels
            if whole
            else _scaled(self.hidden_size, factor, 64),
            vocab_size=_scaled(self.vocab_size, factor, 128),
            **widths,
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
        if self.quick_geglu:
            flags |= {"--glu-linear-offset": 1.0, "--activation-func-clamp-value": 7.0}
        if self.softmax_type != "vanilla":
            flags["--softmax-type"] = self.softmax_type
        if self.window_size:
            flags["--window-size"] = f"{self.window_size},0"
        if self.linear_attention_freq:
            flags["--experimental-attention-variant"] = "gated_delta_net"
        flags |= {f"--{name.replace('_', '-')}": value for name in _NUMBERS if (value := getattr(self, name))}
        if self.num_moe_experts:
            flags |= {"--num-experts": self.num_moe_experts, "--moe-token-dispatcher-type": "alltoall"}
        switches = {
            "--use-rope-scaling": self.use_rope_scaling,
            "--swiglu": self.swiglu,
            "--quick-geglu": self.quick_geglu,
            "--attention-output-gate": self.attention_output_gate,
            "--apply-layernorm-1p": self.layernorm_zero_centered_gamma,
            "--moe-shared-expert-gate": self.moe_shared_expert_gate,
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
