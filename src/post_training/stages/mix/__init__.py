"""`entrypoint mix`: one dataset from several, in the shares that were asked for."""
