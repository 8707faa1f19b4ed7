"""Lossless sentencepiece BPE: training, encoding, and the same tokenizer as a Hugging Face tokenizer.json.

Lossless means decode(encode(x)) == x for every text: identity normalisation, no dummy prefix, whitespace kept, bytes
for unknown characters. One hole is closed here: sentencepiece writes a space as U+2581 inside its pieces and decodes
that character as a space, so a literal U+2581 in a text is encoded as its three UTF-8 bytes.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from riverrun.train.data.store import write_atomically
from riverrun.train.data.tokenizer import Tokenizer, write_huggingface_folder

SPACE = "\u2581"  # a space inside a piece
UNK, BOS, EOS, PAD = "<|unknown|>", "<|begin|>", "<|endoftext|>", "<|pad|>"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Raises:
        ValueError: `model` is not a sentencepiece model, or one that loses text or has no end-of-sequence token.
    """

    def __init__(self, model: bytes, name: str = "this sentencepiece model"):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a sentencepiece model, or is damaged") from error
        _check_lossless(model, name)
        self._model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        self.bos_id = _optional(self._processor.bos_id())
        self.pad_id = _optional(self._processor.pad_id())
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def read(cls, path: Path) -> "SentencePieceTokenizer":
        if not path.is_file():
            raise ValueError(f"there is no sentencepiece model {path}: train one with `riverrun data tokenizer`")
        return cls(path.read_bytes(), str(path))

    def __reduce__(self) -> tuple:
        return type(self), (self._model,)

    def encode(self, text: str) -> list[int]:
        first, *others = text.split(SPACE)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_bytes
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: Path | str) -> None:
        folder = Path(folder)
        names = self._processor.id_to_piece
        pad = names(self.pad_id) if self.pad_id is not None else None
        bos = names(self.bos_id) if self.bos_id is not None else names(self.eos_id)
        write_huggingface_folder(folder, self._backend(), "sentencepiece", bos=bos, eos=names(self.eos_id), pad=pad)
        write_atomically(folder / "tokenizer.model", self._model)

    def _backend(self) -> Any:
        """The same merges as a `tokenizers.Tokenizer`.

        Its pieces hold real spaces, so that U+2581 is unknown to it and becomes bytes, as in `encode`. Sentencepiece
        merges the neighbours whose union has the best score; listing every split of every piece, best piece first,
        makes the other library do the same.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models

        processor = self._processor
        names = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        normal = {
            name.replace(SPACE, " "): i
            for i, name in enumerate(names)
            if not (
                processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
            )
        }
        vocab = {**{name: i for i, name in enumerate(names) if i not in set(normal.values())}, **normal}
        merges = []
        for piece, _ in sorted(normal.items(), key=lambda item: -processor.get_score(item[1])):
            splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            known = [(a, b) for a, b in splits if a in normal and b in normal]
            merges += sorted(known, key=lambda split: (normal[split[0]], normal[split[1]]))
        backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token=names[processor.unk_id()]))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return backend


def train_sentencepiece(
    documents: Iterable[str], out: Path | str, vocab_size: int, *, character_coverage: float = 0.9995
) -> SentencePieceTokenizer:
    """Train a lossless byte-pair encoding on `documents` and write it to the file `out`, atomically.

    The result is a function of the documents and the options alone: one thread, no sampling, no path in the model.

    Args:
        documents: texts, learned from line by line; a newline is always a token of its own.
        out: a name that ends in .model.
        vocab_size: with the 4 special tokens and the 256 bytes.
        character_coverage: the share of the corpus's characters that get a token; the others are spelt in bytes.

    Raises:
        ValueError: no text, or a vocabulary that is too small or too large for it; `out` is not named *.model.
    """
    from sentencepiece import SentencePieceTrainer

    out = Path(out)
    if out.suffix != ".model":
        raise ValueError(f"a sentencepiece model is named *.model: write it to {out}.model")
    model, lines = io.BytesIO(), _Lines(documents)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3,
            unk_piece=UNK, bos_piece=BOS, eos_piece=EOS, pad_piece=PAD,
            num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if not lines.count:
            raise ValueError("there is no text to train a tokenizer on") from error
        # the message is "INTERNAL: file.cc(line) [condition] explanation"
        explanation = str(error).rpartition("] ")[2].strip() or str(error)
        raise ValueError(f"sentencepiece cannot train a vocabulary of {vocab_size}: {explanation}") from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.getvalue())
    return tokenizer


class _Lines:
    """The non-empty lines of documents, counted."""

    def __init__(self, documents: Iterable[str]):
        self._documents = documents
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            for line in document.replace("\0", "").replace(SPACE, "").split("\n"):
                if line:
                    self.count += 1
                    yield line


def _check_lossless(model: bytes, name: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = messages.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = {
        "is not a BPE": trainer.model_type != messages.TrainerSpec.BPE,
        "has no byte fallback": not trainer.byte_fallback,
        "normalises text": bool(normalizer.precompiled_charsmap),
        "adds a space before text": normalizer.add_dummy_prefix,
        "drops spaces": normalizer.remove_extra_whitespaces,
        "writes spaces after words": trainer.treat_whitespace_as_suffix,
        "has user-defined symbols": any(piece.type == piece.USER_DEFINED for piece in proto.pieces),
        "has no end-of-sequence token": trainer.eos_id < 0,
    }
    found = [words for words, holds in problems.items() if holds]
    if found:
        raise ValueError(
            f"{name} {', '.join(found)}: train one with `riverrun data tokenizer`, or give the folder of its Hugging "
            "Face form instead of the .model file"
        )


def _optional(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
