"""`entrypoint filter`: leaves out branches that are too long for the policy."""
