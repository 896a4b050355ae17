"""The one place that touches Megatron: explicit, guarded by its version, idempotent, undoable.

    install()                give Megatron's argument parser the Helix flags; when they ask for Helix,
                             Megatron's validated arguments switch it on
    enable(helix, grid)      the switch itself, for code that builds models without Megatron's arguments
    read_checkpoints()       read checkpoints in one verified pass (install() does it for Helix runs)
    teach_tools()            tell Megatron's tools that read weights of sliced heads (enable() does it)
    uninstall() / disable()  put everything back

With `--attention-impl megatron` nothing of Megatron's model code is changed.
"""

from __future__ import annotations

import functools
import inspect
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron import compat
from helix_megatron.checkpoint.compatibility import refuse_other_function, refuse_other_softmax
from helix_megatron.megatron import weight_readers
from helix_megatron.megatron.arguments import (
    add_helix_arguments,
    helix_config_from_args,
    refuse_other_models,
)
from helix_megatron.partition import choice
from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.grid import HelixConfigError, HelixGrid, legal_grids
from helix_megatron.partition.tensor_sizes import refuse_indivisible

_installed: list[tuple[Any, str, Any]] = []  # (object, attribute, original)
_enabled: list[tuple[Any, str, Any]] = []
_reading: list[tuple[Any, str, Any]] = []
_taught: list[tuple[Any, str, Any]] = []
_active: HelixConfig | None = None
_store: Any = None  # rank 0 serves the rendezvous store as long as this lives


def _replace(undo: list[tuple[Any, str, Any]], target: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(target, name)
    undo.append((target, name, original))
    setattr(target, name, wrap(original))


def _restore(undo: list[tuple[Any, str, Any]]) -> None:
    while undo:
        target, name, original = undo.pop()
        setattr(target, name, original)


def install() -> None:
    """Teach Megatron's argument parser the Helix flags, whatever script calls it."""
    compat.need_training()
    if _installed:
        return
    from megatron.training import arguments, checkpointing

    def with_flags(original: Callable) -> Callable:
        return functools.wraps(original)(lambda parser: add_helix_arguments(original(parser)))

    def then_guard(original: Callable) -> Callable:
        @functools.wraps(original)
        def parse_args(*rest: Any, **kwargs: Any) -> Namespace:
            args = original(*rest, **kwargs)
            if args.attention_impl == "helix":
                read_checkpoints(verify=not args.helix_no_verify_checkpoint)
            return args

        return parse_args

    def then_activate(original: Callable) -> Callable:
        @functools.wraps(original)
        def validate_args(args: Namespace, *rest: Any, **kwargs: Any) -> Namespace:
            helix = helix_config_from_args(args)
            if helix is not None:  # cheap refusals first
                refuse_other_models(args, _slices_from_args(helix, args))
            validated = original(args, *rest, **kwargs)
            activate(args)
            return validated

        return validate_args

    _replace(_installed, arguments, "add_megatron_arguments", with_flags)

    def of_the_same_model(original: Callable) -> Callable:
        @functools.wraps(original)
        def _load_base_checkpoint(
            load_dir: str, args: Namespace, rank0: bool = False, *rest: Any, **kwargs: Any
        ) -> Any:
            loaded = original(load_dir, args, rank0, *rest, **kwargs)
            saved = (loaded[0] or {}).get("args")
            helix_loads = args.attention_impl == "helix" and not rank0  # rank0: --use-checkpoint-args reads
            if saved is not None:
                refuse_other_softmax(saved, args)
                if helix_loads:
                    refuse_other_function(saved, args)
            elif loaded[0] and helix_loads and args.rank == 0:
                print("> Helix warning: the checkpoint holds no arguments, so whether its weights mean this "
                      "model is not known", flush=True)  # fmt: skip
            standard = args.ckpt_format == "torch_dist" and loaded[3] is checkpointing.CheckpointType.GLOBAL
            if loaded[0] and getattr(args, "helix_sliced", False) and not standard:
                raise HelixConfigError(
                    f"{load_dir} is not a torch_dist checkpoint; its shards are whole heads of one layout, "
                    "which slices of heads cannot be read from. Convert it with --attention-impl megatron "
                    "and --ckpt-convert-format torch_dist"
                )
            return loaded

        return _load_base_checkpoint

    _replace(_installed, arguments, "parse_args", then_guard)
    _replace(_installed, arguments, "validate_args", then_activate)
    # Its first call reads the arguments alone; --finetune skips Megatron's own check of them, not this one.
    _replace(_installed, checkpointing, "_load_base_checkpoint", of_the_same_model)


def read_checkpoints(verify: bool = True) -> None:
    """Have torch_dist checkpoints read as integrity.py reads them: each stored tensor once, and verified."""
    if _reading:
        return
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.api import CheckpointException

    from helix_megatron.checkpoint import integrity

    def index_first(original: Callable) -> Callable:  # Megatron reads the arguments before the weights
        @functools.wraps(original)
        def load_common_state_dict(checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
            integrity.current_metadata(Path(checkpoint_dir))
            return original(checkpoint_dir, *args, **kwargs)

        return load_common_state_dict

    def each_once(original: Callable, agree: bool = True) -> Callable:
        @functools.wraps(original)
        def _get_filesystem_reader(*args: Any, **kwargs: Any) -> Any:
            reader = original(*args, **kwargs)
            if isinstance(reader, FileSystemReader):  # other storage has its own reader
                reader.read_data = functools.partial(
                    integrity.read_shards, reader, verify=verify, agree=agree
                )
                if verify:
                    reader.read_metadata = functools.partial(integrity.metadata_of, reader)
            return reader

        return _get_filesystem_reader

    def in_plain_words(original: Callable) -> Callable:
        @functools.wraps(original)
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except CheckpointException as error:  # torch's, of every rank's failures
                for failure, _ in error.failures.values():
                    if isinstance(failure, integrity.CheckpointError):
                        raise failure from None
                raise
            finally:
                integrity.forget_metadata()

        return load

    if verify:
        _replace(_reading, dist_checkpointing, "load_common_state_dict", index_first)
        _replace(_reading, dist_checkpointing, "load_common_state_dict", in_plain_words)
    _replace(_reading, torch_strategy, "_get_filesystem_reader", each_once)
    if hasattr(serialization, "_get_filesystem_reader"):  # of arguments and counters; one rank may read alone
        alone = functools.partial(each_once, agree=False)
        _replace(_reading, serialization, "_get_filesystem_reader", alone)
    _replace(_reading, dist_checkpointing, "load", in_plain_words)


def teach_tools() -> None:
    """Have Megatron's tools that read a rank's weights know of sliced heads; see weight_readers.py.

    enable() and the layer specs do it. Call it on ranks that take part in resharding and use neither.
    """
    if not _taught:
        weight_readers.teach(functools.partial(_replace, _taught))


def uninstall() -> None:
    """Undo install() and enable()."""
    disable()
    _restore(_reading)
    _restore(_installed)


def activate(args: Namespace) -> None:
    """Switch Helix on as Megatron's validated arguments ask; agree on them with the other ranks.

    No process group exists yet.

    Raises:
        HelixConfigError: the settings cannot work, or differ between ranks.
    """
    from helix_megatron.host.mode import host_mode_enabled

    if args.helix_host_mode and not host_mode_enabled():
        raise HelixConfigError(
            "--helix-host-mode acts before Megatron is imported; start the script with "
            "`-m helix_megatron.run SCRIPT` or use `-m helix_megatron.pretrain_gpt`"
        )
    helix = helix_config_from_args(args)
    plan = None
    if helix is not None:
        plan = _plan_from_args(helix, args)
        enable(helix, plan.grid)
        # Into the checkpoint's arguments: what the weights mean, not how they are laid out.
        args.helix_sliced = not plan.is_megatron
        args.helix_slices_as_heads = plan.grid.dim_parallel_size if plan.layout.per_slice else 1
        if args.rank == 0:
            print(f"> Helix attention: {plan.describe()}", flush=True)
            chosen = helix.head_parallel_size is None and helix.dim_parallel_size is None
            if chosen and plan.comm_type == "a2a":
                _, reason = choice.choose(plan.layout.shape, plan.grid.size)
                print(f"> Helix chose grid {plan.grid}: {reason}", flush=True)
    _agree_with_other_ranks(args, plan)


def _kv_heads(args: Namespace) -> int:
    """As TransformerConfig sees them: without --group-query-attention every query head has its own."""
    shared = args.group_query_attention and not args.multi_latent_attention
    return args.num_query_groups if shared else args.num_attention_heads


def _slices_from_args(helix: HelixConfig, args: Namespace) -> int:
    """m by arguments that Megatron has not validated; 1 where they do not say enough."""
    from helix_megatron.partition.derived import slices_for

    if not args.num_attention_heads or not (args.kv_channels or args.hidden_size):
        return 1
    shape = Namespace(**{**vars(args), "num_query_groups": _kv_heads(args)})
    return slices_for(helix, shape, args.tensor_model_parallel_size)


def _plan_from_args(helix: HelixConfig, args: Namespace) -> HelixPlan:
    from helix_megatron.megatron.masks import te_is_unfused
    from helix_megatron.megatron.refusals import refuse_unsupported

    plan = helix.resolve(
        args.num_attention_heads,
        _kv_heads(args),
        args.kv_channels,
        args.tensor_model_parallel_size,
        args.rotary_interleaved,
        getattr(args, "attention_output_gate", False),
    )
    refuse_other_models(args, plan.grid.dim_parallel_size)
    if not (args.spec or args.heterogeneous_layers_config_encoded_json):  # whose sizes are their own
        even = plan.layout.per_slice
        refuse_indivisible(args, lambda tp: bool(legal_grids(plan.layout.shape, tp, even)))
    if plan.is_megatron:
        return plan
    refuse_unsupported(args, plan)
    saves = bool(args.save or args.load or args.pretrained_checkpoint)
    by_level = args.helix_hierarchical_allreduce
    unfused = args.attention_backend.name == "unfused" or te_is_unfused(args.params_dtype)
    unsafe = {
        "--reset-attention-mask in half precision with --helix-comm-type all_reduce and --transformer-impl "
        "transformer_engine, whose flash and fused kernels ignore that mask where its unfused one obeys it "
        "(say --attention-backend unfused, or use a2a)": (
            args.reset_attention_mask
            and plan.comm_type == "all_reduce"
            and args.transformer_impl == "transformer_engine"
            and not unfused
        ),
        "--helix-hierarchical-allreduce with --transformer-impl transformer_engine, whose layers reduce by "
        "themselves (use local)": by_level and args.transformer_impl != "local",
        "--helix-hierarchical-allreduce with --tp-comm-overlap, which overlaps the flat collectives": (
            by_level and args.tp_comm_overlap
        ),
        f"--ckpt-format {args.ckpt_format} (slices mean nothing to another layout; use torch_dist)": (
            saves and args.ckpt_format != "torch_dist"
        ),
        f"--ckpt-convert-format {args.ckpt_convert_format} (slices mean nothing to another layout; convert "
        "with --attention-impl megatron)": args.ckpt_convert_format not in (None, "torch_dist"),
        "--non-persistent-ckpt-type local (use global)": args.non_persistent_ckpt_type == "local",
        f"--optimizer {args.optimizer}, which treats the QKV weight as whole heads (use adam)": (
            args.optimizer not in ("adam", "sgd", "lion")
        ),
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
    }
    for what, used in unsafe.items():
        if used:
            raise HelixConfigError(f"Helix grid {plan.grid} slices heads (m > 1) and does not support {what}")
    return plan


def _agree_with_other_ranks(args: Namespace, plan: HelixPlan | None) -> None:
    global _store
    if args.world_size <= 1 or "MASTER_ADDR" not in os.environ:
        return
    from torch.distributed import rendezvous

    from helix_megatron.exchange.groups import agree

    names = (
        "attention_impl helix_softmax tensor_model_parallel_size pipeline_model_parallel_size "
        "context_parallel_size num_layers hidden_size num_attention_heads num_query_groups kv_channels "
        "seq_length micro_batch_size global_batch_size world_size"
    ).split()
    settings = {name: getattr(args, name, None) for name in names}
    settings["helix hierarchical all-reduce"] = args.helix_hierarchical_allreduce
    if plan is not None:
        settings["helix grid"] = str(plan.grid)
        settings["helix slices"] = ", ".join(map(str, plan.layout.all_slice_dims))
        settings["helix comm type"] = plan.comm_type
        settings["helix query placement"] = plan.layout.query_placement
        settings["helix KV cache"] = f"{plan.kv_cache}, interleave size {plan.kv_interleave_size}"
        settings["helix adaptive gradient scaling"] = plan.adaptive_grad_scaling
        settings["helix overlap"] = f"chunks {plan.overlap_chunks}, exchange {plan.overlap_exchange}"
        settings["helix exchange again"] = plan.recompute_exchange
    _store, rank, world_size = next(iter(rendezvous("env://")))
    agree(settings, _store, rank, world_size)


def enable(helix: HelixConfig, grid: HelixGrid | None = None) -> None:
    """Put Helix attention into Megatron's GPT layer specs and relax the check that heads divide by T.

    Args:
        helix: settings for every self-attention layer built from now on.
        grid: when given, Megatron's `initialize_model_parallel` makes the grid's process groups too;
            otherwise call `process_groups.initialize_helix_parallel` yourself.

    Raises:
        RuntimeError: Helix is on with other settings; call disable() first.
    """
    global _active
    megatron = compat.megatron()
    if _enabled:
        if helix != _active:
            raise RuntimeError(
                f"Helix is on with {_active}; call integrate.disable() before enabling {helix}"
            )
        return
    from megatron.core import parallel_state
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron.inference import contexts
    from helix_megatron.megatron import process_groups
    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention
    from helix_megatron.partition.derived import slices_for

    class ConfiguredHelixAttention(HelixParallelSelfAttention):
        """HelixParallelSelfAttention with the settings given to enable()."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{"helix": helix, **kwargs})

    def only_helix(original: Callable) -> Callable:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(self, HelixParallelSelfAttention):
                given = inspect.signature(original).bind(self, *args, **kwargs).arguments
                config, groups = given["config"], given.get("pg_collection")
                tp = getattr(groups, "tp", None)
                m = slices_for(helix, config, tp.size() if tp else config.tensor_model_parallel_size)
                if m > 1:
                    what = _kind_of_attention(self, config, given.get("attn_mask_type"))
                    raise HelixConfigError(
                        f"Helix does not slice the heads of {what}, which this grid needs (m = {m}): it "
                        "serves the self-attention of GPT's layer specs (local and Transformer Engine) and "
                        "of specs made with helix_megatron.with_helix_attention; use such a spec, "
                        "--attention-impl megatron, or a grid with m = 1"
                    )
            original(self, *args, **kwargs)

        return __init__

    def with_groups(original: Callable) -> Callable:
        @functools.wraps(original)
        def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if grid is not None and grid.dim_parallel_size > 1:
                given = inspect.signature(original).bind(*args, **kwargs).arguments
                tp_group = parallel_state.get_tensor_model_parallel_group()
                settings = process_groups.settings_of_groups(**given)
                process_groups.initialize_helix_parallel(grid, tp_group, *settings)
            return result

        return initialize_model_parallel

    def without_groups(original: Callable) -> Callable:
        @functools.wraps(original)
        def destroy_model_parallel() -> None:
            process_groups.destroy_helix_parallel()
            original()

        return destroy_model_parallel

    _active = helix
    teach_tools()
    _replace(_enabled, gpt_layer_specs, "SelfAttention", lambda original: ConfiguredHelixAttention)
    _replace(_enabled, Attention, "__init__", only_helix)
    _replace(_enabled, TransformerConfig, "__post_init__", lambda original: _relaxed(original, helix))
    if megatron.dynamic_engine:
        sliced = functools.partial(contexts.sliced_context, helix=helix)
        _replace(_enabled, DynamicInferenceContext, "__init__", sliced)
    _replace(_enabled, parallel_state, "initialize_model_parallel", with_groups)
    _replace(_enabled, parallel_state, "destroy_model_parallel", without_groups)
    if helix.hierarchical_allreduce:
        _reduce_by_level()


def _kind_of_attention(attention: Any, config: Any, mask_type: Any) -> str:
    """What an attention of Megatron's that is not Helix's belongs to, in words."""
    from megatron.core.transformer.attention import CrossAttention
    from megatron.core.transformer.enums import AttnMaskType

    name = type(attention).__name__
    if getattr(config, "experimental_attention_variant", None):
        return f"an experimental attention variant, {config.experimental_attention_variant} ({name})"
    if getattr(config, "multi_latent_attention", False):
        return f"multi-latent attention ({name})"
    if isinstance(attention, CrossAttention):
        return f"cross-attention ({name})"
    if getattr(config, "heterogeneous_block_specs", False):
        return f"a heterogeneous model's layer spec ({name})"
    if getattr(config, "is_hybrid_model", False):
        return f"a hybrid model's layer spec ({name})"
    if mask_type is AttnMaskType.padding:
        return f"attention with padding masks, as in BERT's layer spec ({name})"
    if mask_type is AttnMaskType.no_mask:
        return f"attention without a mask, as in a vision model's layer spec ({name})"
    return f"a layer spec of another kind, or made while Helix was off ({name})"


def _reduce_by_level() -> None:
    """Have the tensor-parallel collectives of Megatron's own layers run level by level (levels.py).

    They are those of mappings.py, and of the linear layer's autograd function, which has its own all-gather
    and reduce-scatter, and an overlapped all-reduce that is left to mappings.py instead.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, mappings

    from helix_megatron.exchange import levels
    from helix_megatron.megatron.process_groups import get_helix_groups

    def in_tensor_parallel_group(group: Any) -> bool:
        return group is parallel_state.get_tensor_model_parallel_group()

    def reduce(original: Callable) -> Callable:
        @functools.wraps(original)
        def _reduce(input_: Any, group: Any) -> Any:
            if not in_tensor_parallel_group(group):
                return original(input_, group)
            return levels.all_reduce(input_, get_helix_groups())

        return _reduce

    def by_level(function: Callable) -> Callable:
        def wrap(original: Callable) -> Callable:
            @functools.wraps(original)
            def collective(output: Any, source: Any, group: Any = None, async_op: bool = False) -> Any:
                if not in_tensor_parallel_group(group):
                    return original(output, source, group=group, async_op=async_op)
                return function(output, source, get_helix_groups())

            return collective

        return wrap

    def without_overlap(original: Callable) -> Callable:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if self.allreduce_dgrad and in_tensor_parallel_group(self.tp_group):
                self.allreduce_dgrad = False  # its input then goes through mappings.py instead

        return __init__

    _replace(_enabled, mappings, "_reduce", reduce)
    for module in (mappings, layers):
        _replace(_enabled, module, "dist_all_gather_func", by_level(levels.all_gather))
        _replace(_enabled, module, "dist_reduce_scatter_func", by_level(levels.reduce_scatter))
    _replace(_enabled, layers.ColumnParallelLinear, "__init__", without_overlap)


def disable() -> None:
    """Undo enable(). Models built meanwhile keep working."""
    global _active
    _restore(_enabled)
    _restore(_taught)
    _active = None


def _relaxed(post_init: Callable, helix: HelixConfig) -> Callable:
    """TransformerConfig's checks with "H and G divide by T" replaced by "the grid is legal".

    Megatron checks num_attention_heads and num_query_groups against the tensor-parallel size; while it
    does, they read as those of the derived model (H*m and G*m), which divide exactly when the grid is
    legal. Afterwards the configuration says H, G and d again. What RoPE asks of slices is not known here, and
    is asked where a layer is built.
    """

    @functools.wraps(post_init)
    def __post_init__(self: Any) -> None:
        from helix_megatron.partition.derived import slices_for

        # Multi-latent attention is never sliced; a layer of it says so where it would have to be.
        m = 1 if self.multi_latent_attention else slices_for(helix, self, self.tensor_model_parallel_size)
        if m == 1:
            return post_init(self)
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.kv_channels is None:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        heads, query_groups = self.num_attention_heads, self.num_query_groups
        self.num_attention_heads, self.num_query_groups = heads * m, query_groups * m
        try:
            post_init(self)
        finally:
            self.num_attention_heads, self.num_query_groups = heads, query_groups

    return __post_init__
