"""MICRO-BATCH → ITEM EMBEDDINGS: one-pass training of the two towers, and publishing of the item side to Qdrant."""
