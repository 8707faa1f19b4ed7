"""What a run reads: its training mixture, its held-out rows and its tokenizer, checked against each other."""

from collections.abc import Iterator
from dataclasses import dataclass

from riverrun.train import initial
from riverrun.train.config import Recipe
from riverrun.train.data.loader import PackedLoader
from riverrun.train.data.mixture import Mixture
from riverrun.train.data.packing import Batch, PackedRows
from riverrun.train.data.store import TokenStore
from riverrun.train.data.streams import Streams
from riverrun.train.data.tokenizer import Tokenizer, load_tokenizer
from riverrun.train.distributed import Ranks
from riverrun.train.objectives import make_objective
from riverrun.train.objectives.objective import Objective
from riverrun.train.recurrence import Recurrence, RowKeys
from riverrun.train.state_passing import Carries


@dataclass(frozen=True)
class HeldOut:
    """The part of the first `rows` rows of a store that this rank's data-parallel peers leave to it."""

    source: PackedRows
    rows: range
    micro_batch_size: int
    objective: Objective

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.micro_batch_size):
            part = self.rows[start : start + self.micro_batch_size]
            yield self.objective.held_out_batch([self.source[i] for i in part])


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    bytes_per_token: UTF-8 bytes of training text a token stands for, weighted as the mixture is.
    fingerprints: of every store, by path: a run resumes on the same data only.
    """

    objective: Objective
    train: PackedLoader
    held_out: HeldOut | None
    bytes_per_token: float
    held_out_bytes_per_token: float | None
    fingerprints: dict[str, str]
    tokenizer: Tokenizer | None


def open_inputs(recipe: Recipe, ranks: Ranks, before: dict[str, str] | None) -> Inputs:
    """Open and check everything that `recipe.data` names; called on every rank alike.

    Args:
        before: the fingerprints of the run that is resumed, or None.

    Raises:
        ValueError: a store that is missing, damaged, too short, of another tokenizer or vocabulary, or changed since.
    """
    data, train = recipe.data, recipe.train
    paths = [source.path for source in data.train] + ([data.held_out] if data.held_out else [])
    if data.verify:
        ranks.first(lambda: [TokenStore.open(path, verify=True) for path in paths] and None)
    stores = {path: TokenStore.open(path) for path in paths}
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    origin = initial.tokenizer_of(train.init_from) if train.init_from is not None and before is None else None
    _check_vocabularies(recipe, stores, tokenizer, origin)
    fingerprints = {path: store.fingerprint for path, store in stores.items()}
    changed = [path for path in paths if before is not None and before.get(path) not in (None, fingerprints[path])]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changed since this run began: restore the store, or start anew in another --run-dir"
        )

    rows = [PackedRows(stores[source.path], data.seq_len) for source in data.train]
    weights = [source.weight for source in data.train]
    objective = make_objective(recipe, tokenizer)
    passing = train.state_passing
    samples: Mixture | Streams = Mixture(rows, weights, train.seed)
    if passing.mode == "tbtt":
        places = train.global_batch_size
        samples = Streams(rows, weights, train.seed, places=places, length=passing.segment_rows)
    streams = samples if isinstance(samples, Streams) else None
    loader = PackedLoader(
        samples,
        objective.batch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=ranks.mesh.dp.rank,
        dp_size=ranks.mesh.dp.size,
        # nothing but attention takes longer for long documents; and rows that go on from states keep their places
        balance="attention" in recipe.model.layers and passing.mode == "off",
        carries=None if passing.mode == "off" else Carries(passing, train.seed, streams),
        recurrence=None if (depth := recipe.model.depth) is None else Recurrence(depth, train.recurrence, train.seed),
        row_keys=RowKeys(train.seed) if (looped := recipe.model.universal) and looped.random_offset else None,
    )
    shares = [weight / sum(weights) for weight in weights]
    held_out = None
    if data.held_out:
        source = PackedRows(stores[data.held_out], data.seq_len)
        total = min(train.eval_rows, len(source))
        held_out = HeldOut(
            source, range(ranks.mesh.dp.rank, total, ranks.mesh.dp.size), train.micro_batch_size, objective
        )
    return Inputs(
        objective,
        loader,
        held_out,
        sum(share * stores[s.path].bytes_per_token for share, s in zip(shares, data.train)),
        stores[data.held_out].bytes_per_token if data.held_out else None,
        fingerprints,
        tokenizer,
    )


def _check_vocabularies(
    recipe: Recipe, stores: dict[str, TokenStore], tokenizer: Tokenizer | None, origin: Tokenizer | None
) -> None:
    known = {path: (store.tokenizer_fingerprint, store.vocab_size) for path, store in stores.items()}
    if tokenizer is not None:
        known[f"data.tokenizer={recipe.data.tokenizer}"] = (tokenizer.fingerprint, tokenizer.vocab_size)
    if origin is not None:
        known[f"train.init_from={recipe.train.init_from}"] = (origin.fingerprint, origin.vocab_size)
    if len({fingerprint for fingerprint, _ in known.values()}) > 1:
        listing = "\n".join(f"  - {name}: tokenizer {f[:12]}, {size} tokens" for name, (f, size) in known.items())
        raise ValueError(
            f"these were made with different tokenizers:\n{listing}\n"
            "Prepare them with one tokenizer, or correct data.tokenizer"
        )
    name, (_, size) = next(iter(known.items()))
    if size > recipe.model.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {size} tokens, more than model.vocab_size={recipe.model.vocab_size}: "
            f"set model.vocab_size={-(-size // 64) * 64}"
        )
