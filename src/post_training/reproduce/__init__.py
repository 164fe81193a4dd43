"""From a recorded digest to a verdict: find the image and the inputs, run again, compare."""
