"""How much memory a run takes on each device, by arithmetic: nothing is loaded, nothing is allocated.

What can be counted is counted exactly, and tests/model/test_memory.py holds each count against the real thing: the
parameters of a model and of its LoRA adapters, AdamW's state, the bytes of a key-value cache, what gradient
checkpointing keeps of a forward pass. What depends on kernels and allocators (the work of one layer, slices of logits)
is an estimate and is called so. Fragmentation and the CUDA context (about 1 GiB) come on top.

Sizes are bytes unless a name says otherwise; GiB are 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Slices in which logits become log-probs, see objective/logprobs.py: float32 elements of one slice.
SLICE_ELEMENTS = 32 * 1024 * 1024
# Names of what a sampler with weights of its own takes.
_SAMPLERS = ("sampler's weights", "key-value cache")
# Bytes of one weight in 4-bit NF4 with double quantization, its scales among them (QLoRA, section 3).
_NF4 = 0.516


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family, which Qwen2 and Mistral share: SwiGLU, RMS norms, grouped key-value heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool  # input and output embedding are one matrix
    qkv_bias: bool = False
    head_dim: int | None = None  # None: hidden / heads
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False
    positions: int | None = None  # the longest text it was made for, in tokens

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """Linear modules of one layer: inputs, outputs, whether there is a bias."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries, self.qkv_bias),
            "k_proj": (self.hidden, keys, self.qkv_bias),
            "v_proj": (self.hidden, keys, self.qkv_bias),
            "o_proj": (queries, self.hidden, self.output_bias),
            "gate_proj": (self.hidden, self.mlp, self.mlp_bias),
            "up_proj": (self.hidden, self.mlp, self.mlp_bias),
            "down_proj": (self.mlp, self.hidden, self.mlp_bias),
        }

    @property
    def layer_parameters(self) -> int:
        linear = sum(i * o + (o if bias else 0) for i, o, bias in self.linears.values())
        return linear + 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Weights of LoRA adapters. ``all-linear`` leaves the output embedding out, as peft does."""
        names = self.linears if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
        return self.layers * sum(rank * sum(self.linears[name][:2]) for name in names if name in self.linears)

    def kv_bytes_per_token(self, element: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * element

    @classmethod
    def of(cls, config: Any) -> Architecture | None:
        """From a transformers config; None for a family whose weights this module cannot count."""
        kind = getattr(config, "model_type", None)
        if kind not in ("llama", "qwen2", "qwen3", "mistral"):
            return None
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            mlp=config.intermediate_size, vocabulary=config.vocab_size, tied=bool(config.tie_word_embeddings),
            qkv_bias=kind == "qwen2" or bias, head_dim=getattr(config, "head_dim", None),
            output_bias=kind != "qwen2" and bias, mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3", positions=getattr(config, "max_position_embeddings", None),
        )  # fmt: skip


_QWEN_1_5B = Architecture(28, 1536, 12, 2, 8960, 151_936, tied=True, qkv_bias=True, positions=4096)
_QWEN_7B = Architecture(28, 3584, 28, 4, 18_944, 152_064, tied=False, qkv_bias=True, positions=4096)
# The models of the presets (conf/model), so that a dry run can count without their files. From their model cards; the
# totals, 1.54, 1.78, 7.62 and 8.03 billion, are in the tests.
KNOWN: dict[str, Architecture] = {
    "Qwen/Qwen2-Math-7B": _QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN_7B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": replace(_QWEN_1_5B, tied=False, positions=131_072),
    "meta-llama/Meta-Llama-3-8B-Instruct": Architecture(32, 4096, 32, 8, 14_336, 128_256, tied=False, positions=8192),
}


@dataclass(frozen=True)
class Plan:
    """What of a config decides how much memory training takes."""

    dtype: str = "float32"  # of the weights as they are loaded
    mixed: bool = False  # bfloat16 arithmetic on float32 weights
    checkpointing: bool = False
    rank: int = 0  # of LoRA; 0 trains all weights
    targets: str | Sequence[str] = "all-linear"
    quantization: str | None = None  # nf4: the linear modules below LoRA in 4 bits
    copies: int = 0  # frozen copies of all weights: a reference, a teacher
    offload_copies: bool = False  # they wait in the host's memory
    copy_teaches: bool = False  # one of them is needed beside the policy's own passes, not only before them
    shadows: int = 0  # frozen copies of the trained weights that never wait elsewhere: the old policy as teacher
    tokens: int = 1  # of a microbatch, prompts and answers
    answer_tokens: int = 1  # of its answers alone
    ranks: int = 1
    sharded: bool = False  # FSDP
    sampler_weights: int = 0  # bytes of an element of a sampler's own weights; 0: it uses the trainer's
    cache_tokens: int = 0  # tokens whose keys and values the sampler keeps
    cache_element: int = 0  # bytes of one of their numbers; 0: as in training
    cache_bytes: int | None = None  # a cache of fixed size instead
    cache_enough: int | None = None  # what it can do with where there is no room for more
    sampler_sleeps: bool = False  # it gives its memory back while the trainer works


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. ``always`` is there all the time once training has begun, then comes what its phases add.

    Two phases lie before it and stand for themselves: ``loading``, when a sampler with weights of its own is made, and
    ``starting``, when frozen copies are. Under FSDP every rank then still holds all weights, so they may be the peak.
    """

    always: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    sampling: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    loading: dict[str, float] = field(default_factory=dict)
    starting: dict[str, float] = field(default_factory=dict)

    @property
    def while_training(self) -> float:
        return sum(self.always.values()) + sum(self.training.values())

    @property
    def while_sampling(self) -> float:
        return sum(self.always.values()) + sum(self.sampling.values())

    @property
    def while_starting(self) -> float:
        return max(sum(self.loading.values()), sum(self.starting.values()))

    @property
    def peak(self) -> float:
        return max(self.while_starting, self.while_training, self.while_sampling)

    @property
    def beside_sampler(self) -> float:
        """The most that lies on the device beside the sampler's own weights and cache while those are there."""
        whole = [self.loading, self.starting, self.always | self.training, self.always | self.sampling]
        return max(sum(size for name, size in part.items() if name not in _SAMPLERS)
                   for part in whole if part is whole[-1] or _SAMPLERS[0] in part)  # fmt: skip


def trained_parameters(model: Architecture, plan: Plan) -> int:
    return model.lora_parameters(plan.rank, plan.targets) if plan.rank else model.parameters


def checkpointed_bytes(model: Architecture, tokens: int, element: int) -> int:
    """What gradient checkpointing keeps of a forward pass: each layer's input, and the last norm's in float32."""
    return model.hidden * tokens * (model.layers * element + element + 4)


def layer_bytes(model: Architecture, tokens: int, element: int, residual: int) -> float:
    """Estimate of what one layer keeps for its backward pass: norms, queries, keys, values, the MLP's four parts.

    ``element``: bytes of an activation, ``residual``: of the stream between the layers. Attention itself is fused and
    keeps its output alone.
    """
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    attention = (2 * queries + 2 * keys + queries) * element  # rotated queries and keys, values, the output, its input
    return tokens * (attention + 4 * model.mlp * element + 4 * model.hidden * residual + 2 * model.hidden * element)


def estimate(model: Architecture, plan: Plan) -> Memory:
    """Memory of one device under ``plan``."""
    weight, shards = BYTES[plan.dtype], plan.ranks if plan.sharded else 1
    trained = trained_parameters(model, plan)
    packed = model.layers * sum(i * o for i, o, _ in model.linears.values()) if plan.quantization and plan.rank else 0
    stored = (model.parameters - packed) * weight + packed * _NF4  # embeddings and norms are not packed
    always: dict[str, float] = {"weights": stored / shards}
    if plan.rank:  # peft keeps adapters in float32
        always["LoRA adapters"] = trained * 4 / shards
    trained_element = 4 if plan.rank else weight
    always["gradients"] = trained * trained_element / shards
    always["AdamW's two moments"] = 2 * trained * trained_element / shards
    if plan.ranks > 1 and not plan.sharded:
        always["DDP's buckets"] = trained * trained_element
    host: dict[str, float] = {}
    one_copy = float(model.parameters * weight)
    if plan.copies:
        (host if plan.offload_copies else always)["frozen copies"] = plan.copies * one_copy / shards
    if plan.shadows:
        away = plan.offload_copies and plan.sharded
        (host if away else always)["the old policy"] = plan.shadows * trained * trained_element / shards

    element = 2 if plan.mixed or plan.dtype != "float32" else 4
    training: dict[str, float] = {}
    one = layer_bytes(model, plan.tokens, element, weight)
    if plan.checkpointing:
        training["layer inputs"] = checkpointed_bytes(model, plan.tokens, weight)
        training["one layer (estimate)"] = 2 * one  # its activations and their gradients
    else:
        training["activations (estimate)"] = (model.layers + 1) * one
    if plan.mixed:  # autocast casts the weights of a linear module, and its backward pass needs them again
        layers = 1 if plan.checkpointing else model.layers
        training["weights cast to bfloat16"] = 2 * layers * model.layer_parameters
    logits = plan.answer_tokens * model.vocabulary
    # In a slice: logits in float32, their gradient, and the softmax that it is made of.
    training["a slice of logits (estimate)"] = 3 * 4 * min(logits, SLICE_ELEMENTS)
    if plan.sharded and plan.ranks > 1:  # two layers are whole at a time, and the embedding
        whole = 2 * model.layer_parameters + model.embedding_parameters
        training["gathered weights"] = whole * (2 if plan.mixed else weight)

    if plan.copies and plan.offload_copies and not plan.sharded:
        _bring_back(training, one_copy, one, plan.copy_teaches)

    sampling: dict[str, float] = {}
    own = {"sampler's weights": float(model.parameters * plan.sampler_weights)} if plan.sampler_weights else {}
    cache = plan.cache_bytes if plan.cache_bytes is not None else wanted_cache(model, plan)
    if plan.cache_enough is not None:
        cache = min(cache, plan.cache_enough)
    sampling |= own | ({"key-value cache": float(cache)} if cache else {})
    if own and not plan.sampler_sleeps:
        training |= sampling
    if own and plan.sampler_sleeps:
        host["sampler's weights, asleep"] = own["sampler's weights"]
    whole = {"all weights": stored} | ({"LoRA adapters": trained * 4.0} if plan.rank else {})
    loading = whole | sampling if own else {}
    # A copy that is to wait on the host is made there; the old policy's is made here, wherever it will lie.
    copied = (0 if plan.offload_copies else plan.copies) * one_copy + plan.shadows * trained * trained_element
    starting = whole | ({"whole frozen copies": copied} if copied else {})
    if own and not plan.sampler_sleeps:  # otherwise it sleeps from its first weights on until answers are drawn
        starting |= sampling
    return Memory(always, training, sampling, host, loading, starting)


def _bring_back(training: dict[str, float], one_copy: float, one_layer: float, teaches: bool) -> None:
    """Count a frozen copy that comes from the host, whole, for as long as somebody reads it.

    A reference reads all rows before the policy learns from any: it lies beside its own forward pass, one layer and a
    slice of logits (without their gradients), not beside the policy's activations. Gradients and AdamW's moments stay
    where they are. A teacher lies beside the policy's passes.
    """
    name = "a frozen copy, back from the host"
    logits = training["a slice of logits (estimate)"] / 3
    reading = {name: one_copy, "its layer (estimate)": one_layer, "its slice of logits": logits}
    if teaches:
        training[name] = one_copy
    elif sum(reading.values()) > sum(training.values()):
        training.clear()
        training.update(reading)


def wanted_cache(model: Architecture, plan: Plan) -> int:
    """Keys and values of all answers that grow side by side, at their longest."""
    element = plan.cache_element or (2 if plan.mixed or plan.dtype != "float32" else 4)
    return plan.cache_tokens * model.kv_bytes_per_token(element)


def whole_logits_bytes(model: Architecture, plan: Plan) -> int:
    """What all logits of a microbatch and their gradients would take in float32, if anybody held them."""
    return 2 * 4 * plan.answer_tokens * model.vocabulary


def gib(parts: Mapping[str, float] | float) -> str:
    """A size for people."""
    size = sum(parts.values()) if isinstance(parts, Mapping) else parts
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
