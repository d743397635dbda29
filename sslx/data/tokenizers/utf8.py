"""The bytes of a text in UTF-8: a vocabulary that needs no file and knows every language."""

from dataclasses import dataclass

PAD, FIRST, LAST = 0, 1, 2
_NUM_SPECIAL = 3


@dataclass(frozen=True)
class Utf8:
    """Token 0 pads, 1 begins a text and 2 ends it; byte b is token b + 3."""

    num_tokens: int = 256 + _NUM_SPECIAL
    pad: int = PAD

    def encode(self, text: str, length: int) -> list[int]:
        content = [byte + _NUM_SPECIAL for byte in text.encode("utf-8", errors="replace")[: length - 2]]
        return [FIRST, *content, LAST][:length]


def build() -> Utf8:
    """Return the tokenizer."""
    return Utf8()
