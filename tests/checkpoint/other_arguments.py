"""Every argument of Megatron 0.19 and 0.20 that leaves the function of a model's weights alone, and why.

With those of helix_megatron/checkpoint/model_arguments.py they are the arguments of Megatron's parser and the
fields of its TransformerConfig and MLATransformerConfig. An argument of a newer Megatron has to be sorted in
here before checkpoints are compared without it.
"""

# Reason why weights mean the same whatever these are → their names.
OTHER = {
    "another spelling, or derived: what it means is compared by another name":
        """mup_width_mult is_hybrid_model mtp_hybrid_override_pattern encoder_num_layers decoder_num_layers
        group_query_attention use_rotary_position_embeddings add_position_embedding
        make_vocab_size_divisible_by vocab_size pad_vocab_size heterogeneous_layers_config_path
        hybrid_override_pattern yaml_cfg""",
    "read by nothing in Megatron, or refused by it":
        """fp8_interval onnx_safe batch_size checkpoint_activations deprecated_use_mcore_models warmup
        model_parallel_size moe_token_dropping""",
    "floating point: the same function, rounded otherwise":
        """fp16 bf16 deterministic_mode fp32_residual_connection dsa_indexer_k_norm_fp32
        apply_query_key_layer_scaling disable_bf16_reduced_precision_matmul fp8 fp8_recipe
        fp8_quantizer_factory fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
        fp8_output_proj first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4
        fp4_recipe fp4_quantizer_factory moe_router_padding_for_quantization moe_router_padding_for_fp8
        moe_router_dtype batch_invariant_mode attention_softmax_in_fp32 mamba_training_ssm_states_dtype
        keep_fp8_transpose_cache mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
        fp4_param_gather fp8_param_gather te_precision_config_file params_dtype enable_autocast
        autocast_dtype pipeline_dtype activation_func_fp8_input_store fp8_param fp8_dot_product_attention
        fp8_multi_head_attention tp_only_amax_red use_kitchen fp4_param disable_parameter_transpose_cache
        quant_recipe
        logit_dtype moe_dispatch_fwd_dtype moe_combine_bwd_dtype
        gtp_remat_reduce_scatter_with_fp32_accumulation""",
    "GELU fused with its bias is its tanh form: within 5e-4, a kernel to Megatron":
        """bias_gelu_fusion""",
    "kernels, fusions and graphs: the same function computed otherwise":
        """cross_entropy_loss_fusion cross_entropy_fusion_impl attention_backend flash_attention_version
        dsa_kernel_backend use_fused_weighted_squared_relu fused_residual_rmsnorm
        use_kitchen_attention kitchen_attention_backend
        use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_grouped_gemm
        moe_single_grouped_weight moe_single_grouped_bias moe_pad_experts_for_cuda_graph_inference
        moe_permute_fusion moe_router_fusion enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph
        cuda_graph_impl inference_cuda_graph_scope clone_scatter_output_in_embedding
        use_mamba_mem_eff_path mlp_chunks_for_prefill mlp_chunks_for_training
        transformer_impl delay_offload_until_cuda_graph masked_softmax_fusion bias_dropout_fusion
        apply_rope_fusion use_flash_attn optimizer_cuda_graph no_persist_layer_norm
        gradient_accumulation_fusion rl_persist_cuda_graphs rl_training_cuda_graphs disable_jit_fuser
        mla_down_proj_fusion cuda_graph_scope_deprecated cuda_graph_modules
        inference_dynamic_batching_num_cuda_graphs decode_only_cuda_graphs
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution enable_experimental
        bias_activation_fusion persist_layer_norm memory_efficient_layer_norm fused_single_qkv_rope
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_scope
        use_inference_optimized_layers
        batch_invariant_backend gdp_cutedsl_kernel moe_use_grouped_tensor muon_use_syrk""",
    "memory: what is kept, recomputed or moved":
        """ep_overlap_early_attn_memory_release cpu_offloading_num_layers
        cpu_offloading_retain_pinned_cpu_buffers recompute_granularity recompute_method
        recompute_num_layers distribute_saved_activations recompute_modules moe_layer_recompute
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        delta_offload_bytes_across_pp_ranks activation_offload_fraction moe_paged_stash
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu fine_grained_offloading_max_inflight_offloads
        empty_unused_memory_level recompute_activations optimizer_cpu_offload
        num_microbatches_with_partial_activation_checkpoints deallocate_pipeline_outputs cpu_offloading
        _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering
        mhc_recompute_layer_num gdp_num_chunk_states_to_recompute""",
    "where and how the work is spread over ranks: parallel sizes, collectives, overlap":
        """tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_comm_backend
        pipeline_model_parallel_size sequence_parallel context_parallel_size
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
        expert_model_parallel_size expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend
        overlap_moe_expert_parallel_comm delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
        use_ring_exchange_p2p defer_embedding_wgrad_compute wgrad_deferral_limit
        overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage mtp_standalone
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        high_priority_a2a_comm_stream moe_token_dispatcher_type
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms
        moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy symmetric_ar_type
        tp_comm_overlap_cfg rl_inference_tensor_model_parallel_size
        rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size distributed_backend distributed_timeout_minutes
        align_grad_reduce local_rank lazy_mpu_init use_megatron_fsdp use_torch_fsdp2
        nccl_communicator_config_path use_tp_pp_dp_mapping use_gloo_process_groups use_sharp
        sharp_enabled_group high_priority_stream_groups distributed_timeout_seconds_after_init
        flight_recorder_dump_path flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout
        flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers pipeline_model_parallel_layout
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank overlap_p2p_comm
        overlap_grad_reduce ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw
        ddp_reduce_scatter_with_fp32_accumulation ddp_param_name_patterns_for_fp32_local_accumulation
        ddp_average_in_collective overlap_param_gather overlap_param_gather_with_optimizer_step
        align_param_gather use_distributed_optimizer use_layer_wise_param_layout nccl_ub
        disable_symmetric_registration fsdp_manual_registration create_all_gather_group
        data_parallel_sharding_strategy outer_dp_sharding_strategy gradient_reduce_div_fusion
        fsdp_double_buffer suggested_communication_unit_size enable_full_sharding_in_hsdp
        num_distributed_optimizer_instances torch_fsdp2_reshard_after_forward cp_comm_type
        fake_process_group gtp_weight_remat_size virtual_pipeline_model_parallel_size
        expert_gtp_weight_remat_size timers no_sync_func grad_sync_func param_sync_func tp_comm_atomic_ag
        tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 variable_seq_lengths
        batch_p2p_comm batch_p2p_sync num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        hetereogenous_dist_checkpoint
        gtp_expert_remat_nccl_ub gtp_remat_nccl_ub gtp_remat_opt_in_modules megatron_fsdp_version""",
    "regularisation of training: noise, dropout, dropped tokens":
        """hidden_dropout attention_dropout moe_input_jitter_eps moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_token_drop_policy moe_expert_rank_capacity_factor
        mtp_hsm""",
    "losses, and how gradients are scaled":
        """mtp_loss_scaling_factor mtp_detach_heads calculate_per_token_loss dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss moe_z_loss_coeff grad_reduce_in_bf16 loss_scale initial_loss_scale
        min_loss_scale loss_scale_window hysteresis accumulate_allreduce_grads_in_fp32
        fp16_lm_cross_entropy reuse_grad_buf_for_mxfp8_param_ag moe_aux_loss_coeff logits_save_top_k
        logits_save_top_p logits_save_top_p_min_k logits_save_dir logits_save_dtype logits_load_dir
        logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth
        logits_load_kd_loss_alpha logits_load_ignore_errors finalize_model_grads_func grad_scale_func
        moe_grad_scale_func mtp_grad_scale_func experimental_attention_variant_loss_scale_func""",
    "how weights begin, and how training changes them":
        """perform_initialization use_cpu_initialization qk_clip qk_clip_alpha qk_clip_threshold
        init_method_std embedding_init_method_std init_model_with_meta_device moe_router_bias_update_rate
        moe_router_quantile_balancing_ema weight_decay apply_wd_to_qk_layernorm clip_grad adam_beta1
        adam_beta2 adam_eps sgd_momentum muon_momentum muon_split_qkv muon_nesterov muon_scale_mode
        muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor
        muon_scalar_optimizer lion_beta1 lion_beta2 no_weight_decay_cond_type optimizer
        optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d
        dump_param_to_param_group_map pin_cpu_grads pin_cpu_params seed te_rng_tracker
        inference_rng_tracker data_parallel_random_init init_method_xavier_uniform lr_decay_style
        lr_wsd_decay_style lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
        lr_warmup_fraction lr_warmup_iters lr_warmup_samples lr_warmup_init override_opt_param_scheduler
        use_checkpoint_opt_param_scheduler start_weight_decay end_weight_decay weight_decay_incr_style lr
        min_lr decoupled_lr decoupled_min_lr freeze_all_layers moe_use_upcycling moe_upcycling_granularity
        use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
        megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
        megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
        fsdp_db_use_persist_buf_on_alloc_fail use_te_rng_tracker init_method output_layer_init_method
        embedding_init_method
        mhc_init_gating_factor""",
    "the training loop and its data: how much, in what order, how documents are cut and masked":
        """micro_batch_size global_batch_size rampup_batch_size step_batch_size_schedule
        decrease_batch_size_if_needed train_sync_interval train_iters train_samples exit_interval
        exit_duration_in_mins exit_signal_handler exit_signal exit_signal_handler_for_dataloader
        exit_signal_handler_for_training manual_gc manual_gc_interval manual_gc_eval iterations_to_skip
        dataloader_type perform_rl_step rl_prompts_per_eval grpo_prompts_per_step grpo_group_size
        rl_generation_lag rl_submission_granularity rl_consumption_granularity grpo_iterations
        grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature rl_default_top_p
        rl_default_top_k rl_offload_optimizer_during_inference rl_kv_cache_management_mode
        rl_partial_rollouts rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef
        rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo
        rl_inference_model_unified_memory_level rl_offload_inference_model_weights_when_idle refit_method
        rl_verify_model_weights_swap rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers
        eval_iters eval_interval start_eval_at_iter eval_global_batch_size eval_micro_batch_size
        skip_train full_validation multiple_validation_sets validation_set_names data_path
        phase_transition_iterations split train_data_path valid_data_path test_data_path data_args_path
        per_split_data_args_path per_dataset_sequences_path dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap data_cache_path mmap_bin_files mock_data seq_length
        encoder_seq_length decoder_seq_length sample_rate mask_prob short_seq_prob num_workers
        reset_position_ids reset_attention_mask dataloader_inter_document_masking eod_mask_loss
        create_attention_mask_in_dataloader num_dataset_builder_threads object_storage_cache_path
        mid_level_dataset_surplus allow_ambiguous_pad_tokens fim_data fim_rate fim_spm_rate
        fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token
        fim_suffix_token fim_pad_token fim_eod_token sft sft_tokenizer_prompt_format
        rl_durable_rollout_bank rl_max_inflight_requests rl_rollout_bank_dir
        rl_rollout_bank_max_bytes""",
    "which token ids a text becomes; weights are a function of ids":
        """vocab_file merge_file vocab_extra_ids tokenizer_type tokenizer_model metadata_path special_tokens
        tiktoken_pattern tiktoken_num_special_tokens tokenizer_sentencepiece_legacy
        tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast
        tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id
        null_tokenizer_pad_id chat_template
        use_gigatoken""",
    "checkpoints: where, when and in which format":
        """save save_interval save_params_interval save_activations_interval save_tokens_per_expert_interval
        save_wgrads_interval save_dgrads_interval save_retain_interval load load_main_params_from_ckpt
        non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo finetune pretrained_checkpoint
        ckpt_step use_checkpoint_args use_mp_args_from_checkpoint_args
        use_tokenizer_model_from_checkpoint_args exit_on_missing_checkpoint ckpt_format
        auto_detect_ckpt_format ckpt_convert_format ckpt_convert_save
        ckpt_convert_update_legacy_dist_opt_format ckpt_fully_parallel_save async_save async_strategy
        use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm
        ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo
        ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load_process_group
        ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity strict_fsdp_dtensor_load
        dist_ckpt_strictness dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable
        distrib_optim_fully_reshardable_mem_efficient replication replication_jump replication_factor
        verify_integrity stream_ckpt_dequant no_save_optim no_save_rng no_load_optim no_load_rng
        override_ckpt_iteration use_dist_ckpt_deprecated dist_ckpt_format_deprecated dist_ckpt_workers
        ckpt_fully_parallel_save_deprecated
        ckpt_drop_redundant_extra_state ckpt_fully_parallel_load_per_rank_objects
        ckpt_pg_tensors_cache_create ckpt_pg_tensors_cache_path save_tokenizer_assets""",
    "inference: batching, caches, kernels, the server":
        """flash_decode nccl_all_reduce_for_prefill inference_fuse_tp_communication
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type cache_mla_latents
        inference_batch_times_seqlen_threshold max_tokens_to_oom output_bert_embeddings bert_embedder_type
        use_legacy_static_engine inference_max_requests inference_max_seq_length
        inference_dynamic_batching inference_dynamic_batching_buffer_size_gb
        inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_mamba_memory_ratio
        inference_dynamic_batching_block_size inference_dynamic_batching_max_requests
        inference_dynamic_batching_max_tokens inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_track_generated_token_events
        inference_dynamic_batching_unified_memory_level enable_chunked_prefill num_speculative_tokens
        inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha
        inference_dynamic_batching_prefix_caching_mamba_gb inference_dynamic_batching_sampling_backend
        offset_sampling_seed_by_dp_rank inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_logprobs_mode inference_logging_step_interval
        inference_text_gen_server_logging inference_wandb_logging inference_coordinator_port
        inference_use_synchronous_zmq_collectives inference_disable_ep_consensus inference_shards
        inference_sampling_seed""",
    "models that are no GPT: BERT, retrieval, vision":
        """bert_binary_head ict_head_size biencoder_projection_dim biencoder_shared_query_context_model
        ict_load bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path
        retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path
        indexer_batch_size indexer_log_interval num_classes img_h img_w num_channels patch_dim
        classes_fraction data_per_class_fraction data_sharding head_lr_mult vision_pretraining
        vision_pretraining_type vision_backbone_type swin_backbone_type mask_type mask_factor
        iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size
        dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp
        dino_teacher_temp dino_warmup_teacher_temp_epochs""",
    "watching, logging, tests and restarts":
        """test_mode help moe_enable_routing_replay moe_per_layer_logging config_logger_dir profile
        profile_step_start profile_step_end use_pytorch_profiler pytorch_profiler_collect_shapes
        pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra profile_ranks
        record_memory_history memory_snapshot_path record_shapes nvtx_ranges
        check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
        check_for_nan_in_loss_and_grad check_for_large_grads result_rejected_tracker_filename
        adlr_autoresume adlr_autoresume_interval log_interval log_params_norm log_throughput log_progress
        timing_log_level timing_log_option tensorboard_dir tensorboard_log_interval tensorboard_queue_size
        log_timers_to_tensorboard log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard
        log_memory_to_tensorboard log_memory_interval log_device_memory_used log_num_zeros_in_grad
        log_max_attention_logit barrier_with_L1_time log_world_size_to_tensorboard wandb_project
        wandb_exp_name wandb_save_dir wandb_entity logging_level log_energy moe_routing_trace_path
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits
        moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights log_straggler
        straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup
        run_workload_inspector_server enable_one_logger one_logger_project one_logger_run_name
        one_logger_async app_tag_run_name app_tag_run_version inprocess_restart inprocess_max_iterations
        inprocess_monitor_thread_interval inprocess_monitor_process_interval
        inprocess_progress_watchdog_interval inprocess_heartbeat_interval inprocess_soft_timeout
        inprocess_hard_timeout inprocess_heartbeat_timeout inprocess_barrier_timeout
        inprocess_completion_timeout inprocess_last_call_wait inprocess_termination_grace_time
        inprocess_granularity inprocess_active_world_size inprocess_empty_cuda_cache enable_ft_package
        calc_ft_timeouts ft_num_warmup_iters error_injection_rate error_injection_type rerun_mode
        check_for_spiky_loss enable_msc disable_msc_deprecated fault_injector_ranks
        fault_injector_num_ranks fault_injector_fault_types fault_injector_fault_probabilities
        fault_injector_fault_delay fault_injector_delay_start_iteration fault_injector_mtti_seconds
        fault_injector_offset_seconds fault_injector_seed
        otel_enabled otel_service_name otel_span_groups""",
}  # fmt: skip

# Megatron → the arguments that it and newer ones have, or have no longer; all others are in every one.
NEW_IN = {
    "0.20": """gdp_num_householder enable_mhc_connections mhc_num_residual_streams mhc_sinkhorn_iterations
        logit_dtype moe_dispatch_fwd_dtype moe_combine_bwd_dtype
        gtp_remat_reduce_scatter_with_fp32_accumulation
        batch_invariant_backend gdp_cutedsl_kernel moe_use_grouped_tensor muon_use_syrk
        mhc_recompute_layer_num gdp_num_chunk_states_to_recompute gtp_expert_remat_nccl_ub gtp_remat_nccl_ub
        gtp_remat_opt_in_modules megatron_fsdp_version mtp_hsm ckpt_drop_redundant_extra_state
        ckpt_fully_parallel_load_per_rank_objects ckpt_pg_tensors_cache_create ckpt_pg_tensors_cache_path
        save_tokenizer_assets mhc_init_gating_factor otel_enabled otel_service_name otel_span_groups
        rl_durable_rollout_bank rl_max_inflight_requests rl_rollout_bank_dir rl_rollout_bank_max_bytes
        use_gigatoken""",
}
GONE_IN = {"0.20": "moe_ncclep_static_shape stream_ckpt_dequant"}
