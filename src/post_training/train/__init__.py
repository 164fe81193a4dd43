"""Training: SFT, preference training (DPO, QRPO and others) and reward models, on one trainer."""
