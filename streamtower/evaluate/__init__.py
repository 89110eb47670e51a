"""Evaluation on files: a replay of clicks through the code of streams and trainer, held against simpler ways."""
