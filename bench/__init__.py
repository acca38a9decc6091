"""Measuring: speed and quality, sparse against dense."""
