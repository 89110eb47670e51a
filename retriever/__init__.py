"""QUERY → CANDIDATES: the query tower of the served version, in front of Qdrant."""
