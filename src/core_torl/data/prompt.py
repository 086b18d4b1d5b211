"""How a problem becomes the text a policy reads, with or without a concept before it.

One template renders the plain prompt and the concept-primed prompt, so that only the concept differs between the two
(the released CORE code changed the instructions as well). ``style: plain`` gives the text to the tokenizer, which
may put a start token before it; ``style: bare`` gives the text and nothing else (ToRL's base models); ``style: chat``
puts it through the tokenizer's own chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core_torl.config.errors import UserError
from core_torl.problem import LETTERS, Concept, Problem

_ANSWER = "An answer that no template holds."


@dataclass(frozen=True)
class PromptTemplate:
    """Format strings; ``{question}``, ``{options}``, ``{concept}`` and ``{last}`` (the last letter) are filled in.

    ``choice`` and ``open`` are the whole user text of a choice and of an open question; both must hold ``{concept}``
    where the concept goes, which is empty in a plain prompt. ``concept`` renders the concept itself, ``option`` one
    option. ``system`` is only used by ``style: chat``.
    """

    style: str
    choice: str
    open: str
    concept: str
    option: str
    system: str = ""

    def __post_init__(self) -> None:
        if self.style not in ("plain", "bare", "chat"):
            raise ValueError(f"model.prompt.style={self.style!r}: use plain, bare or chat")
        for key, needed in (
            ("choice", ("{concept}", "{question}", "{options}")),
            ("open", ("{concept}", "{question}")),
        ):
            missing = [n for n in needed if n not in getattr(self, key)]
            if missing:
                raise ValueError(f"model.prompt.{key} lacks {missing[0]}: add it where that part belongs")

    def user_text(self, problem: Problem, concept: Concept | None = None) -> str:
        """The text of the question. ``concept`` is None at test time, always."""
        options = "".join(
            self.option.format(letter=letter, text=text) for letter, text in zip(LETTERS, problem.options, strict=False)
        )
        layout = self.choice if problem.is_choice else self.open
        fields = {
            "concept": self.concept.format(text=concept.text, name=concept.name) if concept else "",
            "question": problem.question,
            "options": options,
            "last": problem.letters[-1:] or "A",
        }
        for name in fields:
            layout = layout.replace("{" + name + "}", "\x00" + name + "\x00")
        for name, value in fields.items():  # two passes: a question may itself hold braces, LaTeX is full of them
            layout = layout.replace("\x00" + name + "\x00", value)
        return layout

    def encode_answer(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        """Token ids of a given answer as they follow a prompt; no special tokens, no end."""
        return tuple(tokenizer(f" {text}" if self.style == "plain" else text, add_special_tokens=False)["input_ids"])

    def encode(self, tokenizer: Any, problem: Problem, concept: Concept | None = None) -> tuple[int, ...]:
        """Token ids of the prompt, ready for a sampler; special tokens included once, with style ``bare`` none."""
        text = self.user_text(problem, concept)
        if self.style != "chat":
            return tuple(tokenizer(text, add_special_tokens=self.style == "plain")["input_ids"])
        rendered = tokenizer.apply_chat_template(
            self._messages(tokenizer, text), add_generation_prompt=True, tokenize=False
        )
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _messages(self, tokenizer: Any, text: str) -> list[dict[str, str]]:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "model.prompt.style=chat: the model's tokenizer has no chat template; use another model/prompt, or "
                "model.prompt.style=plain"
            )
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def end_of_turn(self, tokenizer: Any) -> str | None:
        """The special token that the chat template writes behind an answer, such as <|im_end|>; None without one.

        A base model's tokenizer may name another end of text, and a model that was asked in a chat ends its answer as
        the template does: whoever samples has to know both.
        """
        if self.style != "chat":
            return None
        answered = [*self._messages(tokenizer, "?"), {"role": "assistant", "content": _ANSWER}]
        rendered = tokenizer.apply_chat_template(answered, add_generation_prompt=False, tokenize=False)
        behind = tokenizer(rendered.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
        # What is special is written with the vocabulary's added tokens, also where it is not named as such.
        first = tokenizer.convert_ids_to_tokens(behind[0]) if behind else None
        return first if first in tokenizer.get_added_vocab() else None
