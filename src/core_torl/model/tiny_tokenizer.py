"""The tiny policy's tokenizer: one token a word, one token an integer, bytes for everything else.

A word with the space before it is one token, each integer from -99 to 99 is one token, and ``\\boxed{A}`` is one token,
so a quiz and its working are short enough for a very small model. Text outside the vocabulary falls back to UTF-8
bytes, so any string can be encoded and decodes to itself (but U+2581 comes back as a space, and the spelled-out name of
a byte piece, ``<0x41>``, as that byte). Built with the ``tokenizers`` library (a unigram model whose pieces cost the
same: the segmentation with the fewest tokens wins).
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPACE = "\u2581"  # a visible stand-in for the space inside pieces
# What code and its blocks are made of, so that tool-using text is short as well.
CODE_WORDS = [
    "```python", "```output", "```", "print", "(", ")", "import", "from", "sympy", "math", "def", "return", "for", "in",
    "range", "if", "else", ":", "=", "==", "+", "-", "*", "/", "//", "%", "**", ",", ".", "result", "x", "y", "n", "i",
    "abs", "sum", "max", "min", "gcd", "pow", "int", "str", "nextprime", "Error", "NameError", "SyntaxError", "not",
    "defined", "name", "is",
]  # fmt: skip


def build_tokenizer(
    words: Iterable[str], max_length: int = 1024, whole_integers: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer whose pieces are ``words`` (with and without a space before), integers, boxed letters and bytes.

    ``whole_integers=False`` is for worlds with long numbers: every number is then read digit by digit, also behind a
    space, so that copying it is the same task wherever it stands.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces: dict[str, None] = dict.fromkeys((PAD, BOS, EOS, "<unk>"))
    pieces.update(dict.fromkeys(f"<0x{i:02X}>" for i in range(256)))
    pieces.update(dict.fromkeys(("\n", SPACE)))
    pieces.update(dict.fromkeys(str(d) for d in range(10)))
    if whole_integers:
        pieces.update(dict.fromkeys(f"{SPACE}{n}" for n in range(-99, 100)))
    boxed = [f"\\boxed{{{x}}}" for x in "ABCDE"]
    for word in dict.fromkeys([*words, *CODE_WORDS, *boxed, "\\boxed{", "}", "{"]):
        pieces.update(dict.fromkeys((word, SPACE + word)))
    vocab = [(p, 0.0 if p in (PAD, BOS, EOS, "<unk>") else -100.0 if p.startswith("<0x") else -1.0) for p in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=list(pieces).index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # Words never merge over a space or a line break; a number of three or more digits is read digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{SPACE}?[^{SPACE}\n]+|{SPACE}"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, list(pieces).index(BOS))]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
