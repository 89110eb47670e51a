"""CLICK → MICRO-BATCH: a Faust agent that validates clicks, joins histories, counts items and cuts micro-batches."""
