"""What a model makes of an image as one row of numbers: its features in front of the head, or its logits."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .models import Loaded
from .terminal import UsageError

if TYPE_CHECKING:
    from torch import Tensor

WHAT = ("features", "logits")
POOLS = ("own", "token", "avg")


def extractor(loaded: Loaded, what: str, pool: str) -> "Callable[[Tensor], Tensor]":
    """A function from images (B, 3, height, width), as ``loaded.inputs`` takes them, to (B, D).

    Args:
        what: "features" or "logits".
        pool: of features: "own", what the model's head is given, the class token of a model without a head; "token",
            the class token after the last norm; "avg", the mean of the patches there.

    Raises:
        UsageError: there is no head, or no class token.
    """
    from fastvit.integrations.embeddings import embedding_of

    if what == "logits":
        if pool != "own":
            raise UsageError("--pool is for features: the model's head has a pooling of its own")
        if not loaded.num_classes:
            raise UsageError(f"{loaded.name}: the model has no head, and so no logits")
        return loaded.logits
    embedding = embedding_of(loaded.model)
    if embedding is None and pool == "avg":
        raise UsageError(f"{loaded.name}: how many tokens stand in front of its patches is not known; take --pool own")
    if pool == "token" and not (embedding and embedding.class_token):
        raise UsageError(f"{loaded.name}: the model has no class token; take --pool avg")
    prefix = embedding.prefix if embedding else 0

    def pooled(tokens: "Tensor") -> "Tensor":
        return tokens[:, 0] if pool == "token" else tokens[:, prefix:].mean(1)

    if loaded.keyword:
        return _own_of_transformers(loaded) if pool == "own" else lambda x: pooled(_tokens(loaded, x))
    model: Any = loaded.model
    if pool == "own":
        return lambda x: model.forward_head(model.forward_features(loaded.inputs(x)), pre_logits=True)
    return lambda x: pooled(model.forward_features(loaded.inputs(x)))


def _tokens(loaded: Loaded, x: "Tensor") -> "Tensor":
    """Tokens (B, N, D) of a model of transformers after its last norm."""
    model: Any = loaded.model
    inner = model.base_model if loaded.num_classes else model
    return inner(**_named(loaded, x)).last_hidden_state


def _named(loaded: Loaded, x: "Tensor") -> "dict[str, Tensor]":
    given = loaded.inputs(x)
    return given if isinstance(given, dict) else {}


def _own_of_transformers(loaded: Loaded) -> "Callable[[Tensor], Tensor]":
    """What goes into the classifier, whatever it is made of; of a tower its pooled output.

    A pooler with a layer of its own is passed by: it was trained for another task, or not at all.
    """
    model: Any = loaded.model
    classifier = getattr(model, "classifier", None)
    if loaded.num_classes and classifier is not None:

        def headless(x: "Tensor") -> "Tensor":
            seen: list[Tensor] = []
            handle = classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                model(**_named(loaded, x))
            finally:
                handle.remove()
            return seen[0]

        return headless

    def tower(x: "Tensor") -> "Tensor":
        if loaded.num_classes:
            return _tokens(loaded, x)[:, 0]
        found = model(**_named(loaded, x))
        pooled = None if hasattr(getattr(model, "pooler", None), "dense") else getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled

    return tower
