"""`entrypoint split`: a dataset in two, for training and evaluation, stratified."""
