"""Megatron's .bin/.idx files: reading and writing."""
