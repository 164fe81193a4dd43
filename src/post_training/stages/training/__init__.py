"""What every training stage shares: settings, the Trainer, checkpoints, metrics."""
