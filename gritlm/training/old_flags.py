"""Flags of the original, of GritLM and of transformers 4 that are no flags here, and what to do in their place."""

# Of flags that take other values here: a hint after the values that are wanted.
OLD_VALUES = {"attn": "of GritLM's four letters, such as bbcc, use the first two: those of an embedding model"}

OLD_FLAGS: dict[str, str] = {
    "gc_chunk_size": "use --chunk_tokens: chunks are counted in tokens, the gradient is the same for any",
    **dict.fromkeys(
        ("split_emb", "split_emb_full"),
        "leave it out: queries and passages are always encoded in chunks, see --chunk_tokens",
    ),
    "no_emb_gas": "leave it out: a step is always one exact gradient of --global_batch_size queries",
    **dict.fromkeys(
        (
            "mode",
            "no_gen_gas",
            "generative_max_len",
            "per_device_generative_bs",
            "loss_gen_type",
            "loss_gen_factor",
            "prefixlm",
        ),
        "leave it out: only embedding models are trained, there is no generative loss",
    ),
    "use_unique_indices": "leave it out: an epoch uses each row once, see --num_samples",
    "config_name": "leave it out: the config comes with --model_name_or_path",
    "tokenizer_name": "leave it out: the tokenizer comes with --model_name_or_path",
    "cache_dir": "set HF_HOME for downloaded models; the folder of prepared data is --data_cache",
    "use_fused_adamw": "leave it out: --optim adamw_torch_fused is the default",
    "overwrite_output_dir": "leave it out: nothing is overwritten; delete the folder or name another",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "warmup_ratio": "use --warmup_steps: below 1 it is a share of all steps",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "use --use_cpu",
    "adafactor": "use --optim adafactor",
    "torchdynamo": "use --torch_compile",
    "per_gpu_train_batch_size": "use --global_batch_size: queries per step over all GPUs",
    **dict.fromkeys(("fp16_backend", "fp16_opt_level", "half_precision_backend"), "leave it out: use --bf16"),
    **dict.fromkeys(
        ("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
        "use --fsdp_config scripts/parallel/fsdp2.json",
    ),
    "group_by_length": "leave it out: the seed, the epoch and the step decide which rows form a batch",
    **dict.fromkeys(("dispatch_batches", "split_batches"), "leave it out: each rank builds its own slice of a batch"),
    "include_tokens_per_second": "leave it out: tokens_per_second is always logged",
    "evaluation_strategy": "use --eval_strategy",
    **dict.fromkeys(
        (
            "per_gpu_eval_batch_size",
            "include_inputs_for_metrics",
            "jit_mode_eval",
            "use_legacy_prediction_loop",
            "past_index",
        ),
        "leave it out: an evaluation encodes texts and measures their vectors; see --eval_data",
    ),
    **dict.fromkeys(
        ("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
        "leave it out: upload the finished folder with hf upload",
    ),
    **dict.fromkeys(
        ("use_mps_device", "use_ipex", "tpu_num_cores", "tpu_metrics_debug"),
        "leave it out: training runs on CUDA GPUs or on the CPU",
    ),
    "mp_parameters": "leave it out: see --fsdp and --deepspeed for models that do not fit on one GPU",
    "ray_scope": "leave it out: there is no hyper-parameter search",
}
