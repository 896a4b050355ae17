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
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from helix_megatron import compat
from helix_megatron.checkpoint.compatibility import refuse_other_function, refuse_other_softmax
from helix_megatron.megatron import flag_values, weight_readers
from helix_megatron.megatron.arguments import (
    add_helix_arguments,
    helix_config_from_args,
    refuse_other_models,
)
from helix_megatron.megatron.checkpoint_reading import read_each_once
from helix_megatron.megatron.level_reductions import reduce_by_level
from helix_megatron.megatron.replacements import Replacements
from helix_megatron.megatron.run_settings import agree_with_other_ranks, plan_from_args, slices_from_args
from helix_megatron.partition import choice
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid

_installed, _enabled, _reading, _taught = (Replacements() for _ in range(4))
_active: HelixConfig | None = None


def install() -> None:
    """Teach Megatron's argument parser the Helix flags, whatever script calls it."""
    compat.need_training()
    if _installed:
        return
    from megatron.training import arguments, checkpointing

    def with_flags(original: Callable) -> Callable:
        @functools.wraps(original)
        def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
            if not isinstance(parser, flag_values.Parser):
                parser.error = flag_values.exit_in_one_line(parser)
            return add_helix_arguments(original(parser))

        return add_megatron_arguments

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
                refuse_other_models(args, slices_from_args(helix, args))
            validated = original(args, *rest, **kwargs)
            activate(args)
            return validated

        return validate_args

    _installed.replace(arguments, "add_megatron_arguments", with_flags)

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

    _installed.replace(arguments, "parse_args", then_guard)
    _installed.replace(arguments, "validate_args", then_activate)
    # Its first call reads the arguments alone; --finetune skips Megatron's own check of them, not this one.
    _installed.replace(checkpointing, "_load_base_checkpoint", of_the_same_model)


def read_checkpoints(verify: bool = True) -> None:
    """Have torch_dist checkpoints read in one verified pass; see checkpoint_reading.py."""
    if not _reading:
        read_each_once(_reading.replace, verify)


def teach_tools() -> None:
    """Have Megatron's tools that read a rank's weights know of sliced heads; see weight_readers.py.

    enable() and the layer specs do it. Call it on ranks that take part in resharding and use neither.
    """
    if not _taught:
        weight_readers.teach(_taught.replace)


def uninstall() -> None:
    """Undo install() and enable()."""
    disable()
    _reading.restore()
    _installed.restore()


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
        plan = plan_from_args(helix, args)
        enable(helix, plan.grid)
        # Into the checkpoint's arguments: what the weights mean, not how they are laid out.
        args.helix_sliced = not plan.is_megatron
        args.helix_slices_as_heads = plan.grid.dim_parallel_size if plan.layout.per_slice else 1
        if args.rank == 0:
            print(f"> Helix attention: {plan.describe()}", flush=True)
            chosen = helix.head_parallel_size is None and helix.dim_parallel_size is None
            if chosen and plan.comm_type == "a2a":
                _, reason = choice.choose_grid_with_reason(plan.layout.shape, plan.grid.size)
                print(f"> Helix chose grid {plan.grid}: {reason}", flush=True)
    agree_with_other_ranks(args, plan)


def enable(helix: HelixConfig, grid: HelixGrid | None = None) -> None:
    """Put Helix attention into Megatron's GPT and hybrid layer specs; heads need not divide by T then.

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

    from helix_megatron.inference import dynamic_context, warm_up
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
                m = slices_for(helix, config, compat.tensor_parallel_size(groups, config))
                if m > 1:
                    what = _kind_of_attention(self, config, given.get("attn_mask_type"))
                    raise HelixConfigError(
                        f"Helix does not slice the heads of {what}, which this grid needs (m = {m}): it "
                        "serves the self-attention of GPT's layer specs (local and Transformer Engine), "
                        "of the hybrid stack's and of specs made with helix_megatron.with_helix_attention; "
                        "use such a spec, --attention-impl megatron, or a grid with m = 1"
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
    _enabled.replace(gpt_layer_specs, "SelfAttention", lambda original: ConfiguredHelixAttention)
    if megatron.hybrid:  # one spec object, which every builder has imported by name: its contents change
        from megatron.core.dist_checkpointing import gpt_checkpoint_interop
        from megatron.core.models.hybrid import hybrid_layer_specs

        from helix_megatron.checkpoint.layout import accept_pieces

        attention = hybrid_layer_specs.hybrid_stack_spec.submodules.attention_layer.submodules.self_attention
        _enabled.replace(attention, "module", lambda original: ConfiguredHelixAttention)
        _enabled.replace(gpt_checkpoint_interop, "_prepend_gpt_layer_axis", accept_pieces)
    _enabled.replace(Attention, "__init__", only_helix)
    _enabled.replace(TransformerConfig, "__post_init__", lambda original: _relaxed(original, helix))
    if megatron.dynamic_engine:
        sliced = functools.partial(dynamic_context.sliced_context, helix=helix)
        _enabled.replace(DynamicInferenceContext, "__init__", sliced)
        from megatron.core.inference.model_inference_wrappers import abstract_model_inference_wrapper

        wrapper = abstract_model_inference_wrapper.AbstractModelInferenceWrapper
        _enabled.replace(wrapper, "__init__", warm_up.then_warm_up)
    if megatron.handoff:
        from megatron.core.inference.disaggregation.inference_state_handoff import InferenceStateHandoffMixin

        _enabled.replace(InferenceStateHandoffMixin, "setup_kv_transfer", dynamic_context.no_handoff)
    _enabled.replace(parallel_state, "initialize_model_parallel", with_groups)
    _enabled.replace(parallel_state, "destroy_model_parallel", without_groups)
    if helix.hierarchical_allreduce:
        reduce_by_level(_enabled.replace)


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


def disable() -> None:
    """Undo enable(). Models built meanwhile keep working."""
    global _active
    _enabled.restore()
    _taught.restore()
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
