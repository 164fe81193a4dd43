"""Preference training: DPO, its length-normalised form, IPO, hinge and QRPO on pairs of answers."""
