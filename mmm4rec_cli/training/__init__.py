"""Training: one loop, and what pre-training and fine-tuning put into it."""
