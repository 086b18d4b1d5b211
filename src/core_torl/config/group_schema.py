"""What may stand in each config group, with its type; see core_torl.config.schema, which registers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class VariantConfig:
    _target_: str = MISSING
    lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    grad_clip: float = MISSING
    minibatch_size: int | None = MISSING
    microbatch_size: int = MISSING
    microbatch_tokens: int | None = MISSING
    update_epochs: int = MISSING
    skip_zero_advantage: bool = MISSING
    share_prompts: bool = MISSING
    first_step_gap: float | None = MISSING
    sync_gap: float | None = MISSING
    overlap: bool = MISSING
    max_excluded: float = MISSING
    max_aborted: float = MISSING


@dataclass
class TorlConfig(VariantConfig):
    tool_call_budget: int = MISSING
    void_turns: str = MISSING


@dataclass
class ReplacementConfig(VariantConfig):
    replaced: int = MISSING
    bonus: float = MISSING
    bonus_when: str = MISSING
    replace_policy: str = MISSING
    train_prompt: str = MISSING
    behaviour: str = MISSING
    require_success: bool = MISSING


@dataclass
class DivergenceConfig(VariantConfig):
    references: int = MISSING
    kl_lambda: float = MISSING
    lambda_right: float = MISSING
    lambda_wrong: float = MISSING
    teacher: str = MISSING
    direction: str = MISSING
    reduction: str = MISSING
    average_over: str = MISSING
    only_correct_teacher: bool = MISSING


@dataclass
class HybridConfig(ReplacementConfig, DivergenceConfig):
    rho: float = MISSING


@dataclass
class TriggerConfig:
    _target_: str = MISSING
    when: str = MISSING
    pass_rate: float = MISSING
    min_finished: int = MISSING
    skip_suspect: bool = MISSING


@dataclass
class InterventionConfig:
    _target_: str = MISSING


@dataclass
class SameSectionConfig(InterventionConfig):
    alone: str = MISSING


@dataclass
class FillerConfig(InterventionConfig):
    words: str = MISSING


@dataclass
class HintConfig(InterventionConfig):
    text: str = MISSING


@dataclass
class PrefixConfig(InterventionConfig):
    shortest: float = MISSING
    longest: float = MISSING


@dataclass
class LikelihoodConfig:
    _target_: str = MISSING
    normalize: str = MISSING
    kl_coef: float = MISSING
    kl_estimator: str = MISSING


@dataclass
class GRPOConfig:
    _target_: str = MISSING
    clip_low: float = MISSING
    clip_high: float = MISSING
    normalize: str = MISSING
    normalize_std: bool = MISSING
    advantage_eps: float = MISSING
    kl_coef: float = MISSING
    kl_estimator: str = MISSING
    entropy_coef: float = MISSING
    guided_ratio: str = MISSING
    shaping_gamma: float = MISSING
    correction: str = MISSING
    correction_level: str = MISSING
    correction_low: float = MISSING
    correction_high: float = MISSING


@dataclass
class CorrectnessConfig:
    _target_: str = MISSING
    correct: float = MISSING
    incorrect: float = MISSING
    exclude: list[str] = MISSING
    workers: int = MISSING
    timeout_s: float = MISSING
    wall_timeout_s: float = MISSING
    memory_mb: int = MISSING


@dataclass
class RandomRewardConfig(CorrectnessConfig):
    probability: float = MISSING


@dataclass
class TorlRewardConfig(CorrectnessConfig):
    executability: float = MISSING
    scope: str = MISSING


@dataclass
class TransformersSamplerConfig:
    _target_: str = MISSING
    engine: str = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    max_rows: int = MISSING
    stop: list[str] = MISSING
    copy_weights: bool = MISSING


@dataclass
class VllmSamplerConfig:
    _target_: str = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    max_rows: int = MISSING
    stop: list[str] = MISSING
    weights: str = MISSING
    dtype: str | None = MISSING
    max_model_len: int | None = MISSING
    block_size: int | None = MISSING
    gpu_memory_utilization: float = MISSING
    kv_cache_mb: int | None = MISSING
    enforce_eager: bool = MISSING
    sleep_level: int = MISSING
    seed: int = MISSING


@dataclass
class VllmServerSamplerConfig:
    _target_: str = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    stop: list[str] = MISSING
    urls: list[str] = MISSING
    replicas: int = MISSING
    weights: str = MISSING
    dtype: str | None = MISSING
    sync_dir: str | None = MISSING
    concurrency: int = MISSING
    timeout_s: float = MISSING
    retries: int = MISSING
    backoff_s: float = MISSING
    gpus: list[str] = MISSING
    port: int | None = MISSING
    tensor_parallel: int = MISSING
    data_parallel: int = MISSING
    max_model_len: int | None = MISSING
    block_size: int | None = MISSING
    gpu_memory_utilization: float = MISSING
    kv_cache_mb: int | None = MISSING
    enforce_eager: bool = MISSING
    colocated: bool = MISSING
    extra_args: list[str] = MISSING
    environment: dict[str, str] = MISSING
    log_dir: str = MISSING
    start_timeout_s: float = MISSING


@dataclass
class ObservationConfig:
    _target_: str = MISSING
    max_chars: int = MISSING
    error: str = MISSING
    no_output: str = MISSING
    time_limit: str = MISSING
    memory_limit: str = MISSING
    output_limit: str = MISSING


@dataclass
class ToolConfig:
    _target_: str = MISSING
    call_budget: int = MISSING
    block_policy: str = MISSING
    budget_notice: str = MISSING
    notice: str = MISSING
    observation: Any = MISSING


@dataclass
class PromptConfig:
    style: str = MISSING
    system: str = MISSING
    choice: str = MISSING
    open: str = MISSING
    concept: str = MISSING
    option: str = MISSING


@dataclass
class LoraConfig:
    rank: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    target_modules: Any = MISSING


@dataclass
class ModelConfig:
    _target_: str = MISSING
    path: str = MISSING
    revision: str | None = MISSING
    dtype: str = MISSING
    attention: str = MISSING
    gradient_checkpointing: bool = MISSING
    offload_reference: bool = MISSING
    quantization: str | None = MISSING
    max_prompt_tokens: int = MISSING
    max_new_tokens: int = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)


@dataclass
class ConceptWorldConfig:
    _target_: str = MISSING
    split: str = MISSING
    hold_out_sections: list[str] = MISSING
    hold_out_concepts: float = MISSING
    train_tags: list[str] = MISSING
    mastered_share: float = MISSING
    train_per_concept: int = MISSING
    test_per_concept: int = MISSING
    seed: int = MISSING


@dataclass
class CalculationWorldConfig:
    _target_: str = MISSING
    two_stage_share: float = MISSING
    train: int = MISSING
    test_per_stage: int = MISSING
    seed: int = MISSING


@dataclass
class CoreQuizzesConfig:
    _target_: str = MISSING
    path: str = MISSING
    latex: str = MISSING
    suspect: str = MISSING
    test_fraction: float = MISSING
    hold_out_sections: list[str] = MISSING
    on_bad_row: str = MISSING
    seed: int = MISSING


@dataclass
class TorlProblemsConfig:
    _target_: str = MISSING
    path: Any = MISSING
    test_path: Any = MISSING
    deduplicate_test: bool = MISSING
    deduplicate_train: bool = MISSING
    on_leakage: str = MISSING
    test_names: dict[str, str] = MISSING
    on_bad_row: str = MISSING
    test_fraction: float = MISSING
    seed: int = MISSING


@dataclass
class MathProblemsConfig(TorlProblemsConfig):
    question: Any = MISSING
    answer: str = MISSING
    answer_from: str = MISSING
    solution: str | None = MISSING
    source: str | None = MISSING
    config: str | None = MISSING
    split: str = MISSING
    test_split: str = MISSING
    revision: str | None = MISSING
    streaming: bool = MISSING
    limit: int | None = MISSING


@dataclass
class AugmentationConfig:
    _target_: str = MISSING
    permute_options: bool = MISSING
    redraw_operands: bool = MISSING


@dataclass
class EvaluationConfig:
    _target_: str = MISSING
    permutations: int = MISSING
    greedy: bool = MISSING
    samples: int = MISSING
    temperature: float = MISSING
    primed: bool = MISSING
    max_problems: int | None = MISSING
    confidence: float = MISSING
    seed: int = MISSING
    distractors: list[int] = MISSING
    max_prompt_tokens: int = MISSING


@dataclass
class TrainerConfig:
    accelerator: str = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    threads: int = MISSING


@dataclass
class CallbacksConfig:
    checkpoint_every: int = MISSING
    checkpoint_keep: int = MISSING
    progress: bool = MISSING
    samples_every: int = MISSING


@dataclass
class LoggerConfig:
    mode: str = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    job_type: str | None = MISSING
    tags: list[str] = MISSING
    name: str | None = MISSING
    sample_rows: int = MISSING
    system_metrics: bool = MISSING
    system_every_s: float = MISSING
    artifacts: list[str] = MISSING


@dataclass
class SubprocessLauncherConfig:
    _target_: str = MISSING
    n_jobs: int = MISSING
    gpus_per_job: int = MISSING
    gpus: list[str] | None = MISSING
    timeout_s: float = MISSING
    retries: int = MISSING
    grace_s: float = MISSING
    take_over: bool = MISSING
    view: bool = MISSING
    prefork: bool = MISSING


@dataclass
class PathsConfig:
    root: str = MISSING
    output_dir: str = MISSING


@dataclass
class SandboxConfig:
    _target_: str = MISSING


@dataclass
class ProcessSandboxConfig(SandboxConfig):
    workers: int | None = MISSING
    timeout_s: float = MISSING
    cpu_s: float = MISSING
    memory_mb: int = MISSING
    processes: int = MISSING
    file_mb: int = MISSING
    scratch_mb: int = MISSING
    output_bytes: int = MISSING
    retries: int = MISSING
    recycle_after: int = MISSING
    allow_unsafe: bool = MISSING


@dataclass
class SandboxFusionConfig(SandboxConfig):
    url: str | None = MISSING
    concurrency: int = MISSING
    timeout_s: float = MISSING
    memory_mb: int = MISSING
    output_bytes: int = MISSING
    retries: int = MISSING
    backoff_s: float = MISSING
    suspicion: int = MISSING
