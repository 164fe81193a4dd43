"""`entrypoint rewards`: how good each branch is, by reward models and by functions."""
