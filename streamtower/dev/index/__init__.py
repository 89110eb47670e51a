"""The local Qdrant endpoint: Qdrant's REST calls, as Streamtower and its users make them, on Qdrant's engine."""
