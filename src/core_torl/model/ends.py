"""Where answers end: the tokens that a model names, and the one that its chat template writes behind an answer.

A base model's files name the end of a document (``<|endoftext|>``), and an instruction-tuned one's the end of a turn
(``<|im_end|>``, ``<|eot_id|>``) or both. A base model that is asked in a chat ends its turns as the template does,
which its files do not say: unless that token ends answers too, they run on into a made-up next question.
"""

from __future__ import annotations

import logging
from typing import Any

from core_torl.model.load import Policy

log = logging.getLogger(__name__)


def end_turns(policy: Policy, token: str | None) -> None:
    """Let ``token`` end answers beside every end that the model and its tokenizer name; None changes nothing.

    It becomes the tokenizer's end-of-sequence token, so that given answers (``variant=sft``) end with it as well, and
    what ended answers before goes into the generation config: samplers look into both, and so does an exported policy.
    """
    tokenizer: Any = policy.tokenizer
    if token is None or token == tokenizer.eos_token:
        return
    model: Any = policy.model.get_base_model() if policy.adapted else policy.model
    named = model.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [] if named is None else [named])
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    model.generation_config.eos_token_id = sorted({*ends, int(tokenizer.convert_tokens_to_ids(token))})
    log.info("model: answers end with %s, as the chat template says, and with %s", token, tokenizer.eos_token)
    pad = tokenizer.pad_token
    tokenizer.eos_token = token
    if pad is not None:
        tokenizer.pad_token = pad
