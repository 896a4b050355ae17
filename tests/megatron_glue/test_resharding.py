"""Weights from one layout to another by Megatron's `swap_model_weights`; what would misread them stops."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron import compat
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron import integrate
from helix_megatron.megatron.refusals import refuse_unsupported
from helix_megatron.megatron.sliced_linear import Slices, mark, slices_of
from helix_megatron.megatron.weight_readers import describe_sliced, plan_sliced
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid, legal_grids
from helix_megatron.partition.layout import HelixLayout
from helix_megatron.partition.resharding import transfers
from tests.partition.test_layout import layouts


# ---- the arithmetic ----
@st.composite
def two_sides(draw):
    """Standard rows (or columns) that each rank holds, in two layouts of one model; some are vanilla."""
    layout, dim = draw(layouts()), draw(st.sampled_from([0, 1]))
    layout = replace(layout, per_slice=False)
    whole = len(layout.qkv_permutation() if dim == 0 else layout.proj_permutation())

    def side():
        if draw(st.integers(0, 2)) == 0:
            ranks = draw(st.sampled_from([n for n in range(1, 9) if whole % n == 0]))
            return np.split(np.arange(whole), ranks)
        if draw(st.booleans()):
            ranks = draw(st.sampled_from([1, layout.grid.size]))
            grid = draw(st.sampled_from(legal_grids(layout.shape, ranks)))
            other = HelixLayout(layout.shape, grid, "dims", False, layout.output_gate)
        else:
            other = layout
        return [other.held(dim, rank) for rank in range(other.grid.size)]

    return side(), side()


@given(two_sides())
@settings(max_examples=300, deadline=None)
def test_every_row_arrives_once_where_it_is_held(sides):
    source, destination = sides
    for own in destination:
        received = np.full(len(own), -1)
        runs = transfers(source, own)
        for run in runs:
            assert run.length > 0
            there = source[run.source][run.start : run.start + run.length]
            here = slice(run.destination_start, run.destination_start + run.length)
            assert len(there) == run.length and (received[here] == -1).all()
            received[here] = there
        assert np.array_equal(received, own)
        for first, second in itertools.pairwise(runs):  # none could be longer
            assert (first.source, first.start + first.length) != (second.source, second.start)


# ---- models ----
LAYERS, HEADS, GROUPS, DIM, HIDDEN, WORDS, LENGTH = 2, 4, 2, 12, 48, 96, 16


def _groups(tp: int, pp: int = 1, world: int = 4, first: int = 0):
    import torch.distributed as dist
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    grid = HyperCommGrid([tp, 1, 1, pp, world // tp // pp], ["tp", "cp", "ep", "pp", "dp"], rank_offset=first)
    found = {name: grid.create_pg(name) for name in ("tp", "cp", "ep", "pp", "dp")}
    several = dict(tp_cp=["tp", "cp"], mp=["tp", "cp", "ep", "pp"], tp_ep=["tp", "ep"],
                   tp_ep_pp=["tp", "ep", "pp"], dp_cp=["cp", "dp"], tp_dp_cp=["tp", "cp", "dp"])  # fmt: skip
    found |= {name: grid.create_pg(dims) for name, dims in several.items()}
    alone, _ = dist.new_subgroups(1)
    if found["tp"] is None:
        return None
    return ProcessGroupCollection(
        **found, embd=alone, pos_embd=alone, expt_tp=found["tp"], expt_dp=found["dp"]
    )


def _model(groups, helix: HelixConfig | None = None, pp: int = 1, seed: int = 1):
    """A GPT of this file's size; Helix where `helix` is given. None on ranks outside the groups."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from helix_megatron.megatron.process_groups import destroy_helix_parallel, initialize_helix_parallel
    from helix_megatron.megatron.specs import with_helix_attention

    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    if helix is not None:  # collective over the world
        grid = HelixGrid(helix.head_parallel_size, helix.dim_parallel_size)
        destroy_helix_parallel()
        spec = with_helix_attention(spec, helix, initialize_helix_parallel(grid, _groups(grid.size).tp))
    if groups is None:
        return None
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    tp = groups.tp.size()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS * tp, num_query_groups=GROUPS * tp,
        kv_channels=DIM, ffn_hidden_size=HIDDEN, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=True, add_qkv_bias=True,
        qk_layernorm=True, normalization="RMSNorm", layernorm_epsilon=1e-2,
    )  # fmt: skip
    # What Megatron's check that heads divide by T is relaxed for by enable().
    config.num_attention_heads, config.num_query_groups = HEADS, GROUPS
    stage = groups.pp.rank()
    model = GPTModel(
        config, spec, WORDS, LENGTH, pre_process=stage == 0, post_process=stage == pp - 1,
        position_embedding_type="rope", pg_collection=groups, parallel_output=False,
        share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip
    with torch.no_grad():  # biases and norms that matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            if seed > 1:
                parameter.fill_(seed)
    return model


def _logits(model):
    tokens = torch.arange(LENGTH)[None] * 5 % WORDS
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(LENGTH)[None], mask)


def _swap(source, destination):
    from megatron.core.resharding.refit import swap_model_weights

    swap_model_weights(source and [source], destination and [destination], "gloo")


def _same_weights(model, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def _renewed(model):
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if slices_of(module) is not None:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    return model


def _error(call, *args) -> str:
    try:
        call(*args)
    except HelixConfigError as error:
        return str(error)
    return "none"


def helix(n: int, m: int, **more) -> HelixConfig:
    return HelixConfig(head_parallel_size=n, dim_parallel_size=m, **more)


UNEVEN = dict(slice_weights=(2.0, 1.0))
CHAIN = [  # the weights go from one to the next
    ("2x2", 4, helix(2, 2)),
    ("1x4, uneven", 4, helix(1, 4)),  # as many ranks: another plan all the same
    ("2x2, dims", 4, helix(2, 2, query_placement="dims")),
    ("vanilla, T = 2", 2, None),
    ("1x2, by weights", 2, helix(1, 2, **UNEVEN)),
    ("1x4 again", 4, helix(1, 4)),
]


def rank_main() -> dict:
    """What came of every way that the tests ask about: one launch for all."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(4)
    rank, found = dist.get_rank(), {"logits": {}}
    master = source = _model(_groups(1))
    expected = _logits(master)
    for number, (name, tp, config) in enumerate(CHAIN):
        target = _model(_groups(tp), config, seed=2 + number)
        _swap(source, target)
        found["logits"][name] = float((_logits(target) - expected).abs().max())
        source = target
    found["largest logit"] = float(expected.abs().max())
    _swap(source, back := _model(_groups(1), seed=20))
    found["back"] = _same_weights(back, master)

    # over pipeline stages
    stages = _model(_groups(2, pp=2), helix(1, 2), pp=2, seed=21)
    _swap(master, stages)
    _swap(stages, back := _model(_groups(1), seed=22))
    found["pipeline"] = _same_weights(back, master)

    # source and destination on different ranks
    here = _model(_groups(2, world=2), helix(1, 2, **UNEVEN), seed=23)
    there = _model(_groups(2, world=2, first=2), seed=24)
    _swap(master, here)
    _swap(here, there)
    _swap(there, back := _model(_groups(1), seed=25))
    found["elsewhere"] = _same_weights(back, master)

    # new parameters in the marked layers, as load_state_dict(assign=True) leaves them
    sliced = _renewed(_model(_groups(4), helix(1, 4), seed=26))
    _swap(master, sliced)
    _swap(sliced, back := _model(_groups(1), seed=27))
    found["renewed"] = _same_weights(back, master) and _same_weights(sliced, source)

    # per-slice softmax is another model, at every grid with as many slices the same
    slices = {"softmax": "per-slice", "dim_parallel_size": 2}
    one = _model(_groups(2), HelixConfig(head_parallel_size=1, **slices))
    two = _model(_groups(4), HelixConfig(head_parallel_size=2, **slices), seed=28)
    _swap(one, two)
    found["per-slice"] = float((_logits(one) - _logits(two)).abs().max())
    found["per-slice, another function"] = float((_logits(one) - expected).abs().max())
    found["errors"] = {
        "per-slice to vanilla": _error(_swap, one, back),
        "exact to per-slice": _error(_swap, sliced, two),
    }
    integrate.disable()  # a Megatron that was not told
    for name, models in {"to vanilla": (sliced, back), "from vanilla": (back, sliced)}.items():
        found["errors"][f"untaught, {name}"] = _error(_swap, *models)
    found["rank"] = rank
    return found


@pytest.fixture(scope="module")
def outcome():
    return run_ranks(rank_main, 4, timeout_s=240)


@pytest.mark.resharding
def test_logits_after_every_swap_are_those_of_one_rank(outcome):
    for rank in outcome:
        assert rank["largest logit"] > 0.3
        assert set(rank["logits"]) == {name for name, *_ in CHAIN}
        for name, difference in rank["logits"].items():
            assert difference < 2e-6, name


@pytest.mark.resharding
@pytest.mark.parametrize("way", ["back", "pipeline", "elsewhere", "renewed"])
def test_weights_come_back_bit_for_bit(outcome, way):
    assert all(rank[way] for rank in outcome)


@pytest.mark.resharding
def test_per_slice_softmax_goes_to_as_many_slices_alone(outcome):
    for rank in outcome:
        assert rank["per-slice"] < 2e-6 and rank["per-slice, another function"] > 1e-2
        for way in ("per-slice to vanilla", "exact to per-slice"):
            assert "another model, in which they mean nothing" in rank["errors"][way]
            assert "per-slice softmax over 2 slices" in rank["errors"][way]


@pytest.mark.resharding
def test_a_planner_that_was_not_told_stops(outcome):
    for rank in outcome:
        for way in ("to", "from"):
            assert "integrate.teach_tools()" in rank["errors"][f"untaught, {way} vanilla"]


# ---- who would take a rank's part for a chunk ----
def _marked(dim: int = 0, layout: HelixLayout | None = None) -> torch.nn.Module:
    """A linear layer of rank 0 of a 1 x 2 grid: `linear_qkv` (dim 0) or `linear_proj` (dim 1)."""
    layout = layout or helix(1, 2).resolve(HEADS, GROUPS, DIM, 2).layout
    sizes = [HIDDEN, HIDDEN]
    sizes[1 - dim] = len(layout.held(dim, 0))
    return mark(torch.nn.Linear(*sizes), Slices(layout, 0, dim, None))


READERS = {
    "resharding": lambda weight: int(weight.partition_dim),
    "Muon": lambda weight: weight.partition_dim == -1,
    "FSDP": lambda weight: weight.partition_dim >= 0,
    "size[partition_dim]": lambda weight: [1, 2][weight.partition_dim],
    "assert partition_stride == 1": lambda weight: weight.partition_stride == 1,
    "max(1, partition_stride)": lambda weight: max(1, weight.partition_stride),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dim, what", [(0, "rows of linear_qkv"), (1, "columns of linear_proj")])
def test_readers_of_a_chunk_are_stopped(reader, dim, what):
    from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes

    copied = torch.nn.Parameter(torch.zeros(1))  # as an optimizer's own copy
    copy_tensor_model_parallel_attributes(copied, _marked(dim).weight)
    for weight in (_marked(dim).weight, copied):
        with pytest.raises(HelixConfigError, match=f"the {what} on a rank of Helix grid 1x2 are slices"):
            READERS[reader](weight)


def test_megatrons_own_readers():
    from megatron.core.distributed.fsdp.src.megatron_fsdp import utils
    from megatron.core.resharding.utils import extract_param_metadata
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    rows, columns = _marked(0), _marked(1)
    for sliced in (rows.weight, rows.bias, columns.weight):
        assert param_is_not_tensor_parallel_duplicate(sliced)  # every rank's entries count
        with pytest.raises(HelixConfigError, match="slices of heads"):
            utils.get_mcore_tensor_parallel_partition_dim(sliced)
        with pytest.raises(HelixConfigError, match="slices of heads"):
            extract_param_metadata(sliced, "weight", 0, None)
    assert not hasattr(columns.bias, "partition_dim")  # whole on every rank


def test_tools_that_ask_no_parameter_are_refused():
    import importlib

    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as trtllm,
    )

    module, name = compat.megatron().matrix_optimizer
    muon = SimpleNamespace(optimizer="muon", use_layer_wise_distributed_optimizer=False)
    integrate.teach_tools()
    try:
        build = getattr(importlib.import_module(module), name)
        with pytest.raises(HelixConfigError, match="does not support optimizer 'muon'"):
            build(muon, [torch.nn.Sequential(_marked())])
        with pytest.raises(ImportError, match="emerging"):  # Megatron's own word on a model without slices
            build(muon, [torch.nn.Linear(2, 2)])
        with pytest.raises(HelixConfigError, match="TensorRT-LLM"):
            trtllm.DistributedTRTLLMModelWeightsConverter.convert(None, {}, {}, 1)
    finally:
        integrate.disable()
    plan = helix(1, 2).resolve(HEADS, GROUPS, DIM, 2)
    with pytest.raises(HelixConfigError, match="--tensor-parallel-num-weight-shards"):
        refuse_unsupported(SimpleNamespace(gtp_weight_remat_size=2), plan)


# ---- what fits by size alone ----
def _metadata(parameter, ranks: int, dim: int = 0):
    from megatron.core.resharding.utils import ParameterMetadata

    return ParameterMetadata(
        "linear", tuple(parameter.shape), torch.float32, 4, is_tp=True, owner_rank=0,
        partition_dim=getattr(parameter, "partition_dim", dim),
        partition_stride=getattr(parameter, "partition_stride", 1),
        tensor_parallel_group_ranks=list(range(ranks)),
    )  # fmt: skip


@pytest.mark.resharding
def test_another_model_is_refused():
    plan = plan_sliced(lambda *_: pytest.fail("left to Megatron"))
    ours = _metadata(_marked().weight, 2)
    whole = ours.shape[0] * 2
    vanilla = _metadata(torch.empty(whole // 4, HIDDEN), 4)
    assert plan("linear", ours, vanilla, 3) and plan("linear", vanilla, ours, 1)
    heads = helix(1, 2).resolve(HEADS // 2, GROUPS // 2, 2 * DIM, 2).layout  # as many rows
    gates = helix(1, 2).resolve(HEADS // 2, GROUPS, DIM, 2, False, True).layout
    interleaved = helix(1, 2).resolve(HEADS, GROUPS, DIM, 2, True).layout
    half = helix(1, 2, rotary_percent=0.5).resolve(HEADS, GROUPS, DIM, 2).layout
    for other in (heads, gates, interleaved, half):
        theirs = _metadata(_marked(0, other).weight, 2)
        assert theirs.shape == ours.shape
        for pair in ((ours, theirs), (theirs, ours)):
            with pytest.raises(HelixConfigError, match="another model, in which they mean nothing"):
                plan("linear", *pair, 0)
    for other in (
        _metadata(torch.empty(whole // 2 + 1, HIDDEN), 2),
        _metadata(torch.empty(whole, HIDDEN), 2),  # whole on both ranks
        _metadata(torch.empty(whole // 2, HIDDEN), 2, dim=1),
        replace(vanilla, partition_stride=2),
        replace(vanilla, partition_sizes=[whole // 8, whole // 8]),
        replace(ours, tensor_parallel_group_ranks=[0, 1, 2, 3]),
    ):
        with pytest.raises(HelixConfigError, match="must be the same model"):
            plan("linear", other, ours, 0)


def test_what_attention_itself_learns_is_refused():
    extract = describe_sliced(lambda *_: "extracted")
    assert extract(torch.zeros(1), "decoder.layers.0.self_attention.q_layernorm.weight") == "extracted"
    with pytest.raises(HelixConfigError, match="--softmax-type learnable"):
        extract(torch.zeros(1), "decoder.layers.0.self_attention.core_attention.core.softmax_offset")
