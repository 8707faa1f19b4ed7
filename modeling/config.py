"""`RiverrunConfig`: a model's shape as a transformers config, the one that trains and the one that is saved."""

from typing import Any

from transformers import PretrainedConfig

from riverrun.modeling.options import ModelOptions


class RiverrunConfig(PretrainedConfig):
    """Holds a resolved `ModelOptions` under `model`; its commonest fields can be read from the config directly.

    Build one with `RiverrunConfig.from_options(ModelOptions(...))`, or from a saved folder with `from_pretrained`.

    Raises:
        ValueError: a shape that cannot be built; the message lists every problem.
    """

    model_type = "riverrun"
    has_no_defaults_at_init = False

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any):
        options = ModelOptions.from_dict(model or {}).resolve()
        if problems := options.problems():
            raise ValueError("this model cannot be built:\n" + "\n".join(f"  - {p}" for p in problems))
        self.model = options.to_dict()
        # transformers and its tools look for these names
        self.vocab_size = options.vocab_size
        self.hidden_size = options.hidden_size
        self.num_hidden_layers = options.num_hidden_layers
        kwargs["tie_word_embeddings"] = options.tie_word_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_options(cls, options: ModelOptions, **kwargs: Any) -> "RiverrunConfig":
        return cls(model=options.to_dict(), **kwargs)

    @property
    def options(self) -> ModelOptions:
        return ModelOptions.from_dict(self.model)
