"""Shards -> batches: order, reader, augment, mix, loader."""
