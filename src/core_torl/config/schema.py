"""What may stand in the config of each command and of each group. The YAML files hold the values and explain the keys.

Hydra merges a group's YAML into its dataclass, so an unknown key or a wrong type fails while the config is composed,
before anything heavy is imported. tests/config/test_schema.py holds each dataclass against the constructor that reads
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from core_torl.config.group_schema import (
    AugmentationConfig,
    CalculationWorldConfig,
    CallbacksConfig,
    ConceptWorldConfig,
    CoreQuizzesConfig,
    CorrectnessConfig,
    DivergenceConfig,
    EvaluationConfig,
    FillerConfig,
    GRPOConfig,
    HintConfig,
    HybridConfig,
    InterventionConfig,
    LikelihoodConfig,
    LoggerConfig,
    MathProblemsConfig,
    ModelConfig,
    ObservationConfig,
    PathsConfig,
    PrefixConfig,
    ProcessSandboxConfig,
    PromptConfig,
    RandomRewardConfig,
    ReplacementConfig,
    SameSectionConfig,
    SandboxConfig,
    SandboxFusionConfig,
    SubprocessLauncherConfig,
    ToolConfig,
    TorlConfig,
    TorlProblemsConfig,
    TorlRewardConfig,
    TrainerConfig,
    TransformersSamplerConfig,
    TriggerConfig,
    VariantConfig,
    VllmSamplerConfig,
    VllmServerSamplerConfig,
)


@dataclass
class _Shared:
    """Groups that every front door of a policy needs."""

    trusted_targets: list[str] = MISSING
    reward: Any = MISSING
    sampler: Any = MISSING
    tool: Any = MISSING
    sandbox: Any = MISSING
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
    reproduces: str | None = MISSING
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
    world: str = MISSING
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
    kind: str = MISSING
    runs: Any = MISSING
    by: list[str] | None = MISSING
    baseline: str | None = MISSING
    sets: list[str] | None = MISSING
    decoding: str | None = MISSING
    headline: str | None = MISSING
    x: str | None = MISSING
    line: str | None = MISSING
    curves: list[str] = MISSING
    curves_axis: str = MISSING
    curves_window: int = MISSING
    final: list[str] = MISSING
    final_steps: int = MISSING
    confidence: float = MISSING
    seed: int = MISSING
    title: str | None = MISSING
    html: bool = MISSING
    wandb_report: str = MISSING
    wandb_entity: str | None = MISSING
    wandb_project: str = MISSING
    output: str = MISSING
    paths: Any = MISSING


@dataclass
class WatchConfig:
    runs: str | None = MISSING
    every_s: float = MISSING
    once: bool = MISSING
    paths: Any = MISSING


# (config group, its options) -> dataclass. The group `schema` keeps them out of the list of a group's options.
SCHEMAS: dict[str, type] = {
    "variant": VariantConfig,
    "variant_torl": TorlConfig,
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
    "reward_torl": TorlRewardConfig,
    "sampler_transformers": TransformersSamplerConfig,
    "sampler_vllm_server": VllmServerSamplerConfig,
    "sampler_vllm": VllmSamplerConfig,
    "tool": ToolConfig,
    "tool_observation": ObservationConfig,
    "model": ModelConfig,
    "prompt": PromptConfig,
    "data_concept_world": ConceptWorldConfig,
    "data_calculation_world": CalculationWorldConfig,
    "data_core_quizzes": CoreQuizzesConfig,
    "data_torl": TorlProblemsConfig,
    "data_math": MathProblemsConfig,
    "augmentation": AugmentationConfig,
    "sandbox": SandboxConfig,
    "sandbox_process": ProcessSandboxConfig,
    "sandbox_fusion": SandboxFusionConfig,
    "evaluation": EvaluationConfig,
    "trainer": TrainerConfig,
    "callbacks": CallbacksConfig,
    "logger": LoggerConfig,
    "paths": PathsConfig,
    "launcher_subprocess": SubprocessLauncherConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "warm_start": WarmStartConfig,
    "report": ReportConfig,
    "watch": WatchConfig,
}


def number_format(precision: str) -> str | None:
    """What the trainer computes in at a ``trainer.precision``, as engines call it; None: that of the weights."""
    return {"bf16-mixed": "bfloat16"}.get(precision)


def register() -> None:
    """Make the dataclasses known to Hydra, and the project's resolver to OmegaConf; call before composing."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("number_format", number_format, replace=True)
    # Hydra 1.3 copies the whole store each time it composes, and for each group that --help lists. It hands out copies
    # of what is in it anyway, so the store itself may be shared: --help takes one second instead of six.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]
    store = ConfigStore.instance()
    known = store.repo.get("schema", {})
    for name, node in SCHEMAS.items():
        if f"{name}.yaml" not in known:
            store.store(group="schema", name=name, node=node, provider="core_torl")
