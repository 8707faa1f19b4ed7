"""Why no class of transformers can compute a model, whatever its layers are."""

from riverrun.modeling.options import ModelOptions


def reasons_in_stack(options: ModelOptions) -> list[str]:
    """What the model does around its layers and their mixers that those classes do not."""
    reasons = []
    for name in ("depth", "universal"):
        if getattr(options, name) is not None:
            reasons.append(f"the class runs every layer once, this model runs some again (model.{name})")
    if options.sandwich_norm:
        reasons.append("the class does not norm the residual stream after sublayers: it needs sandwich_norm=false")
    if options.scale_embedding:
        reasons.append("the class does not scale embeddings: it needs scale_embedding=false")
    return reasons
