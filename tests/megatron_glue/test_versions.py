"""What holds on every Megatron that Helix knows; needs nothing but megatron.core."""

import os
from types import SimpleNamespace

import pytest
import torch

from helix_megatron import compat
from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import RankError, run_ranks
from helix_megatron.inference import dynamic_context
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from tests.megatron_glue.layer_worker import Groups, inferring, load, make_config, make_layer, start

LAYOUTS = {
    "vanilla": None,
    "1x4": HelixConfig(1, 4, query_placement="dims"),
    "2x2": HelixConfig(2, 2, query_placement="dims"),
    "2x2, whole heads": HelixConfig(2, 2, query_placement="heads"),
    "1x4, weights": HelixConfig(1, 4, slice_weights=(3, 1, 2, 1)),
    "2x2, whole heads, weights": HelixConfig(2, 2, slice_weights=(1, 3), query_placement="heads"),
}


def test_this_megatron_is_known():
    assert compat.version().startswith(tuple(compat.KNOWN))
    assert compat.megatron() is compat.KNOWN[".".join(compat.version().split(".")[:2])]
    if compat.megatron().training:
        compat.need_training()


def test_another_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "0.15.3")
    with pytest.raises(
        HelixConfigError, match=r"0\.15\.3 is not supported.*which knows 0\.16, 0\.17, 0\.18, 0\.19, 0\.20"
    ):
        compat.megatron()


def test_without_megatron_training_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr(compat, "has_training", lambda: False)
    with pytest.raises(HelixConfigError, match=r"megatron\.training.*Python 3\.12"):
        compat.need_training()


@pytest.mark.parametrize("found", ["0.17.1", "0.18.2"])
def test_a_training_loop_of_another_kind_is_refused(monkeypatch, found):
    monkeypatch.setattr(compat, "version", lambda: found)
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object())
    assert not compat.has_training()
    with pytest.raises(HelixConfigError, match=r"has another megatron\.training than Helix knows"):
        compat.need_training()


# ---- process groups, which a collection may not have ----
def test_a_group_that_a_collection_has_not_is_asked_of_the_configuration_or_named():
    from megatron.core.process_groups_config import ProcessGroupCollection

    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention

    config, empty = SimpleNamespace(tensor_model_parallel_size=4), ProcessGroupCollection()
    group = SimpleNamespace(size=lambda: 2)
    for groups, size in ((None, 4), (empty, 4), (ProcessGroupCollection(tp=group), 2)):
        assert compat.tensor_parallel_size(groups, config) == size
    with pytest.raises(HelixConfigError, match=r"without a tensor-parallel group \(tp\)"):
        HelixParallelSelfAttention(config, None, 1, pg_collection=empty, helix=HelixConfig(1, 4))


# ---- an engine that hands caches over ----
def test_handing_over_a_cache_of_sliced_heads_is_refused():
    """Where Megatron has such engines, integrate.enable puts the wrapper into them (test_integrate.py)."""
    calls = []

    class Engine:
        @dynamic_context.no_handoff
        def setup_kv_transfer(self, role, backend="nixl"):
            calls.append((role, backend))

    engine = Engine()
    engine.context = SimpleNamespace()  # of whole heads
    engine.setup_kv_transfer("prefill", backend="nccl")
    assert calls == [("prefill", "nccl")]
    engine.context.helix_step = None
    with pytest.raises(HelixConfigError, match=r"this one's role: decode.*sliced heads"):
        engine.setup_kv_transfer("decode")
    assert len(calls) == 1


def test_a_class_that_builds():
    built = compat.as_class(lambda size, *, bias: torch.nn.Linear(size, size, bias=bias))
    assert isinstance(built, type)
    module = built(3, bias=False)
    assert type(module) is torch.nn.Linear and module.bias is None


# ---- checkpoints, by megatron.core alone ----
def save_and_load_everywhere(folder: str) -> list[str]:
    """Save the same standard weights from every layout, load each in every other; what is not bit for bit."""
    from megatron.core import dist_checkpointing

    start(4)
    groups, rank, wrong = Groups(), torch.distributed.get_rank(), []
    case = Case(8, 4, 16, bias=True)
    case.draw()

    def make(helix):
        layer = make_layer(case, helix, 4, groups.of(helix.resolve(8, 4, 16, 4).grid) if helix else None)
        layout = (helix or HelixConfig(4, 1)).resolve(8, 4, 16, 4).layout
        return layer, layout.qkv_rows(rank), layout.proj_columns(rank)

    for name, helix in LAYOUTS.items():
        layer, rows, columns = make(helix)
        load(layer, case, rows, columns, torch.float32)
        path = f"{folder}/{name}"
        if rank == 0:
            os.mkdir(path)
        torch.distributed.barrier()
        dist_checkpointing.save(layer.sharded_state_dict(prefix="attention."), path)
        for other, target in LAYOUTS.items():
            layer, rows, columns = make(target)
            state = dist_checkpointing.load(layer.sharded_state_dict(prefix="attention."), path)
            qkv, proj, bias = (
                state[f"attention.{key}"]
                for key in ("linear_qkv.weight", "linear_proj.weight", "linear_qkv.bias")
            )
            same = (
                torch.equal(qkv, case.tensors["qkv_weight"][rows].float())
                and torch.equal(proj, case.tensors["proj_weight"][:, columns].float())
                and torch.equal(bias, case.tensors["qkv_bias"][rows].float())
            )
            wrong += [] if same else [f"{name} to {other}"]
    return wrong


def test_checkpoints_of_every_layout_load_in_every_other(tmp_path):
    assert run_ranks(save_and_load_everywhere, 4, str(tmp_path)) == [[]] * 4


# ---- a model built from Megatron's own pieces, without megatron.training ----
def train_a_model(tp: int, helix: HelixConfig | None) -> list[float]:
    """Losses of a GPTModel in eight steps of SGD on one batch; rounding grows two- to fourfold in each."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from helix_megatron.megatron import integrate

    if helix is not None:
        integrate.enable(helix, helix.resolve(6, 2, 8, tp).grid)
    start(tp)
    config = make_config(Case(6, 2, 8, hidden=48), tp, num_layers=2, use_cpu_initialization=True)
    torch.manual_seed(1)
    model = GPTModel(config, get_gpt_layer_local_spec(), 64, 16, position_embedding_type="rope")
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous()).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "helix",
    [HelixConfig(1, 4), HelixConfig(2, 2), HelixConfig(2, 1), HelixConfig(2, 2, slice_weights=(3, 1))],
)
def test_a_model_trains_as_on_one_rank(helix):
    alone = run_ranks(train_a_model, 1, 1, None)[0]
    assert alone[-1] < alone[0] - 0.2
    ranks = helix.head_parallel_size * helix.dim_parallel_size
    for losses in run_ranks(train_a_model, ranks, ranks, helix):
        assert losses == pytest.approx(alone, abs=1e-4)


def test_megatron_alone_refuses_that_model():
    with pytest.raises(RankError, match="must be a multiple"):
        run_ranks(train_a_model, 4, 4, None)


# ---- the dynamic engine ----
def dynamic_engine_refusal() -> str:
    start(2)
    case, helix = Case(8, 4, 16), HelixConfig(1, 2)
    case.draw()
    layer = make_layer(case, helix, 2, Groups().of(helix.resolve(8, 4, 16, 2).grid)).eval()
    context = SimpleNamespace(is_dynamic_batching=lambda: True, is_static_batching=lambda: False)
    try:
        with inferring():
            layer(case.tensors["hidden"].float(), None, inference_context=context)
    except HelixConfigError as error:
        return str(error)
    except AttributeError:
        return "served"
    return "ran"


def test_the_dynamic_engine_is_served_or_refused_by_name():
    expected = "served" if compat.megatron().dynamic_engine else "use the static context, or megatron-core"
    assert all(expected in message for message in run_ranks(dynamic_engine_refusal, 2))
