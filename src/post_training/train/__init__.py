"""Training: SFT, preference training (DPO, QRPO and others) and reward models, on one trainer.

The dimensions in signatures are those of the legend in data/__init__.py.
"""
