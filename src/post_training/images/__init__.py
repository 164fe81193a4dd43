"""Images: from a recipe to a verified squashfs in the store, and from there into a running
container: input hash, build, store, EDF and its runner."""
