"""Mask tensors on Transformer Engine's core: what its kernels make of them without Helix, or a refusal."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from helix_megatron.check.reference import Case, reference
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron.masks import hidden_from_scores, rows_of_chunk
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.layout import global_chunks, position_chunks
from tests.megatron_glue.layer_worker import Groups, all_settings, errors, load, make_layer, run, start

SHAPES = ((8, 2), (9, 3), (3, 1))  # whole query heads and shared positions
WINDOWS = (None, (4, 0))


def _documents(tp: int, jobs: list) -> list[tuple[str, float]]:
    """Largest error of layers on a core that reads the mask, or that ignores it."""
    start(tp)
    groups, found = Groups(), []
    rank = torch.distributed.get_rank()
    for case, helix, kernel in jobs:
        case.draw()
        layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
        layer = make_layer(case, helix, tp, groups.of(layout.grid), te_core=kernel)
        rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        load(layer, case, rows, columns, torch.float32)
        expected = reference(case if kernel == "unfused" else replace(case, mask="causal"))
        off = errors(run(layer, case, tp), expected, rows, columns)
        found.append((f"{replace(case, tensors={})} {helix} {kernel}", max(off.values())))
    return found


def test_each_kernel_does_with_documents_what_it_does_without_helix():
    jobs = []
    for shape in SHAPES:
        for window in WINDOWS:
            case = Case(*shape, 16, window=window, mask="documents")
            for helix in all_settings(case, 4, cores=("auto",)):
                jobs.append((case, helix, "unfused"))
                if helix.comm_type == "a2a":  # in fp32 Transformer Engine has no other kernel
                    jobs.append((case, helix, "flash"))
    assert len(jobs) > 30
    for rank in run_ranks(_documents, 4, 4, jobs):
        for label, error in rank:
            assert error < 1e-5, (label, error)


def _refused(tp: int, jobs: list) -> list[str]:
    start(tp)
    groups, found = Groups(), []
    for case, helix in jobs:
        case.draw()
        layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
        layer = make_layer(case, helix, tp, groups.of(layout.grid), te_core="unfused")
        try:
            run(layer, case, tp)
            found.append("")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_masks_that_cannot_be_served_are_refused_by_name():
    shared, summed = HelixConfig(1, 2), HelixConfig(1, 2, comm_type="all_reduce")
    jobs = {
        "padding masks are not supported for a share": (Case(3, 1, 16, mask="padding"), shared),
        "sliding windows with arbitrary attention": (Case(3, 1, 16, mask="arbitrary", window=(4, 0)), shared),
        "sliding windows with no_mask attention": (Case(3, 1, 16, mask="none", window=(4, 0)), shared),
        "padding masks are not served by summed scores": (Case(8, 2, 16, mask="padding"), summed),
    }
    for rank in run_ranks(_refused, 2, 2, list(jobs.values())):
        for message, said in zip(jobs, rank, strict=True):
            assert message in said


CAUSAL = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
DOCUMENTS = CAUSAL | (torch.arange(8)[:, None] >= 3) & (torch.arange(8)[None, :] < 3)


def _hidden(mask, mask_type="causal", window=None, te=torch.float32, shape=(8, 8)):
    return hidden_from_scores(mask, AttnMaskType[mask_type], window, shape, torch.device("cpu"), te)


def test_summed_scores_hide_what_each_core_hides():
    column = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    column[..., 2] = True
    window = _hidden(None, window=(2, 0))
    assert torch.equal(_hidden(column), CAUSAL | column)  # Transformer Engine: both
    assert torch.equal(_hidden(column, te=None), column)  # Megatron's local core: the tensor
    assert torch.equal(_hidden(DOCUMENTS, window=(2, 0)), window | DOCUMENTS)
    assert torch.equal(_hidden(DOCUMENTS, window=(2, 0), te=None), window)
    assert torch.equal(_hidden(None), CAUSAL) and torch.equal(_hidden(None, te=None), CAUSAL)
    assert torch.equal(_hidden(DOCUMENTS, "arbitrary", te=torch.bfloat16), DOCUMENTS)
    assert _hidden(DOCUMENTS, "no_mask") is None and torch.equal(
        _hidden(DOCUMENTS, "no_mask", te=None), DOCUMENTS
    )


def test_in_half_precision_a_mask_counts_only_where_the_kernel_is_known(monkeypatch):
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    half = torch.bfloat16
    for _ in range(2):  # the answer is kept with the tensor
        with pytest.raises(NotImplementedError, match="--attention-backend unfused"):
            _hidden(DOCUMENTS.clone(), te=half)
        assert torch.equal(_hidden(CAUSAL, te=half), CAUSAL)
    window = _hidden(None, window=(2, 0))
    assert torch.equal(_hidden(window | CAUSAL, te=half, window=(2, 0)), window)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(NotImplementedError):
        _hidden(DOCUMENTS, te=half)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert torch.equal(_hidden(DOCUMENTS, te=half), DOCUMENTS)


@pytest.mark.parametrize("owners", [1, 3])
def test_rows_of_a_chunk_are_those_of_its_positions(owners):
    """Row p of the whole mask says p, in every column: a rank holds the rows of its own positions."""
    length = 24
    whole = torch.arange(length * owners)[:, None].expand(-1, length * owners)[None, None]
    for owner in range(owners):
        shares = position_chunks(length * owners, owner, owners)
        held = torch.cat([whole[:, :, begin:end] for begin, end in shares], dim=2)
        for part in range(2):
            for begin, end in global_chunks(length, part, 2, owner, owners):
                rows = rows_of_chunk(held, (begin, end), shares, end)
                assert rows.shape == (1, 1, end - begin, end)
                assert rows[0, 0, :, 0].tolist() == list(range(begin, end))
    assert rows_of_chunk(held[:, :, :1], (3, 5), shares, 5).shape == (1, 1, 1, 5)
