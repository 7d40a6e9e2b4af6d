"""Shards -> batches: order, reader, augment, loader."""
