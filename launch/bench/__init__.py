"""Measurements, one subcommand each."""
