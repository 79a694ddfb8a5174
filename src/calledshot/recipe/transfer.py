"""Learning rates by group of parameters, and how they move with width.

Hidden matrices under AdamW, and the head under either optimizer, take a rate that falls as 1 / width (Yang et al.,
Tensor Programs V, table 3). Muon's update is orthogonalised and scaled by sqrt(max(1, rows / columns)), so that its
rate already holds at every width.
"""

from .schema import Recipe

GROUPS = ("matrix", "embedding", "head", "vector", "encoder_matrix", "encoder_embedding")
"""Matrices of the blocks; the embedding; the head; gains and T5's tables of positions; with an encoder, the matrices
whose inputs are its states, and the embedding that it has where its width is another. A tied matrix belongs to
`embedding`, at the head's rate."""

# Relation of each group's rate at `base_width` to `optimizer.learning_rate`, where the recipe does not write one.
# Muon's rate is the spectral size of an update, AdamW's the size of each entry: hence the distance.
RATIOS = {
    "muon": {"embedding": 15.0, "head": 0.2, "vector": 0.5},
    "adamw": {"embedding": 1.0, "head": 1.0, "vector": 1.0},
}


def optimizer_groups(recipe: Recipe) -> dict[str, float]:
    """Peak learning rate of each group in `GROUPS` that the model has, with zeros and `optimizer.transfer` resolved. An
    optimizer of the user's own takes AdamW's relations."""
    optimizer, model = recipe.optimizer, recipe.model
    ratios = RATIOS.get(optimizer.name, RATIOS["adamw"])
    rates = {
        "matrix": optimizer.learning_rate,
        "embedding": optimizer.embedding_learning_rate or optimizer.learning_rate * ratios["embedding"],
        "head": optimizer.head_learning_rate or optimizer.learning_rate * ratios["head"],
        "vector": optimizer.vector_learning_rate or optimizer.learning_rate * ratios["vector"],
    }
    encoder_width = model.encoder_width or model.width
    if model.topology == "encoder-decoder":
        rates["encoder_matrix"] = rates["matrix"]
        if encoder_width != model.width:
            rates["encoder_embedding"] = rates["embedding"]
    if optimizer.transfer == "width":
        scale = optimizer.base_width / model.width
        rates["head"] *= scale
        if optimizer.name != "muon":
            rates["matrix"] *= scale
            if "encoder_matrix" in rates:
                rates["encoder_matrix"] *= optimizer.base_width / encoder_width
    if model.tied_embeddings:
        # As a head its entries are small: the embedding's own rate would overwrite it at every step.
        rates["embedding"] = optimizer.embedding_learning_rate or rates["head"]
    return rates
