"""What may stand in each config group, with its type. The YAML files hold the values and say what each key means.

Hydra merges a group's YAML into its dataclass, so an unknown key or a wrong type fails while the config is composed,
before anything heavy is imported. tests/config/test_schema.py holds each dataclass against the constructor that reads
it.
"""

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
    update_epochs: int = MISSING
    skip_zero_advantage: bool = MISSING
    share_prompts: bool = MISSING
    first_step_gap: float | None = MISSING
    max_excluded: float = MISSING


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


@dataclass
class PathsConfig:
    root: str = MISSING
    output_dir: str = MISSING


@dataclass
class _Shared:
    """Groups that every front door of a policy needs."""

    trusted_targets: list[str] = MISSING
    reward: Any = MISSING
    sampler: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    evaluation: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    paths: Any = MISSING


@dataclass
class TrainConfig(_Shared):
    seed: int = MISSING
    rl_steps: int = MISSING
    group_size: int = MISSING
    prompts_per_step: int = MISSING
    dry_run: bool = MISSING
    resume: str | None = MISSING
    evaluate_every: int = MISSING
    export: bool = MISSING
    token_budget: int | None = MISSING
    trigger: Any = MISSING
    intervention: Any = MISSING
    variant: Any = MISSING
    objective: Any = MISSING
    augmentation: Any = MISSING
    callbacks: Any = MISSING


@dataclass
class EvaluateConfig(_Shared):
    checkpoint: str | None = MISSING


@dataclass
class WarmStartConfig:
    init: str | None = MISSING
    seed: int = MISSING
    steps: int = MISSING
    drill_steps: int = MISSING
    drill_until: float = MISSING
    drill_batch_size: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    warmup_steps: int = MISSING
    gap_epsilon: float = MISSING
    boxed_weight: float = MISSING
    threads: int = MISSING
    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    mlp: int = MISSING
    evaluate_per_concept: int = MISSING
    mixture: dict[str, float] = MISSING
    prompt: PromptConfig = field(default_factory=PromptConfig)
    output: str = MISSING
    paths: Any = MISSING


@dataclass
class ReportConfig:
    runs: Any = MISSING
    by: list[str] = MISSING
    baseline: str | None = MISSING
    sets: list[str] = MISSING
    decoding: str = MISSING
    headline: str = MISSING
    x: str | None = MISSING
    line: str | None = MISSING
    confidence: float = MISSING
    seed: int = MISSING
    title: str | None = MISSING
    output: str = MISSING
    paths: Any = MISSING


# (config group, its options) -> dataclass. The group `schema` keeps them out of the list of a group's options.
SCHEMAS: dict[str, type] = {
    "variant": VariantConfig,
    "variant_replacement": ReplacementConfig,
    "variant_divergence": DivergenceConfig,
    "variant_hybrid": HybridConfig,
    "trigger": TriggerConfig,
    "intervention": InterventionConfig,
    "intervention_same_section": SameSectionConfig,
    "intervention_filler": FillerConfig,
    "intervention_hint": HintConfig,
    "intervention_prefix": PrefixConfig,
    "objective_likelihood": LikelihoodConfig,
    "objective_grpo": GRPOConfig,
    "reward_correctness": CorrectnessConfig,
    "reward_random": RandomRewardConfig,
    "sampler_transformers": TransformersSamplerConfig,
    "model": ModelConfig,
    "prompt": PromptConfig,
    "data_concept_world": ConceptWorldConfig,
    "data_core_quizzes": CoreQuizzesConfig,
    "augmentation": AugmentationConfig,
    "evaluation": EvaluationConfig,
    "trainer": TrainerConfig,
    "callbacks": CallbacksConfig,
    "logger": LoggerConfig,
    "paths": PathsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "warm_start": WarmStartConfig,
    "report": ReportConfig,
}


def register() -> None:
    """Make the dataclasses known to Hydra; call before composing."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    known = store.repo.get("schema", {})
    for name, node in SCHEMAS.items():
        if f"{name}.yaml" not in known:
            store.store(group="schema", name=name, node=node, provider="core_torl")
