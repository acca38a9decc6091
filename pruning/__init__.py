"""Dense checkpoints to 2:4 ones: in one shot, and by fine-tuning."""
