"""Bytes that a rank of a pipeline stage holds, term by term.

Note [What is exact and what is not]
    weights, gradients, optimizer, KV cache   exact, but for the padding of Megatron's gradient buffers
    activations   the tensors that autograd keeps, one by one: those of Megatron's local layers, unfused
                  (`fused` False, host mode), or of Transformer Engine's layers with flash attention (`fused`
                  True; written down from their definition, not measured, as are experts and gated delta nets)
    buffers       the largest temporary tensors; an estimate

t tokens of a micro-batch (s positions, b sequences), h hidden, V padded vocabulary, f MLP, e bytes of an
element; H, G, d, n, m, hq, hk, d_s as in helix_megatron.partition.layout;
t' = t / tp with sequence parallelism, else t.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.partition.kv_layout import interleave_of_sequence
from helix_megatron.partition.layout import part_length
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.parameters import dense_parameters, expert_parameters, parameters
from helix_megatron.plan.terms import Term, total

KV_INTERLEAVE = 32
"""Positions that a rank keeps in its turn, by default."""


@dataclass(frozen=True)
class Memory:
    """Terms in bytes, by what they hold; of one rank of one stage."""

    weights: list[Term]
    gradients: list[Term]
    optimizer: list[Term]
    activations: list[Term]
    kv_cache: list[Term]
    buffers: list[Term]

    def bytes(self) -> dict[str, float]:
        """Each part's sum."""
        return {name: total(terms) for name, terms in vars(self).items()}

    @property
    def total(self) -> float:
        return sum(self.bytes().values())


def fullest_stage(problem: Problem) -> tuple[int, Memory]:
    """The pipeline stage whose ranks hold most, and what they hold."""
    last = problem.layout.pp - 1
    stages = {stage: stage_memory(problem, stage) for stage in {0, min(1, last), last}}
    return max(stages.items(), key=lambda item: item[1].total)


def stage_memory(problem: Problem, stage: int) -> Memory:
    """What a rank of a pipeline stage holds at its fullest moment in a step."""
    work, layout = problem.workload, problem.layout
    elements = parameters(problem, stage)
    weights = [term.times({"bytes": work.element}) for term in elements]
    if work.kind != "train":
        return Memory(weights, [], [], [], kv_cache(problem), buffers(problem, stage))
    gradient = 2 if work.dtype == "fp16" else 4  # Megatron reduces gradients of bf16 models in fp32
    state = 8 + (0 if work.dtype == "fp32" else 4)  # two moments, and fp32 copies of weights
    share = {"1/dp": 1 / layout.dp} if work.distributed_optimizer else {}
    expert_share = {"1/edp": 1 / layout.edp} if work.distributed_optimizer else {}
    in_flight = min(layout.pp - stage, problem.micro_batches)
    return Memory(
        weights,
        [term.times({"bytes": gradient}) for term in elements],
        [
            *(term.times({"bytes": state, **share}) for term in dense_parameters(problem, stage)),
            *(term.times({"bytes": state, **expert_share}) for term in expert_parameters(problem)),
        ],
        [term.times({"micro-batches in flight": in_flight}) for term in activations(problem, stage)],
        [],
        buffers(problem, stage),
    )


def kv_cache(problem: Problem, dim_rank: int | None = None) -> list[Term]:
    """Bytes of the keys and values that a rank keeps; by default the fullest of its dim group.

    Every attention layer caches all positions, as Megatron's blocks do, whatever its window. Gated delta nets
    have a state of fixed size: a matrix of every head in fp32, and the last inputs of the convolution.
    """
    return _attention_cache(problem, dim_rank) + _gdn_state(problem)


def _gdn_state(problem: Problem) -> list[Term]:
    shape, tp = problem.shape, problem.layout.tp
    if not shape.linear_attention_freq:
        return []
    keys, values = shape.gdn_widths
    common = {"GDN layers": problem.layers - problem.attention_layers, "sequences": problem.replica_batch}
    head = {"heads/tp": shape.linear_num_value_heads / tp, "key": shape.linear_key_head_dim,
            "value": shape.linear_value_head_dim, "fp32": 4}  # fmt: skip
    inputs = {"channels/tp": (2 * keys + values) / tp, "positions": shape.linear_conv_kernel_dim - 1,
              "bytes": problem.workload.element}  # fmt: skip
    return [Term("state of GDN heads", {**common, **head}), Term("inputs of conv1d", {**common, **inputs})]


def _attention_cache(problem: Problem, dim_rank: int | None) -> list[Term]:
    shape, layout, work = problem.shape, problem.layout, problem.workload
    positions = work.length + (1 if work.kind == "decode" else 0)
    common = {"K and V": 2, "layers": problem.attention_layers, "sequences": problem.replica_batch,
              "bytes": work.element}  # fmt: skip
    if not layout.sliced:
        sizes = {"positions": positions, "heads": _local_heads(problem)[1], "d": shape.kv_channels}
        return [Term("whole heads", {**common, **sizes})]
    heads = problem.heads.kv_heads
    if layout.kv_cache == "dim":
        sizes = {"positions": positions, "hk": heads, "d/m": problem.heads.slice_dim}
        return [Term("slices of all positions", {**common, **sizes})]
    interleave = interleave_of_sequence(layout.m, KV_INTERLEAVE, positions)
    ranks = range(layout.m) if dim_rank is None else (dim_rank,)
    mine = max(interleave.count(rank, positions) for rank in ranks)
    sizes = {"positions of a rank": mine, "hk": heads, "d": shape.kv_channels}
    return [Term("whole heads of 1/m of the positions", {**common, **sizes})]


# ---- activations ----
def activations(problem: Problem, stage: int) -> list[Term]:
    """Bytes that autograd keeps of one micro-batch, parameters apart."""
    shape, layout, t, own = problem.shape, problem.layout, problem.tokens, problem.own_tokens
    layers = {"layers": problem.layers}
    if layout.recompute:
        inputs = {"t'": own, "h": shape.hidden_size, "bytes": problem.workload.element}
        terms = [Term("inputs of layers", {**layers, **inputs})]
    else:
        terms = [term.times(layers) for term in layer_terms(problem)]
        terms += [term.times({"layers": problem.attention_layers}) for term in _attention_terms(problem)]
        terms += [term.times({"GDN layers": problem.layers - problem.attention_layers})
                  for term in _gdn_terms(problem)]  # fmt: skip
    if stage == 0:
        terms.append(Term("tokens and their mask", {"t": t, "bytes": 9}))
    if stage == layout.pp - 1:
        terms += [term.times({}, f"final {term.name}") for term in _norm_terms(problem)]
        rows = shape.padded_vocab_size(layout.tp) / layout.tp
        terms.append(Term("softmax of the logits", {"t": t, "V/tp": rows, "fp32": 4}))
        terms.append(Term("targets and their mask", {"t": t, "bytes": 9}))
    return terms


def layer_terms(problem: Problem) -> list[Term]:
    """Bytes of one layer, attention apart: both norms, and the MLP or the experts."""
    norms = [term.times({"norms": 2}) for term in _norm_terms(problem)]
    return [*norms, *_mlp_terms(problem)]


def _mlp_terms(problem: Problem) -> list[Term]:
    shape, work, layout = problem.shape, problem.workload, problem.layout
    # The output of fc1, what the activation keeps (unfused, silu(gate) and up too), and the input of fc2.
    copies = {"copies": (3 if work.fused else 5) if shape.gated else 2}
    e = {"bytes": work.element}
    if not shape.num_moe_experts:
        size = {"f/tp": shape.ffn_hidden_size / layout.tp}
        return [Term("MLP", {"t": problem.tokens, **copies, **size, **e})]
    rows, h = {"tokens of experts": problem.expert_tokens}, {"h": shape.hidden_size}
    width = {"f/etp": shape.moe_ffn_hidden_size / layout.etp}
    terms = [
        Term("scores of the router", {"t'": problem.own_tokens, "experts": shape.num_moe_experts, "fp32": 4}),
        Term("dispatched and returned", {"2": 2, **rows, **h, **e}),
        Term("experts", {**rows, **copies, **width, **e}),
    ]
    if shape.moe_shared_expert_intermediate_size:
        size = {"f/tp": shape.moe_shared_expert_intermediate_size / layout.tp}
        terms.append(Term("shared expert", {"t": problem.tokens, **copies, **size, **e}))
    return terms


def _gdn_terms(problem: Problem) -> list[Term]:
    """A gated delta net: its projection, what is convolved, the heads' output, gated and normed."""
    shape, tp = problem.shape, problem.layout.tp
    if not shape.linear_attention_freq:
        return []
    keys, values = shape.gdn_widths
    columns = (2 * (2 * keys + values) + 3 * values) / tp
    return [Term("GDN", {"t": problem.tokens, "columns": columns, "bytes": problem.workload.element})]


def _norm_terms(problem: Problem) -> list[Term]:
    """A norm and the input of the linear layer after it: its input, statistics, products, output."""
    shape, work = problem.shape, problem.workload
    layer = shape.normalization == "LayerNorm"
    e, h, own = work.element, shape.hidden_size, problem.own_tokens
    terms = [Term("norm output", {"t'": own, "h": h, "bytes": e})]
    if layer or work.fused:
        terms.append(Term("norm input", {"t'": own, "h": h, "bytes": e}))
        statistic = 4 if work.fused else e
        terms.append(Term("norm statistics", {"t'": own, "vectors": 2 if layer else 1, "bytes": statistic}))
    else:  # torch's RMSNorm on a CPU: input and normalised input in fp32
        terms.append(Term("norm input and product", {"t'": own, "2": 2, "h": h, "fp32": 4}))
        terms.append(Term("norm statistics", {"t'": own, "fp32": 4}))
    return terms


def _attention_terms(problem: Problem) -> list[Term]:
    """A layer's attention, between the QKV projection and the output projection's input."""
    shape, work = problem.shape, problem.workload
    terms: list[Term] = []
    if shape.position_embedding_type == "rope" and not work.fused:
        rotary = int(shape.kv_channels * shape.rotary_percent)
        columns = 2 * rotary * (1 + _share_of_positions(problem))
        if problem.layout.comm_type == "all_reduce":
            columns = 2 * rotary / problem.layout.m * (1 if problem.layout.placement == "dims" else 2)
        terms.append(Term("rotary tables", {"s": work.length, "columns": columns, "bytes": work.element}))
    if shape.qk_layernorm:
        terms += _qk_norm_terms(problem)
    if problem.layout.comm_type == "all_reduce":
        return terms + _summed_scores(problem)
    if not problem.layout.sliced and not work.fused:
        return terms + _unfused_core(problem)
    return terms + _fused_core(problem)


def _local_heads(problem: Problem) -> tuple[int, int]:
    """Query heads and KV heads that a rank of Megatron's own attention works on."""
    shape, tp = problem.shape, problem.layout.tp
    return shape.num_attention_heads // tp, max(1, shape.num_query_groups // tp)


def _mixed_qkv(problem: Problem) -> float:
    """Elements per token of the projection that a rank's q, k and v are views of."""
    return problem.qkv_width if problem.gathers_qkv else problem.qkv_width / problem.layout.tp


def _attended_heads(problem: Problem) -> tuple[int, int]:
    """Query heads and KV heads, whole, that a rank's core is given before KV heads are repeated."""
    if not problem.layout.sliced:
        return _local_heads(problem)
    heads, layout = problem.heads, problem.layout
    parts = layout.m if layout.placement == "heads" else heads.head_parts
    return heads.query_heads // parts, heads.kv_needed[0]


def _share_of_positions(problem: Problem) -> float:
    """Part of the query positions that a rank attends with."""
    if problem.layout.placement != "dims":
        return 1.0
    length = problem.workload.length
    return part_length(length, 0, problem.heads.position_parts) / length


def _qk_norm_terms(problem: Problem) -> list[Term]:
    shape, layout, e = problem.shape, problem.layout, problem.workload.element
    t, mixed = {"t": problem.tokens}, {"qkv of a rank": _mixed_qkv(problem), "bytes": e}
    if layout.comm_type == "all_reduce":  # slices
        dim = problem.heads.slice_dim
        queries, keys = float(problem.heads.query_heads), problem.heads.kv_heads
    else:
        dim = shape.kv_channels
        queries, keys = _attended_heads(problem)
        queries *= _share_of_positions(problem)
    if layout.comm_type != "a2a":
        terms = [Term("QK norm input", {**t, **mixed})]
    elif layout.placement == "heads":  # the query is a view of the projection
        terms = [
            Term("QK norm input, of queries", {**t, **mixed}),
            Term("QK norm input, of keys", {**t, "KV heads": keys, "d": dim, "bytes": e}),
        ]
    else:
        terms = [Term("QK norm input", {**t, "q and k heads": queries + keys, "d": dim, "bytes": e})]
    return [
        *terms,
        Term("QK norm product", {**t, "q and k of a rank": (queries + keys) * dim, "fp32": 4}),
        Term("QK norm statistics", {**t, "heads": queries + keys, "fp32": 4}),
    ]


def _unfused_core(problem: Problem) -> list[Term]:
    """Megatron's DotProductAttention: q, k, v as batched matrices, the mask, and the probabilities."""
    work, t, d = problem.workload, problem.tokens, problem.shape.kv_channels
    e, b, s = work.element, problem.layout.micro_batch, work.length
    heads, kv_heads = _local_heads(problem)
    copied = heads > kv_heads  # KV heads are repeated; else v is a view of the whole projection
    value = heads * d if copied else _mixed_qkv(problem)
    softmax = 4 if work.dtype == "fp32" else 4 + e  # in fp32, and as what multiplies the values
    return [
        Term("query", {"t": t, "heads": heads, "d": d, "bytes": e}),
        Term("key, repeated" if copied else "key", {"t": t, "heads": heads, "d": d, "bytes": e}),
        Term("value", {"t": t, "elements": value, "bytes": e}),
        Term("causal mask", {"s": s, "s again": s, "bool": 1}),
        Term("probabilities", {"b": b, "heads": heads, "s": s, "s again": s, "bytes": softmax}),
        Term("attention output", {"t": t, "heads": heads, "d": d, "bytes": e}),
    ]


def _fused_core(problem: Problem) -> list[Term]:
    """A fused attention core on whole heads: q, k, v, output, log-sum-exp; and the projection's input."""
    shape, layout = problem.shape, problem.layout
    t, e, d = problem.tokens, problem.workload.element, shape.kv_channels
    heads, kv_heads = _attended_heads(problem)
    if layout.sliced:
        needed = problem.heads.kv_head_of(0, problem.heads.query_heads // heads)
        if len({needed.count(head) for head in needed}) > 1:  # every query head has its own copy
            kv_heads = heads
    queries = {"t": t, "share of positions": _share_of_positions(problem)}
    terms = [
        Term("key and value", {"t": t, "2": 2, "KV heads": kv_heads, "d": d, "bytes": e}),
        Term("query and output", {**queries, "2": 2, "heads": heads, "d": d, "bytes": e}),
        Term("log-sum-exp", {**queries, "heads": heads, "fp32": 4}),
    ]
    if layout.sliced and (layout.placement == "dims" or layout.micro_batch > 1):
        elements = shape.num_attention_heads * d / layout.tp
        terms.append(Term("input of linear_proj", {"t": t, "Hd/tp": elements, "bytes": e}))
    return terms


def _summed_scores(problem: Problem) -> list[Term]:
    """Comm type all_reduce: probabilities are kept, in fp32."""
    work, t, b, s = problem.workload, problem.tokens, problem.layout.micro_batch, problem.workload.length
    hq, hk, d, e = problem.heads.query_heads, problem.heads.kv_heads, problem.heads.slice_dim, work.element
    return [
        Term("query and key, fp32", {"t": t, "hq + hk": hq + hk, "d/m": d, "fp32": 4}),
        Term("value", {"t": t, "qkv of a rank": _mixed_qkv(problem), "bytes": e}),
        Term("causal mask", {"s": s, "s again": s, "bool": 1}),
        Term("probabilities", {"b": b, "hq": hq, "s": s, "s again": s, "fp32": 4}),
        Term("input of linear_proj", {"t": t, "hq": hq, "d/m": d, "bytes": e}),
    ]


def _summed_in_inference(problem: Problem) -> list[Term]:
    """Scores that a step sums over a dim group: of prompts (comm type all_reduce), of caches of slices.

    With a static context, which keeps all of them; the dynamic engine works in parts of 64 MiB. Scores exist
    twice: as they are made, summed, hidden and turned into probabilities.
    """
    layout, work, heads = problem.layout, problem.workload, problem.heads
    decodes = work.kind == "decode"
    if (layout.kv_cache if decodes else layout.comm_type) != ("dim" if decodes else "all_reduce"):
        return []
    new, positions = (1, work.length + 1) if decodes else (work.length, work.length)
    shape, fp32 = {"b": layout.micro_batch, "new tokens": new}, {"fp32": 4}
    terms = [
        Term("scores, twice", {"2": 2, **shape, "positions": positions, "hq": heads.query_heads, **fp32}),
        Term("queries, fp32", {**shape, "hq": heads.query_heads, "d/m": heads.slice_dim, **fp32}),
    ]
    if decodes:  # longer than its scores
        cached = {"b": layout.micro_batch, "positions": positions, "hk": heads.kv_heads}
        return [*terms, Term("cached keys, fp32, twice", {"2": 2, **cached, "d/m": heads.slice_dim, **fp32})]
    return [*terms, Term("causal mask", {"s": new, "s again": positions, "bool": 1})]


# ---- buffers ----
def buffers(problem: Problem, stage: int) -> list[Term]:
    """The largest temporary tensors: an estimate."""
    shape, layout, t, e = problem.shape, problem.layout, problem.tokens, problem.workload.element
    experts = shape.num_moe_experts
    width = shape.moe_ffn_hidden_size / layout.etp if experts else shape.ffn_hidden_size / layout.tp
    up = (2 if shape.gated else 1) * width
    hidden = {"t": t, "h": shape.hidden_size, "bytes": e}
    rows = {"tokens of experts": problem.expert_tokens} if experts else {"t": t}
    terms = [Term("output of fc1", {**rows, "f/etp" if experts else "f/tp": up, "bytes": e})]
    if experts:
        terms.append(Term("tokens on their way to experts", {**rows, "h": shape.hidden_size, "bytes": e}))
    if problem.workload.kind == "train":
        terms.append(Term("gathered or summed hidden", {"2": 2, **hidden}))
        if stage == layout.pp - 1:
            vocabulary = shape.padded_vocab_size(layout.tp) / layout.tp
            terms.append(Term("logits and their gradient", {"t": t, "V/tp": vocabulary, "2": 2, "bytes": e}))
        if layout.recompute:
            kept = [*layer_terms(problem), *_attention_terms(problem)]
            terms += [term.times({}, f"recomputed {term.name}") for term in kept]
    else:
        terms.append(Term("hidden states", {"3": 3, **hidden}))
    if layout.sliced and problem.workload.kind != "train":
        terms += _summed_in_inference(problem)
    if layout.sliced:
        both = 2 * max(problem.heads.kv_needed) * shape.kv_channels
        terms.append(Term("whole keys and values", {"2": 2, "t": t, "2 K' d": both, "bytes": e}))
    elif problem.gathers_qkv:
        terms.append(Term("gathered QKV", {"t": t, "(H+2G)d": problem.qkv_width, "bytes": e}))
    return terms
