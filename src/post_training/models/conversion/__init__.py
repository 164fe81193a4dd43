"""Checkpoints of Megatron-LM and GPT-NeoX into Hugging Face's folders, and back to Megatron.

megatron.py and neox.py read a checkpoint into whole tensors with Megatron's names;
architectures.py says which of them are which of Hugging Face's; settings.py does so for the
settings. A tensor is read when it is written (lazy_tensors.py), and no pickle is run
(torch_files.py).
"""
