"""The text of generated tokens, all at once or as it is made."""

from typing import TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from riverrun.train.data.tokenizer import Tokenizer

CONTEXT = 16  # tokens of the prompt that are decoded along


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of `tokens` after `prompt`, without special tokens. Decoded together, since many tokenizers drop the
    space that opens a text."""
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    before = [token for token in prompt[-CONTEXT:] if token not in special]
    after = [token for token in tokens if token not in special]
    return tokenizer.decode(before + after)[len(tokenizer.decode(before)) :]


class TextPrinter(BaseStreamer):
    """Writes the continuation of a prompt while its tokens arrive. An unfinished character (it may take several tokens,
    and is decoded as U+FFFD until then) is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], file: TextIO):
        self.tokenizer, self.prompt, self.file = tokenizer, prompt, file
        self.tokens: list[int] = []
        self.written, self.prompt_is_next = 0, True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:  # transformers hands out the prompt first
            self.prompt_is_next = False
            return
        self.tokens += value.flatten().tolist()
        text = continuation(self.tokenizer, self.prompt, self.tokens)
        if not text.endswith("\ufffd"):
            self._write(text)

    def end(self) -> None:
        self._write(continuation(self.tokenizer, self.prompt, self.tokens))

    def _write(self, text: str) -> None:
        self.file.write(text[self.written :])
        self.file.flush()
        self.written = len(text)
