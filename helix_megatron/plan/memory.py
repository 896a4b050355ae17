"""Bytes that a rank of a pipeline stage holds, term by term.

Note [What is exact and what is not]
    weights, gradients, optimizer, KV cache   exact, but for the padding of Megatron's gradient buffers
    activations   the tensors that autograd keeps, one by one: those of Megatron's local layers, unfused
                  (`fused` False, host mode), or of Transformer Engine's layers with flash attention (`fused`
                  True; written down from their definition, not measured)
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


def fullest(problem: Problem) -> tuple[int, Memory]:
    """The pipeline stage whose ranks hold most, and what they hold."""
    last = problem.layout.pp - 1
    stages = {stage: of_stage(problem, stage) for stage in {0, min(1, last), last}}
    stage = max(stages, key=lambda stage: stages[stage].total)
    return stage, stages[stage]


def of_stage(problem: Problem, stage: int) -> Memory:
    """What a rank of a pipeline stage holds at its fullest moment in a step."""
    work, layout = problem.workload, problem.layout
    elements = parameters(problem, stage)
    weights = [term.times({"bytes": work.element}) for term in elements]
    if work.kind != "train":
        return Memory(weights, [], [], [], kv_cache(problem), buffers(problem, stage))
    gradient = 2 if work.dtype == "fp16" else 4  # Megatron reduces gradients of bf16 models in fp32
    state = 8 + (0 if work.dtype == "fp32" else 4)  # two moments, and fp32 copies of weights
    share = {"1/dp": 1 / layout.dp} if work.distributed_optimizer else {}
    in_flight = min(layout.pp - stage, problem.micro_batches)
    return Memory(
        weights,
        [term.times({"bytes": gradient}) for term in elements],
        [term.times({"bytes": state, **share}) for term in elements],
        [term.times({"micro-batches in flight": in_flight}) for term in activations(problem, stage)],
        [],
        buffers(problem, stage),
    )


# ---- parameters ----
def parameters(problem: Problem, stage: int) -> list[Term]:
    """Elements of the parameters of a rank."""
    shape, layout = problem.shape, problem.layout
    h, tp, layers = shape.hidden_size, layout.tp, problem.layers
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels / tp
    heads = shape.num_attention_heads * shape.kv_channels / tp
    f, up = shape.ffn_hidden_size / tp, (2 if shape.swiglu else 1)
    norm = 2 if shape.normalization == "LayerNorm" else 1
    terms = [
        Term("linear_qkv", {"layers": layers, "h": h, "(H+2G)d/tp": qkv}),
        Term("linear_proj", {"layers": layers, "h": h, "Hd/tp": heads}),
        Term("linear_fc1", {"layers": layers, "h": h, "gate and up" if up == 2 else "up": up, "f/tp": f}),
        Term("linear_fc2", {"layers": layers, "h": h, "f/tp": f}),
        Term("norms", {"layers": layers, "norms": 2, "vectors": norm, "h": h}),
    ]
    if shape.add_bias_linear:
        terms += [Term("biases", {"layers": layers, "rows": qkv + up * f + 2 * h})]
    elif shape.add_qkv_bias:
        terms += [Term("QKV bias", {"layers": layers, "(H+2G)d/tp": qkv})]
    if shape.qk_layernorm:
        terms += [Term("QK norms", {"layers": layers, "norms": 2, "vectors": norm, "d": shape.kv_channels})]
    first, last = stage == 0, stage == layout.pp - 1
    rows = shape.padded_vocab_size(tp) / tp
    if first:
        terms.append(Term("embedding", {"h": h, "V/tp": rows}))
        if shape.position_embedding_type == "learned_absolute":
            terms.append(Term("position embedding", {"h": h, "positions": shape.max_position_embeddings}))
    if last:
        terms.append(Term("final norm", {"vectors": norm, "h": h}))
        if not (first and shape.tied_embeddings):
            terms.append(Term("output layer", {"h": h, "V/tp": rows}))
    return terms


# ---- KV cache ----
def kv_cache(problem: Problem, dim_rank: int | None = None) -> list[Term]:
    """Bytes of the keys and values that a rank keeps; by default the fullest of its dim group."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    positions = work.length + (1 if work.kind == "decode" else 0)
    common = {
        "K and V": 2,
        "layers": problem.layers,
        "sequences": problem.replica_batch,
        "bytes": work.element,
    }
    if not layout.sliced:
        heads = max(1, shape.num_query_groups // layout.tp)
        return [
            Term("whole heads", {**common, "positions": positions, "heads": heads, "d": shape.kv_channels})
        ]
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
    shape, layout, work = problem.shape, problem.layout, problem.workload
    t, e = problem.tokens, work.element
    own = t // layout.tp if layout.sequence_parallel else t
    one = problem.layers
    if layout.recompute:
        terms = [Term("inputs of layers", {"layers": one, "t'": own, "h": shape.hidden_size, "bytes": e})]
    else:
        per_layer = [*norm_terms(problem, own), *attention_terms(problem), *mlp_terms(problem)]
        terms = [term.times({"layers": one}) for term in per_layer]
    if stage == 0:
        terms.append(Term("tokens and their mask", {"t": t, "bytes": 9}))
    if stage == layout.pp - 1:
        terms += [term.times({}, f"final {term.name}") for term in _one_norm(problem, own)]
        rows = shape.padded_vocab_size(layout.tp) / layout.tp
        terms.append(Term("softmax of the logits", {"t": t, "V/tp": rows, "fp32": 4}))
        terms.append(Term("targets and their mask", {"t": t, "bytes": 9}))
    return terms


def _one_norm(problem: Problem, own: int) -> list[Term]:
    """A norm and the input of the linear layer after it: its input, statistics, products, output."""
    shape, work = problem.shape, problem.workload
    layer = shape.normalization == "LayerNorm"
    e, h = work.element, shape.hidden_size
    terms = [Term("norm output", {"t'": own, "h": h, "bytes": e})]
    if layer or work.fused:
        terms.append(Term("norm input", {"t'": own, "h": h, "bytes": e}))
        statistic = 4 if work.fused else e
        terms.append(Term("norm statistics", {"t'": own, "vectors": 2 if layer else 1, "bytes": statistic}))
    else:  # torch's RMSNorm on a CPU: input and normalised input in fp32
        terms.append(Term("norm input and product", {"t'": own, "2": 2, "h": h, "fp32": 4}))
        terms.append(Term("norm statistics", {"t'": own, "fp32": 4}))
    return terms


def norm_terms(problem: Problem, own: int) -> list[Term]:
    """Bytes of both norms of a layer."""
    return [term.times({"norms": 2}) for term in _one_norm(problem, own)]


def attention_terms(problem: Problem) -> list[Term]:
    """Bytes of a layer's attention, between the QKV projection and the output projection's input."""
    shape, work = problem.shape, problem.workload
    terms: list[Term] = []
    if shape.position_embedding_type == "rope" and not work.fused:
        rotary = int(shape.kv_channels * shape.rotary_percent)
        keys = rotary // problem.layout.m
        queries = rotary if problem.layout.placement in ("none", "heads") else keys
        columns = 2 * (queries + keys)
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
    shape, tp = problem.shape, problem.layout.tp
    all_heads = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
    return all_heads if problem.gathers_qkv else all_heads / tp


def _qk_norm_terms(problem: Problem) -> list[Term]:
    layout, shape = problem.layout, problem.shape
    if layout.sliced:
        query = problem.heads.query_heads * problem.heads.slice_dim
        heads = problem.heads.query_heads + problem.heads.kv_heads
        elements = query + problem.heads.kv_heads * problem.heads.slice_dim
    else:
        heads = sum(_local_heads(problem))
        elements = heads * shape.kv_channels
    products = {"t": problem.tokens, "q and k of a rank": elements, "fp32": 4}
    return [
        Term("QK norm input", {"t": problem.tokens, "qkv of a rank": _mixed_qkv(problem),
                               "bytes": problem.workload.element}),
        Term("QK norm product", products),
        Term("QK norm statistics", {"t": problem.tokens, "heads": heads, "fp32": 4}),
    ]  # fmt: skip


def _unfused_core(problem: Problem) -> list[Term]:
    """Megatron's DotProductAttention: q, k, v as batched matrices, the mask, and the probabilities."""
    shape, work = problem.shape, problem.workload
    t, e, d = problem.tokens, work.element, shape.kv_channels
    heads, kv_heads = _local_heads(problem)
    b, s = problem.layout.micro_batch, work.length
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
    shape, layout, work = problem.shape, problem.layout, problem.workload
    t, e, d = problem.tokens, work.element, shape.kv_channels
    if not layout.sliced:
        heads, kv_heads = _local_heads(problem)
        share = 1.0
    else:
        parts = layout.m if layout.placement == "heads" else problem.heads.head_parts
        heads = problem.heads.query_heads // parts
        needed = problem.heads.kv_head_of(0, parts)
        kv_heads = len(set(needed))
        if len({needed.count(head) for head in needed}) > 1:  # uneven: every query head has its own copy
            kv_heads = heads
        positions = 1 if layout.placement == "heads" else problem.heads.position_parts
        share = part_length(work.length, 0, positions) / work.length
    terms = [
        Term("key and value", {"t": t, "2": 2, "KV heads": kv_heads, "d": d, "bytes": e}),
        Term(
            "query and output",
            {"t": t, "share of positions": share, "2": 2, "heads": heads, "d": d, "bytes": e},
        ),
        Term("log-sum-exp", {"t": t, "share of positions": share, "heads": heads, "fp32": 4}),
    ]
    if layout.sliced and (layout.placement == "dims" or layout.micro_batch > 1):
        elements = shape.num_attention_heads * d / layout.tp
        terms.append(Term("input of linear_proj", {"t": t, "Hd/tp": elements, "bytes": e}))
    return terms


def _summed_scores(problem: Problem) -> list[Term]:
    """Comm type all_reduce: scores are kept twice, in fp32."""
    work, heads = problem.workload, problem.heads
    t, b, s = problem.tokens, problem.layout.micro_batch, work.length
    mixed = {"t": t, "qkv of a rank": _mixed_qkv(problem), "bytes": work.element}
    return [
        Term("query and key, fp32", {"t": t, "hq + hk": heads.query_heads + heads.kv_heads,
                                     "d/m": heads.slice_dim, "fp32": 4}),
        Term("value", mixed),
        Term("causal mask", {"s": s, "s again": s, "bool": 1}),
        Term("scores and probabilities", {"2": 2, "b": b, "hq": heads.query_heads, "s": s, "s again": s,
                                          "fp32": 4}),
        Term("input of linear_proj", {"t": t, "hq": heads.query_heads, "d/m": heads.slice_dim,
                                      "bytes": work.element}),
    ]  # fmt: skip


def mlp_terms(problem: Problem) -> list[Term]:
    """Bytes of a layer's MLP: the output of fc1, what the activation keeps, and the input of fc2."""
    shape, work = problem.shape, problem.workload
    f = shape.ffn_hidden_size / problem.layout.tp
    gated = 3 if work.fused else 5  # unfused, silu(gate) and up are kept beside fc1's output
    copies = gated if shape.swiglu else 2
    return [Term("MLP", {"t": problem.tokens, "copies": copies, "f/tp": f, "bytes": work.element})]


# ---- buffers ----
def buffers(problem: Problem, stage: int) -> list[Term]:
    """The largest temporary tensors: an estimate."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    t, e = problem.tokens, work.element
    up = (2 if shape.swiglu else 1) * shape.ffn_hidden_size / layout.tp
    terms = [Term("output of fc1", {"t": t, "f/tp": up, "bytes": e})]
    if work.kind == "train":
        terms.append(Term("gathered or summed hidden", {"2": 2, "t": t, "h": shape.hidden_size, "bytes": e}))
        if stage == layout.pp - 1:
            rows = shape.padded_vocab_size(layout.tp) / layout.tp
            terms.append(Term("logits and their gradient", {"t": t, "V/tp": rows, "2": 2, "bytes": e}))
        if layout.recompute:
            own = t // layout.tp if layout.sequence_parallel else t
            layer = [*norm_terms(problem, own), *attention_terms(problem), *mlp_terms(problem)]
            terms += [term.times({}, f"recomputed {term.name}") for term in layer]
    else:
        terms.append(Term("hidden states", {"3": 3, "t": t, "h": shape.hidden_size, "bytes": e}))
    if layout.sliced:
        whole = 2 * problem.heads.kv_heads * shape.kv_channels
        terms.append(Term("whole keys and values", {"2": 2, "t": t, "2 hk d": whole, "bytes": e}))
    elif problem.gathers_qkv:
        terms.append(Term("gathered QKV", {"t": t, "(H+2G)d": _mixed_qkv(problem), "bytes": e}))
    return terms
