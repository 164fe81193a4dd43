"""From a recipe to an image in the store, and from there to a running container that knows it.

recipe, lock, registry, base    what an image is made of, pinned by hashes
build, builder, push, store     from these inputs to a squashfs or SIF with a record
compiled                        a package that is compiled on a node, for the next build
rebuild, release, retention     the same image again; a version that stays; what may be deleted
render, edf, edf_check          the EDF that names an image, read and checked
runner, namespaces start a command in an image
identity, inside                which image this is, and whether it is the pinned one
selfcheck, doctor               is the image, or this container, what a run needs?
commands                        what `post-training image …` does and prints
"""
