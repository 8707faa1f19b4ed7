"""The text that an evaluation reads: a token store, or a file of texts that is encoded on the spot."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from riverrun.eval.batches import Tokens
from riverrun.eval.models import LoadedModel
from riverrun.train.data.sources import Skipped, open_source
from riverrun.train.data.store import TokenStore


@dataclass(frozen=True)
class Documents:
    """Attributes:
    tokens: one array of tokens a document, each closed by the end-of-sequence token.
    num_documents, num_tokens, num_bytes: of the documents in `tokens`; without beginning-of-sequence tokens; the bytes
        are those of the text in UTF-8.
    available: documents there would be without a limit.
    fingerprint: of the store or the file.
    """

    tokens: Sequence[Tokens]
    num_documents: int
    num_tokens: int
    num_bytes: int
    available: int
    fingerprint: str

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens


def open_documents(path: Path, model: LoadedModel, limit: int | None = None) -> Documents:
    """The first `limit` documents of a store, or of a file: JSON lines or Parquet with a field `text`, or plain text
    (one document).

    A text from a file begins with the beginning-of-sequence token if the model is not Riverrun's and its tokenizer has
    one. Riverrun's models are trained without.

    Raises:
        ValueError: nothing there, no text in it, or a store made with another tokenizer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} documents leaves nothing to evaluate: give at least 1")
    if path.is_dir():
        store = TokenStore.open(path)
        check_tokenizer(store, model)
        return _of_store(store, limit)
    if not path.is_file():
        raise ValueError(f"there is no {path}: give a token store's folder, a text file or a .jsonl file")
    tokenizer = model.require_tokenizer()
    _check_size(f"the tokenizer of {model.description}", tokenizer.vocab_size, model)
    texts = _texts(path)
    if not texts:
        raise ValueError(f"{path} holds no text")
    opening = [] if model.is_riverrun or tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = [[*tokens, tokenizer.eos_id] for tokens in map(tokenizer.encode, texts[:limit])]
    return Documents(
        [opening + tokens for tokens in encoded],
        len(encoded),
        sum(map(len, encoded)),
        sum(len(text.encode()) for text in texts[:limit]),
        len(texts),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def check_tokenizer(store: TokenStore, model: LoadedModel) -> None:
    """Raises ValueError if the model was not made for the store's tokens.

    That is known from the tokenizers' fingerprints; of a model without a tokenizer, only the sizes are compared.
    """
    _check_size(f"the store {store.folder}", store.vocab_size, model)
    if model.tokenizer is not None and model.tokenizer.fingerprint != store.tokenizer_fingerprint:
        raise ValueError(
            f"the store {store.folder} was made with another tokenizer ({store.tokenizer_fingerprint[:12]}) than that "
            f"of {model.description} ({model.tokenizer.fingerprint[:12]}): prepare it again with the model's "
            "tokenizer, or evaluate on the text itself"
        )


def _check_size(what: str, vocab_size: int, model: LoadedModel) -> None:
    if vocab_size > model.vocab_size:
        raise ValueError(
            f"{what} has a vocabulary of {vocab_size} tokens, but {model.description} has embeddings for "
            f"{model.vocab_size}: they do not belong together"
        )


class Stored(Sequence[np.ndarray]):
    """The first documents of a store, each of which is read when it is asked for."""

    def __init__(self, store: TokenStore, number: int):
        self.store, self.number = store, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i):
        if not 0 <= i < self.number:
            raise IndexError(i)
        return self.store.document(i)


def _of_store(store: TokenStore, limit: int | None) -> Documents:
    number = min(store.num_documents, limit or store.num_documents)
    return Documents(
        Stored(store, number),
        number,
        sum(len(store.document(i)) for i in range(number)),
        sum(store.document_bytes(i) for i in range(number)),
        store.num_documents,
        store.fingerprint,
    )


def _texts(path: Path) -> list[str]:
    """The documents of a file that are not empty."""
    with TemporaryDirectory() as cache:
        source = open_source([path], cache=Path(cache))
        found = [document for piece in range(len(source.sizes)) for document in source.documents(piece)]
    unusable = [d for d in found if isinstance(d, Skipped) and d.reason == "not UTF-8"]
    if unusable:
        raise ValueError(f"{unusable[0].where} is not UTF-8 text: convert it first")
    return [document for document in found if isinstance(document, str)]
