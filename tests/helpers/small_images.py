"""Images of a few files, built by the real builder."""

import json
from pathlib import Path

from post_training.core.hashing import sha256_text
from post_training.images import builder
from post_training.images.build import BuiltImage
from post_training.images.identity import image_tag
from post_training.images.recipe import SOURCE_DATE_EPOCH

# As of `describe_checkout`.
COMMIT = {"commit": "c" * 40, "dirty": False}


def forget_images() -> None:
    """Empty the builder's storage, as it is on another machine."""
    for tag in list(builder.stored_tags()):
        builder.remove(tag)


def make_image(folder: Path, word: str, *, is_ours: bool = True) -> BuiltImage:
    """Build an image whose files hold `word`."""
    identity = {
        "name": "cpu", "version": "1.2.3", "input_hash": sha256_text(word), "base": "locked",
        "base_sha256": "4" * 64, "lock_sha256": {"requirements.lock": "5" * 64},
        "platform": "linux/amd64",
    }  # fmt: skip
    folder.mkdir()
    files = {
        "word": word,
        "etc/environment": "PATH=/bin\nWORD=one\n",
        "var/lib/dpkg/status": "Package: libc6\nVersion: 2.36\n",
    }
    if is_ours:
        files["etc/post-training/image.json"] = json.dumps(identity)
    for name, text in files.items():
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / name).write_text(text)
    (folder / "Dockerfile").write_text(
        "FROM scratch\nCOPY root /\nENV WORD=one PATH=/bin\nLABEL org.test=a\n"
    )
    tag = image_tag(identity)
    builder.build(
        ["--network=none", "--format=oci", "--identity-label=false",
         f"--timestamp={SOURCE_DATE_EPOCH}", "--platform=linux/amd64", f"--tag={tag}", folder]
    )  # fmt: skip
    stored = builder.stored_image(tag)
    return BuiltImage(tag, stored.oci_digest, identity, stored.labels, stored.environment)
