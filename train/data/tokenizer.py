"""Tokenizers: one small interface over sentencepiece models, Hugging Face tokenizers and plain bytes.

`save` writes a folder that `transformers.AutoTokenizer` loads with the same ids, and that `load_tokenizer` reads back
as the same tokenizer, fingerprint included. The folder's tokenizer_config.json therefore names the kind (key KIND_KEY).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KIND_KEY = "riverrun_tokenizer"
CONFIG = "tokenizer_config.json"


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are never recognised inside text: a corpus that contains the
    characters of the end-of-sequence token does not contain that token.

    Attributes:
        vocab_size: ids are below it.
        eos_id: closes every document of a prepared corpus.
        bos_id, pad_id: None if the tokenizer has none.
        fingerprint: SHA-256 of what defines the ids. Equal fingerprints encode alike.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no special token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write a Hugging Face tokenizer folder (made if missing)."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and two special tokens."""

    BOS, EOS = "<|begin|>", "<|endoftext|>"
    bos_id, eos_id, pad_id = 256, 257, None
    vocab_size = 258
    fingerprint = hashlib.sha256(b"riverrun bytes 256+2").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.bos_id: self.BOS.encode(), self.eos_id: self.EOS.encode()}
        return b"".join(special.get(i) or bytes([i]) for i in map(int, ids)).decode(errors="replace")

    def save(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        # ByteLevel writes each byte as one printable character: a BPE without merges over these is the identity
        vocab = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
        backend = Backend(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        write_huggingface_folder(Path(folder), backend, "bytes", bos=self.BOS, eos=self.EOS)


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of `transformers.AutoTokenizer`.

    Raises:
        ValueError: nothing there that transformers can load, or a tokenizer without an end-of-sequence token.
    """

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                name, local_files_only=Path(name).is_dir(), trust_remote_code=False
            )
        except Exception as error:  # transformers raises nearly every type for a damaged folder
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"no tokenizer can be loaded from {name!r} ({first}). Give the path of a sentencepiece .model file, of "
                "a Hugging Face tokenizer folder, a hub name, or `bytes`"
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {name} has no end-of-sequence token: set eos_token in its {CONFIG}")
        self.eos_id = self._tokenizer.eos_token_id
        self.bos_id, self.pad_id = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id
        self.vocab_size = max(len(self._tokenizer), 1 + max(self._tokenizer.get_vocab().values()))
        self.fingerprint = _huggingface_fingerprint(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))

    def save(self, folder: Path | str) -> None:
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "bytes"; the path of a sentencepiece model (*.model); a folder with a Hugging Face tokenizer or one
            written by `Tokenizer.save`; or a name on the Hugging Face hub.

    Raises:
        ValueError: no usable tokenizer there.
    """
    from riverrun.train.data.bpe import SentencePieceTokenizer

    spec = str(spec)
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if spec.endswith(".model"):
        return SentencePieceTokenizer.read(path)
    if path.is_dir():
        kind = _kind(path)
        if kind == "bytes":
            return ByteTokenizer()
        return SentencePieceTokenizer.read(path / "tokenizer.model") if kind else HuggingFaceTokenizer(str(path))
    if path.exists() or spec.startswith((".", "/", "~")):
        problem = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(
            f"tokenizer {spec} {problem}: give a sentencepiece .model file, a Hugging Face tokenizer folder, a hub "
            "name, or `bytes`"
        )
    return HuggingFaceTokenizer(spec)


def write_huggingface_folder(
    folder: Path, backend: Any, kind: str, *, bos: str, eos: str, pad: str | None = None
) -> None:
    """Write a `tokenizers.Tokenizer` so that AutoTokenizer loads it. Padding goes on the left, where a recurrent state
    can ignore it. Special tokens that are not in the vocabulary yet get the next ids, in the order bos, eos, pad."""
    from tokenizers import AddedToken

    special = [token for token in (bos, eos, pad) if token is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        **({"pad_token": pad} if pad is not None else {}),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        KIND_KEY: kind,
    }
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _kind(folder: Path) -> str | None:
    """Which of our kinds wrote this folder; None for another's."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
        kind = config.get(KIND_KEY)
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is not a JSON object: restore it from a copy") from None
    if kind not in (None, "bytes", "sentencepiece"):
        raise ValueError(f"{path} has {KIND_KEY}={kind!r}, which this version does not know: bytes or sentencepiece")
    return kind


def _huggingface_fingerprint(tokenizer: Any) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        for unrelated in ("version", "padding", "truncation"):  # of the file format and of the last call
            definition.pop(unrelated, None)
    else:  # written in Python: its class and vocabulary define it
        definition = {"class": type(tokenizer).__qualname__, "vocab": tokenizer.get_vocab()}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    digest.update(json.dumps([definition, special], sort_keys=True).encode())
    return digest.hexdigest()


def _byte_level_alphabet() -> list[str]:
    """The character by which ByteLevel writes each byte: itself where it prints, else the next one from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
