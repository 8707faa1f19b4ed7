"""The schema of a recipe. `train/recipe.py` reads recipes into it and lists what is wrong with them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from riverrun.modeling.options import ModelOptions

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A table of a recipe: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Section):
    """One token store of a training mixture, and its share of the tokens relative to the other weights."""

    path: str
    weight: PositiveFloat = 1.0


class DataConfig(Section):
    train: list[Source] = []  # token stores written by `riverrun data prepare`; TOML may give one path as a string
    held_out: str | None = None  # a token store for evaluation during and after training
    tokenizer: str | None = None  # the tokenizer that goes into checkpoints and exports; must match the stores
    seq_len: PositiveInt = 2048
    verify: bool = True  # check all checksums of the stores at the start (rank 0 reads them whole); False: sizes only


class DittoConfig(Section):
    """Of `objective = "ditto"`, see `riverrun.train.objectives.ditto`."""

    probability: Annotated[float, Field(gt=0, le=1)] = 0.5  # of a step being on repeated sentences
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5  # λ: of a token's probability from one copy to the next
    delimiters: list[str] = ["."]  # texts of the tokens that end sentences; found in the vocabulary of data.tokenizer
    delimiter_ids: list[NonNegativeInt] | None = None  # the tokens themselves, in place of `delimiters`


class JRTConfig(Section):
    """Of `objective = "jrt"`, see `riverrun.train.objectives.jrt`."""

    encoder_len: PositiveInt = 1024  # M: tokens of each row that are read without causality; the paper has half of them
    mask_id: NonNegativeInt | None = None  # the token that stands for a masked one: none of the text's
    mask_share: Annotated[float, Field(ge=0, lt=1)] = 0.15  # of the encoder's tokens
    ntp_weight: PositiveFloat = 1.0  # w1: of the decoder's next tokens
    mlm_weight: NonNegativeFloat = 0.25  # w2: of the encoder's masked tokens


class StatePassingConfig(Section):
    """What recurrent layers start a row from, see `riverrun.train.state_passing`."""

    mode: Literal["off", "passing", "tbtt"] = "off"  # zeros; a row of the step before; the preceding rows of the text
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a row going on from there, and not from zeros
    segment_rows: Annotated[int, Field(ge=2)] = 12  # tbtt only: rows read one after the other, before another place


class RecurrenceConfig(Section):
    """Of models with `[model.depth]`, see `riverrun.train.recurrence`."""

    ramp_steps: NonNegativeInt = 0  # over which the number of iterations grows to its mean; 0: it is there at once
    eval_steps: list[PositiveInt] = []  # numbers of iterations that evaluations are done at besides the mean


class TrainConfig(Section):
    steps: PositiveInt = 1000  # optimiser steps
    global_batch_size: PositiveInt = 64  # rows of data.seq_len tokens a step, over all ranks
    micro_batch_size: PositiveInt = 8  # rows a rank computes at once; the rest of its share is accumulated
    seed: NonNegativeInt = 0
    dtype: Literal["bf16", "fp32"] = "bf16"  # of parameters and activations; the optimiser's copy is always fp32
    recompute: bool = False  # recompute each block's activations in the backward pass instead of storing them
    compile: bool = False  # torch.compile each block
    z_loss: NonNegativeFloat = 0.0  # weight of logsumexp² of the logits; 1e-4 to 1e-5 is usual
    objective: Literal["lm", "ditto", "jrt"] = "lm"  # what is learned: the next token; also not to repeat (DITTO); JRT
    ditto: DittoConfig = DittoConfig()
    jrt: JRTConfig = JRTConfig()
    state_passing: StatePassingConfig = StatePassingConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    init_from: str | None = None  # a run, a checkpoint or an export whose weights a new run starts from
    log_every: PositiveInt = 10  # steps between records in metrics.jsonl; the loss is averaged over them
    eval_every: NonNegativeInt = 0  # steps between evaluations on data.held_out, from step 0 on; 0: only at the end
    eval_rows: PositiveInt = 64  # rows of data.seq_len tokens an evaluation reads


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, everything else by AdamW
    lr: PositiveFloat = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1  # not on norms, biases, A_log, D, dt_bias and recurrent vectors
    grad_clip: NonNegativeFloat = 1.0  # maximum global gradient norm; 0: no clipping
    muon_lr: PositiveFloat = 0.02
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95


class ScheduleConfig(Section):
    name: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    decay_steps: NonNegativeInt = 0  # wsd only: length of the final decay
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # of the peak, at the end


class EngineConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[1, 2, 3] = 1
    overlap_comm: bool = False  # of stages 2 and 3: reduce gradients while the backward pass goes on
    start_timeout_minutes: PositiveFloat = 30.0  # of collectives until the first step is done: loading, compiling
    collective_timeout_minutes: PositiveFloat = 10.0  # of those after it


class ParallelConfig(Section):
    tp: PositiveInt = 1  # tensor-parallel ranks: each has part of every layer's heads or channels
    cp: PositiveInt = (
        1  # context-parallel ranks: each has part of every row's tokens; what ranks remain have other rows
    )
    linear: Literal["auto", "states", "heads"] = "auto"  # how cp ranks share linear recurrences: what goes between them
    attention: Literal["auto", "ulysses", "ring"] = "auto"  # how they share attention: heads, or keys round a ring


class CheckpointConfig(Section):
    every: NonNegativeInt = 500  # steps between checkpoints; 0: only at the end
    keep: PositiveInt = 3  # newest checkpoints that are kept, besides the last one with a finite evaluation after it
    asynchronous: bool = True  # write while training goes on, from a copy in the host's memory


class GuardConfig(Section):
    """What protects a run from bad steps, bad data, hung and faulty ranks: see `riverrun.train.guard`."""

    sigma: NonNegativeFloat = 6.0  # standard deviations above the mean that skip a step; 0: only not being finite does
    window: Annotated[int, Field(ge=8)] = 128  # steps that these are taken over; half of them must be there
    patience: PositiveInt = 10  # skipped steps in a row after which the run goes back to its last good checkpoint
    rollbacks: NonNegativeInt = 3  # how often, in a whole run, before it ends
    replicas_every: NonNegativeInt = 0  # steps between comparisons, bit by bit, of what ranks hold alike; 0: none
    stall_minutes: NonNegativeFloat = 8.0  # without progress, after which a rank reports and ends the run; 0: never
    start_stall_minutes: PositiveFloat = 45.0  # the same, until the first step is done


class LogConfig(Section):
    tensorboard: bool = True
    wandb: bool = False  # needs the `wandb` extra
    peak_tflops: PositiveFloat | None = None  # of one device, dense, in train.dtype, for MFU; None: by device name


class Recipe(Section):
    """A whole training run. `problems` lists what is impossible across fields, before anything is allocated."""

    name: str = "custom"
    description: str = ""
    profile: bool = False  # trace a few steps with torch's profiler, into RUN_DIR/profile
    model: ModelOptions = ModelOptions()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    def problems(self) -> list[str]:
        """Every impossible combination, each with its fix. Checks of files, devices and ranks come at start-up."""
        found = [
            f"model.{mixer}.head_dim={options.head_dim} must be positive; {usual} is usual"
            for mixer, options, usual in (
                ("attention", self.model.attention, 64),
                ("gated_delta", self.model.gated_delta, 128),
            )
            if options.head_dim < 1
        ]
        if found:
            return found  # the sizes derived from it do not exist
        found = [f"model.{p}" for p in self.model.resolve().problems()]
        train, schedule = self.train, self.schedule
        if train.global_batch_size % train.micro_batch_size:
            found.append(
                f"train.global_batch_size={train.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} (times the number of data-parallel ranks)"
            )
        tp, cp = self.parallel.tp, self.parallel.cp
        found += [f"model.{p}" for p in self.model.resolve().tp_problems(tp)] if not found else []
        if self.data.seq_len % cp:
            found.append(
                f"data.seq_len={self.data.seq_len} must be a multiple of parallel.cp={cp}: "
                f"set data.seq_len={-(-self.data.seq_len // cp) * cp}"
            )
        elif cp > 1 and self.data.seq_len // cp < (shortest := max(self._taps(), default=1) - 1):
            found.append(
                f"data.seq_len / parallel.cp = {self.data.seq_len // cp} tokens are fewer than the {shortest} that "
                "convolutions look back: lower parallel.cp"
            )
        elif (tokens := train.micro_batch_size * self.data.seq_len // cp) % tp:
            found.append(
                f"train.micro_batch_size × data.seq_len / parallel.cp = {tokens} tokens must be a multiple of "
                f"parallel.tp={tp}, whose ranks share them"
            )
        if train.objective != "lm":
            if tp > 1 or cp > 1:
                found.append(
                    f"train.objective={train.objective!r} needs the loss of every single prediction, which ranks that "
                    "share a row do not have: set parallel.tp=1 and parallel.cp=1"
                )
            if train.z_loss:
                found.append(
                    f"train.z_loss belongs to train.objective='lm': set train.z_loss=0 for {train.objective!r}"
                )
            looped = self.model.universal
            if looped is not None and looped.halting == "act" and looped.ponder_weight:
                found.append(
                    "model.universal.ponder_weight belongs to train.objective='lm': set it to 0 for "
                    f"{train.objective!r}"
                )
        found += self._jrt_problems()
        if train.state_passing.mode != "off":
            found += self._state_passing_problems()
        found += self._recurrence_problems()
        if self.optimizer.name == "muon" and tp > 1:
            found.append("optimizer.name='muon' orthogonalises whole matrices: it needs parallel.tp=1, or use adamw")
        if schedule.warmup_steps >= train.steps:
            found.append(
                f"schedule.warmup_steps={schedule.warmup_steps} must be less than train.steps={train.steps}: "
                f"set schedule.warmup_steps={train.steps // 10} or train longer"
            )
        if schedule.name == "wsd" and not 0 < schedule.decay_steps <= train.steps - schedule.warmup_steps:
            found.append(
                f"schedule.decay_steps={schedule.decay_steps} must be between 1 and train.steps - warmup_steps = "
                f"{train.steps - schedule.warmup_steps} for the wsd schedule"
            )
        if schedule.name == "cosine" and schedule.decay_steps:
            found.append("schedule.decay_steps belongs to the wsd schedule: drop it or set schedule.name='wsd'")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            found.append(f"optimizer.betas={list(self.optimizer.betas)} must lie in [0, 1); (0.9, 0.95) is usual")
        if self.optimizer.name == "muon" and self.engine.zero_stage != 1:
            found.append(
                f"optimizer.name='muon' needs engine.zero_stage=1: stage {self.engine.zero_stage} would clip the "
                "orthogonalised update instead of the gradient"
            )
        if self.engine.overlap_comm and self.engine.zero_stage == 1:
            found.append(
                "engine.overlap_comm=true needs engine.zero_stage=2 or 3: stage 1 reduces gradients once a step, after "
                "the last backward pass"
            )
        for mixer in ("mamba2", "gated_delta"):
            chunk = getattr(self.model, mixer).chunk_size
            if mixer in self.model.layer_pattern and self.data.seq_len < chunk:
                found.append(
                    f"data.seq_len={self.data.seq_len} is shorter than model.{mixer}.chunk_size={chunk}: "
                    f"set model.{mixer}.chunk_size={max(1, self.data.seq_len)} or use longer rows"
                )
        if self.data.held_out is not None and self.data.held_out in [source.path for source in self.data.train]:
            found.append(
                f"data.held_out={self.data.held_out} is also in data.train: evaluate on a store that is not trained on"
            )
        return found + self.missing()

    def _jrt_problems(self) -> list[str]:
        jrt, model = self.train.jrt, self.model
        if self.train.objective != "jrt":
            if not model.reads_prefix:
                return []
            return [
                f"train.objective={self.train.objective!r} never reads a prefix, so that the encoder of "
                "prefix_linear_attention would not learn: set model.prefix_linear_attention.encoder=false, or "
                "train.objective='jrt'"
            ]
        found = []
        if not model.reads_prefix:
            found.append(
                "train.objective='jrt' needs layers that read a prefix: name prefix_linear_attention in "
                "model.layer_pattern, with model.prefix_linear_attention.encoder=true"
            )
        if jrt.encoder_len >= self.data.seq_len:
            found.append(
                f"train.jrt.encoder_len={jrt.encoder_len} must be less than data.seq_len={self.data.seq_len}, whose "
                f"rest is the decoder's: set train.jrt.encoder_len={self.data.seq_len // 2}"
            )
        if jrt.mask_id is None:
            found.append("train.objective='jrt' needs train.jrt.mask_id: an id above the tokenizer's")
        elif jrt.mask_id >= model.vocab_size:
            found.append(
                f"train.jrt.mask_id={jrt.mask_id} must be less than model.vocab_size={model.vocab_size}: "
                f"set model.vocab_size={-(-(jrt.mask_id + 1) // 64) * 64}"
            )
        return found

    def _state_passing_problems(self) -> list[str]:
        found, mode = [], self.train.state_passing.mode
        if not set(self.model.layer_pattern) - {"attention"}:
            found.append(
                f"train.state_passing.mode={mode!r} needs recurrent layers, and model.layer_pattern has none: set "
                "it to 'off'"
            )
        if self.model.depth is not None:
            found.append(
                f"train.state_passing.mode={mode!r} cannot be had with [model.depth], whose iterations have states of "
                "their own, and steps unlike many of them: set it to 'off'"
            )
        if self.model.universal is not None:
            found.append(
                f"train.state_passing.mode={mode!r} cannot be had with [model.universal], whose steps have states of "
                "their own: set it to 'off'"
            )
        if self.parallel.tp > 1 or self.parallel.cp > 1:
            found.append(
                f"train.state_passing.mode={mode!r} keeps the states of whole rows and layers on a rank: set "
                "parallel.tp=1 and parallel.cp=1"
            )
        if self.train.objective != "lm":
            found.append(
                f"train.state_passing.mode={mode!r} belongs to train.objective='lm', whose rows are the text's: set "
                f"it to 'off' for {self.train.objective!r}"
            )
        return found

    def _recurrence_problems(self) -> list[str]:
        recurrence = self.train.recurrence
        if self.model.depth is None:
            given = [name for name, value in recurrence if value]
            return [
                f"train.recurrence.{name} belongs to models with recurrent depth: leave it out, or add a table "
                "[model.depth]"
                for name in given
            ]
        if recurrence.ramp_steps > self.train.steps:
            return [
                f"train.recurrence.ramp_steps={recurrence.ramp_steps} must be at most train.steps={self.train.steps}, "
                f"or the mean depth is never reached: set train.recurrence.ramp_steps={self.train.steps // 4} or train "
                "longer"
            ]
        return []

    def _taps(self) -> list[int]:
        return [getattr(getattr(self.model, mixer), "conv_kernel", 1) for mixer in set(self.model.layer_pattern)]

    def missing(self) -> list[str]:
        """What only the user can name, and did not."""
        found = []
        if not self.data.train:
            found.append("data.train is empty: name a token store (write one with `riverrun data prepare`)")
        if self.train.eval_every and self.data.held_out is None:
            found.append("train.eval_every needs data.held_out: name a held-out token store, or set train.eval_every=0")
        return found
