"""From files to batches: records (reading), plan (which rows), collator (text contract, tensors)."""
