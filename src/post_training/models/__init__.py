"""Models and tokenizers as folders: made, loaded, saved. With the stages, the only use of torch.

The dimensions in signatures are those of the legend in data/__init__.py.
"""
