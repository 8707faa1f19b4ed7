"""The tokenizer that goes along with an exported model."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; None: there is no such token."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def write_to(self, config: PretrainedConfig | GenerationConfig) -> None:
        for name, value in asdict(self).items():
            setattr(config, name, value)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of `folder` that make up a tokenizer; code is never among them."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")


def copy_tokenizer(source: Path, out: Path, vocab_size: int) -> SpecialTokens:
    """Copy a tokenizer's files into `out`, and load them from there to learn the special tokens.

    Raises:
        ValueError: `source` has no tokenizer, it cannot be loaded, or it has more tokens than the model.
    """
    files = tokenizer_files(source)
    if not files:
        raise ValueError(f"{source} has no tokenizer files (tokenizer.json, tokenizer_config.json, …)")
    for path in files:
        shutil.copyfile(path, out / path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ValueError(f"the tokenizer in {source} cannot be loaded: {error}") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {source} has {len(tokenizer)} tokens, the model only {vocab_size}: it is not the "
            "tokenizer that this model was trained with"
        )
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
