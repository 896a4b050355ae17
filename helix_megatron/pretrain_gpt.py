"""Train a GPT with nothing but the megatron-core wheel: no Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m helix_megatron.pretrain_gpt <Megatron flags> --attention-impl helix
    torchrun --nproc-per-node 8 -m helix_megatron.pretrain_gpt --helix-config run.yaml
    python -m helix_megatron.launch --nproc-per-node 4 -m helix_megatron.pretrain_gpt --helix-host-mode …

Causal language modelling with a dense model on `--data-path` or `--mock-data`. Every flag is Megatron's;
what this entry cannot do is refused by name. The same model trained by Megatron-LM's own pretrain_gpt.py
has the same losses.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from typing import Any

import torch

from helix_megatron.megatron import entry, yaml_config

# Attribute of Megatron's args → the flag that set it. Only pretrain_gpt.py of a checkout does these.
_UNSUPPORTED = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "logits_load_dir": "--logits-load-dir",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "perform_rl_step": "--perform-rl-step",
    "per_dataset_sequences_path": "--per-dataset-sequences-path",
    "inprocess_restart": "--inprocess-restart",
    "yaml_cfg": "--yaml-cfg",
}


def refuse_unsupported(args: Namespace) -> None:
    """ValueError naming the first given flag that this entry point cannot serve."""
    for name, flag in _UNSUPPORTED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"{flag} is not supported by helix_megatron.pretrain_gpt; run Megatron-LM's own script "
                "with it: -m helix_megatron.run Megatron-LM/pretrain_gpt.py."
            )


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """One micro-batch on this rank: TP rank 0 reads it and broadcasts it over its TP group.

    Returns tokens, labels, position_ids [b, s] (int64), loss_mask [b, s] (float) and attention_mask
    [b, 1, s, s] (bool) or None, cut to this rank's share of s under context parallelism. What a pipeline
    stage (vp_stage: the virtual one, or None) does not need is None.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    keys = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(keys)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in keys}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(None, args.mtp_num_layers, vp_stage=vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = {key: batch.get(key) for key in keys}
    cp_group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Summed token loss of a micro-batch, its token count, and both as Megatron's logger wants them.

    loss_mask, losses: [b, s]. Raises (through Megatron's rerun machine) on a NaN or infinite loss when
    `--check-for-nan-in-loss-and-grad` holds, which is Megatron's default.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=bad,
                message=f"found {name} in the loss of this rank's forward pass",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().reshape(1), tokens.reshape(1)])
    return loss, tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One forward pass as Megatron's schedules call it: (output, the function that makes it a loss)."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def dataset_provider(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test sets for `--mock-data` or `--data-path`, on the ranks that read them."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def reads_data() -> bool:
        first_in_tp_group = parallel_state.get_tensor_model_parallel_rank() == 0
        return first_in_tp_group and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, sample_counts, reads_data, config).build()


dataset_provider.is_distributed = True  # Megatron then calls it on every rank, and it decides who reads


def build_config() -> Any:
    """Parse and check sys.argv with Megatron's parser: the container `pretrain` takes.

    ValueError or AssertionError from Megatron or from here for flags that cannot work.
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args, parse_args

    refuse_unsupported(parse_args())
    args = parse_and_validate_args()
    return pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


def train(argv: list[str]) -> None:
    """Train with the given flags (after `entry.prepare_argv`); Megatron logs, saves and evaluates as told.

    ValueError for an unknown flag: Megatron's own refusal begins with its usage, a thousand lines.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    yaml_config.check_flags(argv)
    sys.argv = ["pretrain_gpt", *argv]
    pretrain(build_config(), dataset_provider, ModelType.encoder_or_decoder, forward_step)


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0, or 2 after a one-line refusal."""
    argv = sys.argv[1:] if argv is None else argv
    return entry.run_guarded(lambda: train(entry.prepare_argv(argv)), "helix_megatron.pretrain_gpt")


if __name__ == "__main__":
    sys.exit(main())
