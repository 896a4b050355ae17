"""Contracts of the layer besides exactness: identities, collectives, precision, dropout, refusals."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import tensor_parallel

from helix_megatron.check.reference import Case, reference
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from tests.megatron_glue.layer_worker import (
    Groups,
    all_settings,
    check_all,
    errors,
    inferring,
    load,
    make_config,
    make_layer,
    run,
    start,
)


# ---- identities ----
def _same_as_megatron(tp: int, pairs: list) -> list[str]:
    """Differences, bit for bit, between a Helix layer and Megatron's layer with the same local weights."""
    start(tp)
    groups, wrong = Groups(), []
    rank = torch.distributed.get_rank()
    for case, helix, other in pairs:
        case.draw()
        plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
        ours = make_layer(case, helix, tp, groups.of(plan.grid) if plan.grid.dim_parallel_size > 1 else None)
        theirs = make_layer(other, None, tp)
        assert type(theirs).__name__ == "SelfAttention" and "Helix" in type(ours).__name__
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
                its.copy_(torch.randn(its.shape, generator=generator) * 0.2)
                mine.copy_(its)
        other.tensors = case.tensors
        found, expected = run(ours, case, tp), run(theirs, other, tp)
        wrong += [f"{case} {name}" for name in found if not torch.equal(found[name], expected[name])]
    return wrong


def test_one_slice_is_megatrons_layer_bit_for_bit():
    pairs = [
        (
            Case(8, 4, 16, **f),
            HelixConfig(4, 1, rotary_percent=f.get("rotary_percent", 1.0)),
            Case(8, 4, 16, **f),
        )
        for f in (dict(), dict(qk_norm="RMSNorm"), dict(rotary_percent=0.5, interleaved=True))
    ]
    assert run_ranks(_same_as_megatron, 4, 4, pairs) == [[]] * 4


def test_per_slice_is_megatrons_layer_with_more_and_smaller_heads():
    """H*m heads of dimension d/m, RoPE and QK-norm included: the same layer, bit for bit."""
    pairs = []
    for n, m in ((2, 2), (1, 4)):
        for f in (dict(), dict(rotary_percent=0.0), dict(interleaved=True), dict(qk_norm="RMSNorm")):
            helix = HelixConfig(n, m, softmax="per-slice", rotary_percent=f.get("rotary_percent", 1.0))
            pairs.append((Case(8, 4, 16, **f), helix, Case(8 * m, 4 * m, 16 // m, **f)))
    assert run_ranks(_same_as_megatron, 4, 4, pairs) == [[]] * 4


# ---- collectives ----
def _count(tp: int, jobs: list) -> list[dict]:
    """Collectives of one layer, forward and then forward + backward, besides those Megatron makes itself."""
    from helix_megatron.measure.comm import CommMeter

    start(tp)
    groups, found = Groups(), []
    for case, helix in jobs:
        case.draw()
        plan = helix.resolve(case.heads, case.groups, case.dim, tp)
        layer = make_layer(case, helix, tp, groups.of(plan.grid))
        load(layer, case, plan.layout.qkv_rows(0), plan.layout.proj_columns(0), torch.float32)
        hidden = case.tensors["hidden"].float().requires_grad_()
        meter = CommMeter()
        with meter.counting():
            out, _ = layer(hidden, None, rotary_pos_emb=case.rope_table())
            forward = meter.as_json()
            out.sum().backward()
        both = meter.as_json()
        found.append({"forward": forward, "both": both})
    return found


SIZE = "x2"  # of the dim group below; Megatron's own reductions run over all four ranks


def _inside_attention(tally: dict) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(f" {SIZE}"): (entry["calls"], entry["bytes"])
        for name, entry in tally.items()
        if name.endswith(SIZE)
    }


@pytest.mark.parametrize(
    "settings, forward, backward",
    [
        (dict(query_placement="dims"), dict(all_to_all=2), dict(all_to_all=2)),
        (dict(query_placement="heads"), dict(all_gather=1), dict(all_to_all=1)),
        (dict(comm_type="all_reduce", query_placement="dims"), dict(all_reduce=1), dict(all_reduce=1)),
        (
            dict(comm_type="all_reduce", query_placement="heads"),
            dict(all_reduce=1, all_to_all=2),
            dict(all_reduce=1, all_to_all=2),
        ),
        (dict(softmax="per-slice"), {}, {}),
    ],
)
def test_collectives_and_bytes_are_those_of_the_design(settings, forward, backward):
    case, m = Case(16, 2, 16, seq=12), 2
    s, b, hq, hk, d_s = 12, 2, 8, 1, 8
    counts = run_ranks(_count, 4, 4, [(case, HelixConfig(2, m, **settings))])[0][0]
    there, both = _inside_attention(counts["forward"]), _inside_attention(counts["both"])
    assert {name: calls for name, (calls, _) in there.items()} == forward
    total = {name: forward.get(name, 0) + backward.get(name, 0) for name in {**forward, **backward}}
    assert {name: calls for name, (calls, _) in both.items()} == total

    kv = 2 * (m - 1) * s * b * hk * d_s * 4  # bytes received per rank: the table in exchange/collectives.py
    queries = (m - 1) * s * b * hq * d_s * 4 // m
    scores = 2 * (m - 1) * b * hq * s * s * 4 // m  # an all-reduce receives 2 (p-1)/p of its payload
    together = kv if "all_gather" not in forward and "all_reduce" not in forward else 0  # with the queries
    expected = {"all_gather": kv, "all_to_all": together + 2 * queries, "all_reduce": scores}
    assert {name: received for name, (_, received) in there.items()} == {n: expected[n] for n in forward}
    received_both = sum(received for _, received in both.values())
    assert received_both == 2 * sum(received for _, received in there.values())


def test_layer_adds_no_other_collective():
    """Over the tensor-parallel group: all-reduce of the output and of the input gradient, as Megatron."""
    counts = run_ranks(_count, 4, 4, [(Case(16, 2, 16), HelixConfig(2, 2))])[0][0]["both"]
    others = {name: entry["calls"] for name, entry in counts.items() if not name.endswith(SIZE)}
    assert others == {"all_reduce x4": 2}


def _count_context_parallel(tp: int, cp: int, jobs: list) -> list[dict]:
    """Bytes that this rank receives over the context-parallel group: forward, and forward + backward."""
    from helix_megatron.measure.comm import CommMeter

    start(tp, cp)
    groups, found = Groups(), []
    for case, helix in jobs:
        case.draw()
        plan = helix.resolve(case.heads, case.groups, case.dim, tp)
        layer = make_layer(case, helix, tp, groups.of(plan.grid), context_parallel_size=cp)
        load(layer, case, plan.layout.qkv_rows(0), plan.layout.proj_columns(0), torch.float32)
        hidden = case.tensors["hidden"].float().requires_grad_()
        meter = CommMeter()
        with meter.counting():
            out, _ = layer(hidden, None)
            forward = meter.as_json()
            out.sum().backward()
        sizes = [
            {n: t["bytes"] for n, t in x.items() if n.endswith(f"x{cp}")} for x in (forward, meter.as_json())
        ]
        found.append({"forward": sizes[0], "both": sizes[1]})
    return found


def test_bytes_of_context_parallelism():
    """Whole K and V of the heads that a rank attends with: 2 (p-1) S B K' D, forward and backward."""
    p, s, b, d = 3, 12, 2, 16
    heads = dict(heads=8, groups=4), HelixConfig(1, 2, rotary_percent=0.0, query_placement="heads"), 2
    dims = dict(heads=8, groups=4), HelixConfig(1, 2, rotary_percent=0.0, query_placement="dims"), 2
    shared = dict(heads=3, groups=1), HelixConfig(1, 2, rotary_percent=0.0), 1  # ranks share query positions
    uneven = dict(heads=9, groups=3), HelixConfig(1, 2, rotary_percent=0.0), 3
    shapes = (heads, dims, shared, uneven)
    jobs = [(Case(dim=d, seq=s, batch=b, rotary_percent=0.0, **shape), helix) for shape, helix, _ in shapes]
    for rank in run_ranks(_count_context_parallel, 2 * p, 2, p, jobs):
        for found, (_, _, kv_heads) in zip(rank, shapes, strict=True):
            received = 2 * (p - 1) * s * b * kv_heads * d * 4
            assert found["forward"] == {f"all_gather x{p}": received}
            assert found["both"] == {f"all_gather x{p}": received, f"all_to_all x{p}": received}


# ---- precision ----
def _half_precision_errors(tp: int, dtype: torch.dtype, jobs: list) -> list[dict[str, float]]:
    start(tp)
    groups, found = Groups(), []
    rank = torch.distributed.get_rank() % tp
    flags = dict(params_dtype=dtype, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16)
    for case, helix in jobs:
        case.draw()
        for name in ("hidden", "qkv_weight", "qkv_bias", "proj_weight"):  # representable in the dtype
            case.tensors[name] = case.tensors[name].to(dtype).double()
        if helix is None:
            layer = make_layer(case, None, tp, **flags)
            rows, columns = slice(None), slice(None)
        else:
            layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
            layer = make_layer(case, helix, tp, groups.of(layout.grid), **flags)
            rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        load(layer, case, rows, columns, dtype)
        found.append(errors(run(layer, case, tp, dtype), reference(case), rows, columns))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_megatrons(dtype):
    shapes = [(9, 3), (8, 2), (8, 8)]
    cases = [Case(*shape, 32, hidden=64, seq=64, seed=seed) for shape in shapes for seed in range(2)]
    megatron = run_ranks(_half_precision_errors, 1, 1, dtype, [(case, None) for case in cases])[0]
    for settings in (
        dict(query_placement="dims"),
        dict(query_placement="dims", core_attention="spec"),
        dict(comm_type="all_reduce"),
    ):
        jobs = [(case, HelixConfig(1, 4, **settings)) for case in cases]
        helix = run_ranks(_half_precision_errors, 4, 4, dtype, jobs)
        for index, base in enumerate(megatron):
            for name, error in base.items():
                ours = max(rank[index][name] for rank in helix)
                assert ours <= 1.5 * error, f"{cases[index]} {settings} {name}: {ours} against {error}"


# ---- dropout ----
def _dropout(tp: int, helix: HelixConfig, recompute: bool) -> dict:
    start(tp)
    masks = []
    case = Case(4, 2, 16, seq=32)
    case.draw()
    layout = helix.resolve(4, 2, 16, tp).layout
    flags = dict(recompute_granularity="selective", recompute_modules=["core_attn"]) if recompute else {}
    layer = make_layer(case, helix, tp, Groups().of(layout.grid), attention_dropout=0.3, **flags)
    rank = torch.distributed.get_rank()
    load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
    layer.train()
    core = layer.core_attention
    (core.core or core).attention_dropout.register_forward_hook(  # summed scores have no inner core
        lambda module, args, out: masks.append((out == 0) & (args[0] != 0))
    )
    result = run(layer, case, tp)
    return {"mask": masks[0], "passes": len(masks), **result}


@pytest.mark.parametrize("comm_type, shared", [("all_reduce", True), ("a2a", False)])
def test_dropout_masks_are_shared_exactly_where_probabilities_are(comm_type, shared):
    helix = HelixConfig(2, 2, comm_type=comm_type)
    ranks = run_ranks(_dropout, 4, 4, helix, False)
    assert 0.1 < ranks[0]["mask"].float().mean() < 0.2  # 0.3 of the causal half
    assert torch.equal(ranks[0]["mask"], ranks[1]["mask"]) is shared  # one dim group
    assert not torch.equal(ranks[0]["mask"], ranks[2]["mask"])  # another one: other heads


@pytest.mark.parametrize("comm_type", ["all_reduce", "a2a"])
def test_recompute_draws_the_same_dropout(comm_type):
    helix = HelixConfig(2, 2, comm_type=comm_type)
    kept, recomputed = (run_ranks(_dropout, 4, 4, helix, recompute) for recompute in (False, True))
    for mine, again in zip(kept, recomputed, strict=True):
        assert again["passes"] == mine["passes"] + 1
        for name in ("output", "hidden", "qkv_weight", "proj_weight"):
            assert torch.equal(mine[name], again[name]), name


# ---- causality where positions are shared ----
def _future_seen(tp: int, cp: int, overrides: list[dict]) -> list[float]:
    """Change of the output at position 0, on the ranks that have it, when the input of position 1 changes."""
    start(tp, cp)
    case, helix, found = Case(9, 3, 16, seq=16), HelixConfig(1, tp), []
    case.draw()
    layout = helix.resolve(9, 3, 16, tp).layout
    assert layout.position_parts > 1 or cp > 1
    groups, rank = Groups().of(layout.grid), torch.distributed.get_rank()
    chunks = torch.arange(case.seq).chunk(2 * cp)
    share = torch.cat([chunks[rank // tp], chunks[-1 - rank // tp]])
    for flags in overrides:
        layer = make_layer(case, helix, tp, groups, context_parallel_size=cp, **flags).train()
        load(layer, case, layout.qkv_rows(rank % tp), layout.proj_columns(rank % tp), torch.float32)
        outs = []
        for change in (0.0, 5.0):
            tensor_parallel.model_parallel_cuda_manual_seed(123)  # drops the same
            hidden = case.tensors["hidden"].float().clone()
            hidden[1] += change
            outs.append(layer(hidden[share], None, rotary_pos_emb=case.rope_table()[share])[0])
        difference = (outs[1] - outs[0]).detach().abs().amax(dim=(1, 2))
        found.append(difference[share == 0].sum().item())
        assert cp > 1 or difference[1] > 0.1
    return found


@pytest.mark.parametrize("tp, cp", [(4, 1), (2, 2)])
def test_shared_positions_do_not_see_the_future(tp, cp):
    """Also where PyTorch's fused attention does not serve, and Megatron's own core computes the chunks."""
    features = [{}, dict(attention_dropout=0.3), dict(softmax_type="off-by-one")]
    assert run_ranks(_future_seen, tp * cp, tp, cp, features) == [[0.0, 0.0, 0.0]] * (tp * cp)


# ---- decoding with Megatron's static cache ----
def _decode(tp: int, jobs: list) -> list[float]:
    """Largest relative difference between token-by-token decoding and one pass over the sequence."""
    from megatron.core.inference.contexts import StaticInferenceContext

    start(tp)
    groups, found = Groups(), []
    rank = torch.distributed.get_rank()
    for case, helix in jobs:
        case.draw()
        layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
        layer = make_layer(case, helix, tp, groups.of(layout.grid)).eval()
        load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
        hidden, table = case.tensors["hidden"].float(), case.rope_table()
        expected = reference(case)["output"]
        context = StaticInferenceContext(case.batch, case.seq)
        prompt, parts = case.seq - 5, []
        with inferring():
            for begin, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, case.seq))]:
                context.sequence_len_offset = begin
                chunk = hidden[begin:stop]
                parts.append(layer(chunk, None, inference_context=context, rotary_pos_emb=table)[0])
                if begin == 0:
                    context.enable_decode_mode()
        out = torch.cat(parts).double()
        found.append(((out - expected).norm() / expected.norm()).item())
    return found


def test_decoding_with_a_cache_of_slices_is_exact():
    jobs = [
        (Case(*shape, 16, seq=14), HelixConfig(kv_cache="dim", **settings))
        for shape in ((8, 2), (9, 3))
        for settings in (dict(), dict(dim_parallel_size=4), dict(comm_type="all_reduce"))
    ]
    for rank in run_ranks(_decode, 4, 4, jobs):
        assert max(rank) < 2e-6, rank


# ---- gates and sinks ----
def test_output_gates_and_attention_sinks_are_exact():
    jobs = []
    for features in (dict(gate=True), dict(gate=True, qk_norm="RMSNorm", interleaved=True), dict(sinks=True)):
        for shape in ((8, 2), (9, 3), (8, 4)):
            case = Case(*shape, 16, **features)
            for helix in all_settings(case, 4):
                shared = helix.resolve(*shape, 16, 4).layout.position_parts > 1
                if not case.sinks or (helix.comm_type == "a2a" and not shared):
                    jobs.append((case, helix, {}))
    assert sum(case.sinks for case, _, _ in jobs) >= 6
    for rank in run_ranks(check_all, 4, 4, jobs):
        for label, found in rank:
            assert max(found.values()) < 1e-5, (label, found)
            assert ("sinks" in found) is ("sinks=True" in label)


def _saved(tp: int) -> dict:
    """Where this rank's sinks and gated QKV rows stand in what is saved: {name: [(whole, start, length)]}."""
    from megatron.core import parallel_state

    start(tp)
    case, helix = Case(8, 2, 16, gate=True, sinks=True), HelixConfig(2, 2)
    layer = make_layer(case, helix, tp, Groups().of(helix.resolve(8, 2, 16, tp).grid))
    cp_and_dp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state, found = layer.sharded_state_dict(metadata={"dp_cp_group": cp_and_dp}), {}
    for name in ("core_attention.softmax_offset", "linear_qkv.weight"):
        pieces = state[name].build() if hasattr(state[name], "build") else [state[name]]
        found[name] = [(p.global_shape[0], p.global_offset[0], p.local_shape[0]) for p in pieces]
    return found


def test_sinks_and_gates_are_saved_as_one_rank_would():
    ranks = run_ranks(_saved, 4, 4)
    for name, rows in (("core_attention.softmax_offset", 8), ("linear_qkv.weight", (2 * 8 + 2 * 2) * 16)):
        pieces = [piece for rank in ranks for piece in rank[name]]
        assert {whole for whole, _, _ in pieces} == {rows}
        covered = sorted(x for _, first, length in pieces for x in range(first, first + length))
        assert covered == list(range(rows))
    assert [rank["core_attention.softmax_offset"][0][1] for rank in ranks] == [0, 2, 4, 6]


# ---- packed sequences ----
DOCUMENTS = (5, 1, 10)


def _packed(tp: int) -> list[tuple[str, dict[str, float]]]:
    """Errors of packed documents against each document alone, in float64."""
    import dataclasses
    from itertools import accumulate, pairwise

    from megatron.core.packed_seq_params import PackedSeqParams

    start(tp)
    groups, found, rank = Groups(), [], torch.distributed.get_rank()
    ends = list(accumulate(DOCUMENTS, initial=0))
    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = max(DOCUMENTS)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    for case in (Case(8, 2, 16, seq=sum(DOCUMENTS), batch=1), Case(8, 4, 16, seq=16, batch=1, gate=True)):
        case.draw()
        parts = []
        for begin, stop in pairwise(ends):
            alone = dataclasses.replace(case, seq=stop - begin)
            share = {name: case.tensors[name][begin:stop] for name in ("hidden", "loss")}
            alone.tensors = {**case.tensors, **share}
            parts.append(reference(alone))
        expected = {
            name: torch.cat([part[name] for part in parts])
            if name in ("output", "hidden")
            else sum(part[name] for part in parts)
            for name in ("output", "hidden", "qkv_weight", "qkv_bias", "proj_weight")
        }
        for helix in all_settings(case, tp, cores=("auto",)):
            plan = helix.resolve(case.heads, case.groups, case.dim, tp, output_gate=case.gate)
            layout = plan.layout
            if plan.comm_type != "a2a" or layout.position_parts > 1:
                continue
            layer = make_layer(case, helix, tp, groups.of(plan.grid))
            rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
            load(layer, case, rows, columns, torch.float32)
            hidden = case.tensors["hidden"].float().requires_grad_()
            out, _ = layer(hidden, None, rotary_pos_emb=case.rope_table(), packed_seq_params=packed)
            (out.double() * case.tensors["loss"]).sum().backward()
            result = {
                "output": out.detach(), "hidden": hidden.grad, "qkv_weight": layer.linear_qkv.weight.grad,
                "qkv_bias": layer.linear_qkv.bias.grad, "proj_weight": layer.linear_proj.weight.grad,
            }  # fmt: skip
            found.append((plan.describe(), errors(result, expected, rows, columns)))
    shared, helix = Case(6, 2, 16, seq=sum(DOCUMENTS), batch=1), HelixConfig(2, 2)  # of a group, 3 heads
    shared.draw()
    layer = make_layer(shared, helix, tp, groups.of(helix.resolve(6, 2, 16, tp).grid))
    with pytest.raises(NotImplementedError, match=r"packed sequences \(thd\) need"):
        layer(
            shared.tensors["hidden"].float(), None, rotary_pos_emb=shared.rope_table(),
            packed_seq_params=packed,
        )  # fmt: skip
    return found


def test_packed_sequences_are_each_sequence_alone():
    for rank in run_ranks(_packed, 4, 4):
        assert len(rank) >= 4
        for label, found in rank:
            assert max(found.values()) < 1e-5, (label, found)


# ---- refusals ----
def _refused(tp: int, overrides: dict) -> str:
    start(tp)
    case = Case(8, 4, 16)
    try:
        helix = HelixConfig(1, 2)
        make_layer(case, helix, tp, Groups().of(helix.resolve(8, 4, 16, 2).grid), **overrides)
    except HelixConfigError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    "overrides, name",
    [
        (dict(qk_clip=True), "--qk-clip"),
        (dict(flash_decode=True), "--flash-decode"),
        (dict(test_mode=True), "--test-mode"),
    ],
)
def test_features_that_cannot_work_are_refused_by_name(overrides, name):
    for message in run_ranks(_refused, 2, 2, overrides):
        assert name in message, message


def _norm_without_a_module(tp: int) -> str:
    """Megatron's training loop asks the local spec for no L2 norm, whatever the configuration says."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.spec_utils import build_module

    from helix_megatron.megatron import integrate

    start(tp)
    helix = HelixConfig(1, 2)
    Groups().of(helix.resolve(8, 4, 16, 2).grid)
    integrate.enable(helix)
    try:
        config = make_config(Case(8, 4, 16, qk_norm="L2Norm"), tp)
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm").submodules.self_attention
        build_module(spec, config=config, layer_number=1)
    except HelixConfigError as error:
        return str(error)
    finally:
        integrate.disable()
    return "built"


def test_a_qk_norm_that_the_spec_lacks_is_refused():
    for message in run_ranks(_norm_without_a_module, 2, 2):
        assert "--qk-l2-norm was given, but the layer spec has no norm in q_layernorm and" in message


def _wrong_rope(tp: int) -> str:
    start(tp)
    case, helix = Case(8, 4, 16), HelixConfig(1, 2, rotary_percent=0.5)
    case.draw()
    layer = make_layer(case, helix, tp, Groups().of(helix.resolve(8, 4, 16, 2).grid))
    try:
        run(layer, case, tp)
    except HelixConfigError as error:
        return str(error)
    return "ran"


def test_a_rope_table_of_another_size_is_refused():
    assert all("rotary_percent" in message for message in run_ranks(_wrong_rope, 2, 2))


def _other_attention_classes() -> list[str]:
    from megatron.core.transformer.attention import CrossAttention

    from helix_megatron.megatron import integrate

    messages = []
    integrate.enable(HelixConfig())
    config = SimpleNamespace(
        num_attention_heads=9, num_query_groups=3, kv_channels=64, tensor_model_parallel_size=2
    )
    try:
        CrossAttention(config, None, 1)
    except HelixConfigError as error:
        messages.append(str(error))
    integrate.disable()
    return messages


def test_cross_attention_is_refused():
    (messages,) = run_ranks(_other_attention_classes, 1)
    assert messages and "CrossAttention" in messages[0]
