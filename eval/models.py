"""Loading whatever is to be evaluated: a run, a Riverrun export, or any Hugging Face causal language model."""

import hashlib
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.hf import huginn, mamba2, olmo_hybrid
from riverrun.modeling.hf.folder import check_index, read_json
from riverrun.modeling.hf.importer import architecture_of, build_model, load_pretrained, read_config
from riverrun.modeling.hf.remote_code import MODEL_CLASS
from riverrun.modeling.hf.tokenizer import tokenizer_files
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.state_control import StateControl, set_state_control
from riverrun.train import checkpoint
from riverrun.train.data.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPORTED = (MODEL_CLASS, mamba2.ARCHITECTURE, olmo_hybrid.ARCHITECTURE, huginn.ARCHITECTURE)  # by our own importer
WEIGHT_FILES = ("*.safetensors", "*.bin")

_shared: ContextVar["dict[tuple, LoadedModel] | None"] = ContextVar("shared", default=None)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device in evaluation mode, and what identifies it.

    Attributes:
        name: as the user gave it.
        tokenizer: None if none came along; see `require_tokenizer`.
        description: for people, such as "run runs/a, step 2000".
        fingerprint: SHA-256 of the config's and weights' files, of the state control and of `num_steps`.
        seq_len: the length a run was trained on, or the longest that the model takes; None if unknown.
        step: of the checkpoint, if it is a run's.
        state_control: what a state control changes, by name.
        num_steps: how often a recurrent core runs, if that was asked for.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer | None
    description: str
    fingerprint: str
    seq_len: int | None = None
    step: int | None = None
    state_control: dict[str, float | int] = field(default_factory=dict)
    num_steps: int | None = None

    @property
    def is_riverrun(self) -> bool:
        return isinstance(self.model, RiverrunForCausalLM)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return _embedding(self.model).weight.dtype

    @property
    def vocab_size(self) -> int:
        return _embedding(self.model).num_embeddings

    def require_tokenizer(self) -> Tokenizer:
        """Raises ValueError if the model came without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"{self.description} has no tokenizer: put its files into the folder beside config.json")
        return self.tokenizer


@contextmanager
def sharing_models() -> Iterator[None]:
    """Within, `load_model` with the same arguments returns the same model, which is to be left as it was."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def load_model(
    spec: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    step: int | None = None,
    trust_remote_code: bool = False,
    state_control: str | None = None,
    num_steps: int | None = None,
) -> LoadedModel:
    """Load a model for evaluation.

    Args:
        spec: a run folder, a folder in Hugging Face's layout (read without running code from it, unless
            `trust_remote_code`), or a model's name on the Hugging Face hub.
        device: "auto" is CUDA if there is any, "cpu", "cuda" or "cuda:N".
        dtype: "fp32", "bf16" or "fp16"; None: as in the files (a run's weights are fp32).
        step: which checkpoint of a run; None: the newest intact one.
        state_control: of its Mamba-2 layers, as `StateControl.parse` reads it; None: none.
        num_steps: how often the core of a model of recurrent depth runs; None: as often as on average in training.

    Raises:
        ValueError: nothing there, a run without that checkpoint, damaged files, a device this machine lacks, a state
            control of a model without Mamba-2 layers, or a number of steps of one of fixed depth or below 1.
    """
    control = None if state_control is None else StateControl.parse(state_control)
    shared, asked = _shared.get(), (str(spec), device, dtype, step, trust_remote_code, control, num_steps)
    if shared is not None and asked in shared:
        return shared[asked]
    target, kind = resolve_device(device), None if dtype is None else DTYPES[dtype]
    folder = Path(spec)
    if _is_run(folder):
        loaded = _load_run(folder, kind, step)
    elif step is not None:
        raise ValueError(f"--step chooses a checkpoint of a run, but {spec} is not a run folder")
    else:
        folder = folder if folder.exists() else _download(str(spec), trust_remote_code)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{spec} is neither a run folder nor a model in Hugging Face's layout: no config.json")
        loaded = _load_folder(folder, str(spec), kind, trust_remote_code)
    loaded.model.to(target).eval().requires_grad_(False)  # type: ignore[arg-type]
    if control is not None:
        loaded = _controlled(loaded, control)
    if num_steps is not None:
        loaded = _at_depth(loaded, num_steps)
    if shared is not None:
        shared[asked] = loaded
    return loaded


def _controlled(loaded: LoadedModel, control: StateControl) -> LoadedModel:
    set_state_control(loaded.model, control)
    settings = control.settings()
    if not settings:
        return loaded
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    return replace(_with(loaded, text), state_control=settings)


def _at_depth(loaded: LoadedModel, num_steps: int) -> LoadedModel:
    body = depth_body(loaded)
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1 iteration of the core")
    body.depth = replace(body.depth, mean_recurrence=num_steps)
    return replace(_with(loaded, f"num_steps={num_steps}"), num_steps=num_steps)


def _with(loaded: LoadedModel, text: str) -> LoadedModel:
    """Named and identified as a model that `text` changes."""
    return replace(
        loaded,
        description=f"{loaded.description}, with {text}",
        fingerprint=hashlib.sha256(f"{loaded.fingerprint} {text}".encode()).hexdigest(),
    )


def depth_body(loaded: LoadedModel) -> DepthModel:
    """The body of a model of recurrent depth.

    Raises:
        ValueError: the model is none.
    """
    body = getattr(loaded.model, "model", None)
    if not isinstance(body, DepthModel):
        raise ValueError(
            f"{loaded.description} has no recurrent core (model.depth), whose iterations num_steps counts: leave it out"
        )
    return body


def resolve_device(device: str) -> torch.device:
    """Raises ValueError for an unknown device, or CUDA on a machine without it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise ValueError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here: use "
            "--device cpu, or see `riverrun doctor`"
        )
    return found


def _embedding(model: PreTrainedModel) -> torch.nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding


def _is_run(folder: Path) -> bool:
    return checkpoint.folder_of(folder).is_dir() or ((folder / "config.toml").is_file() and not _weights(folder))


def _load_run(folder: Path, dtype: torch.dtype | None, step: int | None) -> LoadedModel:
    if step is None:
        skipped: list[str] = []
        newest = checkpoint.latest(folder, skipped.append)
        if newest is None:
            raise ValueError("\n".join([f"the run {folder} has no intact checkpoint to load yet", *skipped]))
        step = checkpoint.step_of(newest)
    weights = checkpoint.load_weights(folder, step)
    manifest = checkpoint.folder_of(folder) / f"step_{step:08d}" / "manifest.json"
    tokenizer = folder / "tokenizer"
    return LoadedModel(
        str(folder),
        build_model(read_config(folder), weights, dtype),
        load_tokenizer(str(tokenizer)) if tokenizer.is_dir() else None,
        f"run {folder}, step {step}",
        _sha256([folder / "config.json", manifest]),  # the manifest has the checksums of all weights
        trained_length(folder),
        step,
    )


def _load_folder(folder: Path, spec: str, dtype: torch.dtype | None, trust_remote_code: bool) -> LoadedModel:
    config = read_json(folder / "config.json")
    architecture = architecture_of(config)
    check_index(folder)  # transformers opens whatever file an index names
    model: PreTrainedModel
    if architecture in IMPORTED:
        model = load_pretrained(folder, dtype)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, UnpicklingError) as error:  # missing weights; a pickle of other things than tensors
            raise ValueError(f"{spec} cannot be loaded: {error}") from error
        except ValueError as error:
            hint = "; pass --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) else ""
            raise ValueError(f"{spec} cannot be loaded: {str(error).strip()}{hint}") from error
    length = config.get("max_position_embeddings")
    return LoadedModel(
        spec,
        model,
        load_tokenizer(str(folder)) if tokenizer_files(folder) else None,
        f"{architecture} {spec}",
        _sha256([folder / "config.json", *_weights(folder)]),
        length if isinstance(length, int) and architecture not in IMPORTED else None,
    )


def _download(name: str, trust_remote_code: bool) -> Path:
    """A hub model's local copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + (["*.py"] if trust_remote_code else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"there is no folder {name}, and no model of that name could be fetched: {reason}") from error


def trained_length(run_dir: Path) -> int | None:
    """Tokens a row of a run; None if it has no recipe."""
    try:
        return tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))["data"]["seq_len"]
    except (FileNotFoundError, KeyError):
        return None


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
