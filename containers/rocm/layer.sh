#!/bin/sh
# Makes the layer over a site's own SIF, inside that SIF, as an ordinary user and without a network:
# `post-training image push-layer` calls it with SOURCE_DATE_EPOCH set and these folders mounted:
#     /context   what a build reads (locks, entrypoints, the project's sources, image.json)
#     /wheels    what the locks name
#     /opt/post-training and /etc/post-training, empty: what is written there becomes the layer
# It does what the Dockerfile does. requirements.lock names nothing of what is the base's.
set -eu
umask 022
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PYTHONNOUSERSITE=1
export VIRTUAL_ENV=/opt/post-training/venv
export PATH="$VIRTUAL_ENV/bin:/opt/venv/bin:$PATH"

cp /context/requirements.lock /context/dev.lock /context/image.json /context/imports.txt \
    /context/recipe.toml /etc/post-training/
mkdir /opt/post-training/bin
cp /context/entrypoints/* /opt/post-training/bin/
# An environment of our own, which finds the base's packages after its own.
/opt/venv/bin/python -m venv "$VIRTUAL_ENV"
for folder in "$VIRTUAL_ENV"/lib/python3.*/site-packages; do
    printf '%s\n' /opt/venv/lib/python3.*/site-packages >"$folder/base.pth"
done
for lock in requirements dev; do
    pip install --no-cache-dir --find-links /wheels --require-hashes --only-binary :all: --no-deps \
        --quiet -r "/etc/post-training/$lock.lock"
done
pip wheel --no-build-isolation --no-deps --quiet -w /tmp/wheel /context/project
pip install --no-cache-dir --find-links /tmp/wheel --no-deps --quiet post-training
# The proof: everything imports, every version is the locked one, and what is the base's is its own.
python -m post_training.images.selfcheck
