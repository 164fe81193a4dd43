#!/bin/sh
# Makes the layer over a site's own SIF, inside that SIF, as an ordinary user and without a network:
# `post-training image push-layer` calls it with SOURCE_DATE_EPOCH set and these folders mounted:
#     /context   what a build reads (locks, entrypoints, the project's sources, image.json)
#     /wheels    what the locks name
#     /opt/post-training and /etc/post-training, empty: what is written there becomes the layer
# It does what the Dockerfile does. requirements.lock names nothing of what is the base's.
set -eu
umask 022
export PYTHONNOUSERSITE=1
export VIRTUAL_ENV=/opt/post-training/venv
export PATH="$VIRTUAL_ENV/bin:/opt/venv/bin:$PATH"

cp /context/requirements.lock /context/dev.lock /context/image.json /context/imports.txt \
    /context/recipe.toml /etc/post-training/
mkdir /opt/post-training/bin
cp /context/entrypoints/* /opt/post-training/bin/
/context/steps/new-environment-over /opt/venv
for lock in requirements dev; do
    /context/steps/install "/etc/post-training/$lock.lock" /wheels
done
/context/steps/check-files /wheels
/context/steps/project /context/project
# The proof: everything imports, every version is the locked one, and what is the base's is its own.
python -m post_training.images.selfcheck
