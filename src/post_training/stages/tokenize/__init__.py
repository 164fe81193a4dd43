"""Documents with control markers into an indexed dataset (.bin and .idx), with what is trained."""
