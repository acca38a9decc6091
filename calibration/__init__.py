"""Activation ranges along the sampling trajectory, and Q/DQ insertion."""
