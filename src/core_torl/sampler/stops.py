"""Finding stop strings in token ids without decoding every answer at every step.

A stop string that ends in an answer's newest token either lies in it or ends with a beginning of it. Most tokens cannot
do either, and which ones can is remembered, so that an answer is decoded only when there is something to find.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_UNDECODABLE = "\ufffd"  # part of a character: what it will become is not known yet


class StopFinder:
    """Stop strings under one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._may_end: dict[tuple[str, ...], dict[int, bool]] = {}

    def may_end(self, token: int, stops: tuple[str, ...]) -> bool:
        """Whether one of ``stops`` can end inside ``token``; True where that cannot be told from the token alone."""
        known = self._may_end.setdefault(stops, {})
        if token not in known:
            piece = str(self.tokenizer.decode([token]))
            # Decoded alone, a token may lose the space it begins with, or gain none.
            known[token] = _UNDECODABLE in piece or any(_ends(s, p) for s in stops for p in (piece, f" {piece}"))
        return known[token]

    def find(self, ids: list[int], stops: tuple[str, ...]) -> str | None:
        """The first of ``stops`` that is in the text of ``ids``, of which all but the newest had none."""
        if not ids or not self.may_end(ids[-1], stops):
            return None
        # A token decodes to at least one byte, so a stop string of k bytes lies in the last k tokens and some slack.
        reach = max(len(s.encode()) for s in stops) + 4
        tail = self.tokenizer.decode(ids[-reach:])
        return next((s for s in stops if s in tail), None)


def _ends(stop: str, piece: str) -> bool:
    return stop in piece or any(piece.startswith(stop[-k:]) for k in range(1, len(stop) + 1))
